"""Laws that every bundled target keeps, on random networks."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, Cost, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim import HardwareModel, UnsupportedLayerError, bundled_targets, load_target

TARGETS = [load_target(path) for path in bundled_targets()]
SUPPLY = ("_kib", "_gb_per_s", "_mb_per_s", "bits_per_cycle", "bytes_per_cycle", "device_", "usable_")
"""Parts of the names of constants that say how much memory, bandwidth or logic there is."""
EXCEPTIONS = {
    ("row_stationary", "bank_kib")
}  # divides one buffer between two uses: docs/hardware/row_stationary.md
SLACK = 1 + 1e-9

NETWORKS = st.tuples(
    st.integers(2, 70), st.integers(2, 70), st.integers(6, 30), st.sampled_from([1, 3, 5]), st.integers(2, 8)
)


def network(a: int, b: int, size: int, kernel: int, bits: int) -> LayerGraph:
    """Stem, depthwise and full convolutions of a and b channels, linear layer."""
    wide_a, wide_b = Width(terms=(("a", 1),)), Width(terms=(("b", 1),))
    hw, windows = {"in_hw": (size, size), "out_hw": (size, size)}, (kernel, kernel)
    layers = (
        LayerSpec("stem", "conv", 3, a, (3, 3), in_width=Width(3), out_width=wide_a, **hw),  # type: ignore[arg-type]
        LayerSpec("dw", "conv", a, a, (3, 3), groups=a, in_width=wide_a, out_width=wide_a, **hw),  # type: ignore[arg-type]
        LayerSpec("full", "conv", a, b, windows, in_width=wide_a, out_width=wide_b, **hw),  # type: ignore[arg-type]
        LayerSpec("head", "linear", b, 10, in_width=wide_b, out_width=Width(10)),
    )
    groups = (ChannelGroup("a", a, (), ()), ChannelGroup("b", b, (), ()))
    graph = LayerGraph(layers, groups, input_shape=(3, size, size))
    return graph.with_bits({layer.name: Bits(bits, bits) for layer in layers})


def runnable(model: HardwareModel, graph: LayerGraph) -> LayerGraph:
    """With one-bit weights where the machine has no others."""
    if model.kind != "binary_dataflow":
        return graph
    return graph.with_bits({layer.name: Bits(1, layer.bits.act) for layer in graph.layers})


def assert_no_cheaper(large: Cost, small: Cost) -> None:
    for metric, value in small.totals.items():
        assert large[metric] * SLACK >= value, metric


@pytest.mark.parametrize("model", TARGETS, ids=lambda model: model.name)
def test_more_channels_bits_or_pixels_never_cost_less(model: HardwareModel) -> None:
    @settings(max_examples=15, deadline=None)
    @given(NETWORKS, st.sampled_from([1, 4]))
    def check(shape: tuple[int, int, int, int, int], batch: int) -> None:
        machine = replace(model, batch=batch)
        a, b, size, kernel, bits = shape
        large = runnable(machine, network(*shape))
        cost = machine(large)
        smaller = [
            large.with_channels({"a": a - 1}),
            large.with_channels({"b": b - 1}),
            runnable(machine, network(a, b, size - 1, kernel, bits)),
            runnable(machine, network(a, b, size, kernel, bits - 1)),
            large.with_bits({"full": Bits(large.layers[2].bits.weight, bits - 1)}),
        ]
        for graph in smaller:
            assert_no_cheaper(cost, machine(graph))

    check()


@pytest.mark.parametrize("model", TARGETS, ids=lambda model: model.name)
def test_less_memory_bandwidth_or_logic_never_costs_less(model: HardwareModel) -> None:
    names = [f.name for f in fields(model) if any(part in f.name for part in SUPPLY)]  # type: ignore[arg-type]
    names = [name for name in names if (model.kind, name) not in EXCEPTIONS]

    @settings(max_examples=15, deadline=None)
    @given(NETWORKS, st.sampled_from(names), st.sampled_from([0.8, 0.5, 0.2]))
    def check(shape: tuple[int, int, int, int, int], name: str, share: float) -> None:
        value = getattr(model, name) * share
        less = replace(
            model, **{name: max(1, int(value)) if isinstance(getattr(model, name), int) else value}
        )
        graph = runnable(model, network(*shape))
        try:
            cost = less(graph)
        except UnsupportedLayerError:
            return  # too little to run it at all
        assert_no_cheaper(cost, model(graph))

    if names:
        check()
    else:
        assert model.kind in ("measured", "cenn")


@pytest.mark.parametrize("model", TARGETS, ids=lambda model: model.name)
def test_layers_and_components_add_up_and_a_larger_batch_never_takes_less(model: HardwareModel) -> None:
    @settings(max_examples=15, deadline=None)
    @given(NETWORKS, st.integers(1, 20))
    def check(shape: tuple[int, int, int, int, int], batch: int) -> None:
        graph, machine = runnable(model, network(*shape)), replace(model, batch=batch)
        cost, costs = machine(graph), machine.graph_costs(graph)
        assert machine(graph).totals == cost.totals
        if costs.energy_pj:
            parts = sum(float(part.sum()) for part in costs.energy_pj.values())
            assert parts * 1e-9 == pytest.approx(cost["energy_mj"])
            assert all((part >= 0).all() for part in costs.energy_pj.values())
        assert (costs.utilisation <= SLACK).all()
        for metric in ("latency_ms", "energy_mj") if machine.additive else ():
            if metric in cost.totals:
                assert sum(c[metric] for c in cost.layers.values()) == pytest.approx(cost[metric])
        more = replace(model, batch=batch + 1)(graph)
        for metric in set(cost.totals) & {"latency_ms", "energy_mj"}:
            assert more[metric] * (batch + 1) * SLACK >= cost[metric] * batch
        assert np.isfinite(list(cost.totals.values())).all()

    check()


@pytest.mark.parametrize("model", TARGETS, ids=lambda model: model.name)
def test_every_target_names_its_mapping_and_its_energy_table(model: HardwareModel) -> None:
    assert len(model.mapping) > 10
    assert model.energy_table
    assert ("energy_mj" in model.metrics) == (not model.energy_table.startswith("none"))
