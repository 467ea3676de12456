from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.measured import TERMS, Measured, kinds, terms
from autocompress.hardware_sim.target_file import TargetError, load_target, parse_target
from autocompress.testing import check_cost_model

THIS_CPU = load_target("xeon-amx")


def machine(**constants: Any) -> Measured:
    """100 ns per layer and 1 ns per padded MAC of dense layers at 32 bits, unless said otherwise."""
    given = {
        "ns_per": {32: {"dense": {"layer": 100.0, "padded_macs": 1.0}}},
        "between_ns_per": {32: {"layer": 10.0, "output_bytes": 0.5}},
        "held_out_error": {32: {"layer": 0.05, "network": 0.05}},
    }
    return Measured("toy", **(given | constants))


STEMMED = replace(
    THIS_CPU,
    ns_per={
        bits: dict(cells) | {"stem": {"layer": 9e3, "pixels": 200.0, "gemm_macs": 0.04}}
        for bits, cells in THIS_CPU.ns_per.items()  # type: ignore[attr-defined]
    },
)
"""A machine whose stems cost more than dense layers of as many pixels and few channels."""


def conv(
    inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1, size: int = 8, bits: int = 32
) -> LayerSpec:
    return LayerSpec(
        "conv",
        "conv",
        inputs,
        outputs,
        (kernel, kernel),
        groups=groups,
        in_hw=(size, size),
        out_hw=(size, size),
        bits=Bits(bits, bits),
    )


def linear(inputs: int, outputs: int, *, tokens: int = 1) -> LayerSpec:
    return LayerSpec("linear", "linear", inputs, outputs, in_hw=(tokens, 1), out_hw=(tokens, 1))


def latency(model: Any, *layers: LayerSpec) -> float:
    return float(model.layer_costs(LayerTable.of(layers)).latency_ms.sum())


LAYERS = st.builds(
    lambda inputs, outputs, kernel, groups, size, bits: conv(
        inputs * groups, outputs * groups, kernel, groups=groups, size=size, bits=bits
    ),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from((1, 3, 5)),
    st.sampled_from((1, 2, 8)),
    st.integers(1, 40),
    st.sampled_from((2, 4, 8, 16, 32)),
)


def test_a_layer_takes_the_sum_of_its_terms() -> None:
    layer = conv(16, 32, 3, size=8)
    costs = machine().layer_costs(LayerTable.of([layer]))
    assert costs.extra["kernel_ms"][0] == pytest.approx((100 + layer.macs) * 1e-6)
    assert costs.extra["between_ms"][0] == pytest.approx((10 + 0.5 * 32 * 64 * 4) * 1e-6)
    assert costs.latency_ms[0] == costs.extra["kernel_ms"][0] + costs.extra["between_ms"][0]


def test_macs_are_counted_in_blocks_of_sixteen_channels() -> None:
    padded = terms(LayerTable.of([conv(17, 33), conv(3, 1)]), bits=32)[:, TERMS.index("padded_macs")]
    assert padded.tolist() == [32 * 48 * 9 * 64, 3 * 16 * 9 * 64]
    gemm = terms(LayerTable.of([conv(17, 33), conv(3, 1)]), bits=8)[:, TERMS.index("gemm_macs")]
    assert gemm.tolist() == [17 * 48 * 9 * 64, 3 * 16 * 9 * 64]


def test_layers_are_told_apart_by_window_groups_and_tokens() -> None:
    layers = [conv(8, 8), conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, groups=2), linear(8, 8)]
    assert kinds(LayerTable.of(layers)).tolist() == ["dense", "pointwise", "depthwise", "grouped", "linear"]
    assert kinds(LayerTable.of([conv(3, 8), conv(3, 8, 1)])).tolist() == ["stem", "pointwise"]
    assert kinds(LayerTable.of([linear(8, 8, tokens=5)])).tolist() == ["pointwise"]


@given(
    LAYERS,
    st.sampled_from(("inputs", "outputs", "groups", "pixels", "bits")),
    st.sampled_from((THIS_CPU, STEMMED)),
)
@settings(max_examples=300, deadline=None)
def test_a_larger_layer_is_never_cheaper(layer: LayerSpec, what: str, model: Measured) -> None:
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    larger = {
        "inputs": replace(layer, in_channels=layer.in_channels + layer.groups),
        "outputs": replace(layer, out_channels=layer.out_channels + layer.groups),
        "groups": replace(
            layer,
            groups=layer.groups + 1,
            in_channels=layer.in_channels + inputs,
            out_channels=layer.out_channels + outputs,
        ),
        "pixels": replace(
            layer, in_hw=(layer.in_hw[0], layer.in_hw[1] + 1), out_hw=(layer.out_hw[0], layer.out_hw[1] + 1)
        ),
        "bits": replace(layer, bits=Bits(min(32, layer.bits.weight * 2), layer.bits.act)),
    }[what]
    # Groups of a network are removed whole: a depthwise layer never turns into one with two inputs per group.
    assume(not (what == "inputs" and layer.is_depthwise))
    assert latency(model, larger) >= latency(model, layer) * (1 - 1e-12)


def test_stems_have_constants_of_their_own_and_dense_layers_never_cost_less() -> None:
    ns_per = {32: {"stem": {"pixels": 50.0}, "dense": {"gemm_macs": 1.0}}}
    model = machine(ns_per=ns_per, between_ns_per={32: {}})
    assert latency(model, conv(3, 8)) == pytest.approx(50 * 64e-6)
    assert latency(model, conv(4, 8, size=1)) == pytest.approx(4 * 16 * 9e-6)  # above the stem's 50 ns
    slow = machine(ns_per={32: ns_per[32] | {"stem": {"pixels": 1e5}}}, between_ns_per={32: {}})
    assert latency(slow, conv(4, 8)) == latency(slow, conv(3, 8)) == pytest.approx(1e5 * 64e-6)
    without = machine(ns_per={32: {"dense": {"gemm_macs": 1.0}}}, between_ns_per={32: {}})
    assert latency(without, conv(3, 8)) == pytest.approx(3 * 16 * 9 * 64e-6)


@pytest.mark.parametrize("per_group", [1, 4, 24])
def test_a_layer_with_groups_is_never_cheaper_than_one_of_them_alone(per_group: int) -> None:
    for kernel in (1, 3):
        alone = conv(per_group, per_group, kernel)
        grouped = conv(2 * per_group, 2 * per_group, kernel, groups=2)
        assert latency(THIS_CPU, grouped) >= latency(THIS_CPU, alone)


def test_more_tokens_are_never_cheaper_than_one() -> None:
    times = [latency(THIS_CPU, linear(768, 768, tokens=tokens)) for tokens in (1, 2, 3, 16, 197)]
    assert times == sorted(times)


def test_bits_below_eight_run_as_eight_and_others_as_float() -> None:
    price = {bits: latency(THIS_CPU, conv(64, 64, size=28, bits=bits)) for bits in (2, 4, 8, 9, 16, 32)}
    assert price[2] == price[4] == price[8] < price[9] == price[16] == price[32]


def test_narrow_bits_fall_back_to_float_where_int8_is_slower() -> None:
    slow = {8: {"dense": {"padded_macs": 9.0}}, 32: {"dense": {"padded_macs": 1.0}}}
    both = {"between_ns_per": {8: {}, 32: {}}, "held_out_error": {8: {}, 32: {}}}
    model = machine(ns_per=slow, **both)
    assert latency(model, conv(16, 16, bits=8)) == latency(model, conv(16, 16, bits=32))


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_a_batch_is_never_cheaper_than_one_sample_nor_dearer_than_its_samples_alone(batch: int) -> None:
    layers = (conv(64, 64, size=7), conv(64, 64, groups=64, size=14), linear(512, 1000))
    one, many = latency(THIS_CPU, *layers), batch * latency(load_target("xeon-amx", batch=batch), *layers)
    assert one <= many * (1 + 1e-12)
    # Small layers stay in the cache at every batch here, so that only weights and dispatch are shared.
    assert many <= batch * one * (1 + 1e-12)


def test_plans_priced_together_cost_what_they_cost_alone() -> None:
    width = Width(terms=(("a", 1),))
    graph = LayerGraph(
        layers=(
            replace(conv(3, 64, size=16), name="a", in_width=Width(3), out_width=width),
            replace(conv(64, 64, groups=64, size=16), name="b", in_width=width, out_width=width),
            replace(linear(64, 10), name="c", in_width=width, out_width=Width(10)),
        ),
        groups=(ChannelGroup("a", 64, producers=("a", "b"), consumers=("b", "c")),),
        input_shape=(3, 16, 16),
    )
    check_cost_model(THIS_CPU, graph)
    sizes = np.arange(1, 65)
    together = THIS_CPU.price_plans(graph, sizes={"a": sizes})["latency_ms"]
    alone = [THIS_CPU(graph.with_channels({"a": int(size)}))["latency_ms"] for size in sizes]
    assert together == pytest.approx(alone, rel=1e-12)
    assert (np.diff(together) >= 0).all()


def test_utilisation_is_the_share_of_the_fastest_rate_and_memory_bound_the_larger_part() -> None:
    ns_per = {32: {"dense": {"padded_macs": 1.0}, "linear": {"weight_bytes": 2.0}}}
    model = machine(ns_per=ns_per, between_ns_per={32: {}})
    costs = model.layer_costs(LayerTable.of([conv(16, 16), linear(100, 100)]))
    assert costs.utilisation.tolist() == [1.0, pytest.approx(1 / 8)]
    assert costs.memory_bound.tolist() == [False, True]


def test_every_layer_that_was_not_measured_is_named_at_once() -> None:
    layers = [conv(8, 8), linear(8, 8), replace(conv(8, 8), transposed=True)]
    with pytest.raises(UnsupportedLayerError) as caught:
        machine().layer_costs(LayerTable.of(layers))
    assert "layers 1: linear layers were measured not at all" in str(caught.value)
    assert "layers 2: transposed" in str(caught.value)
    int8 = machine(ns_per={8: {"dense": {}}}, between_ns_per={8: {}}, held_out_error={8: {}})
    with pytest.raises(UnsupportedLayerError, match="up to 8 bits on toy; give them fewer bits"):
        int8.layer_costs(LayerTable.of([conv(8, 8)]))


def test_a_target_file_with_wrong_constants_names_all_of_them() -> None:
    constants = {
        "ns_per": {32: {"dense": {"flops": 1.0, "layer": -1.0}, "conv3d": {}}, 7: {}},
        "between_ns_per": {32: {}},
        "held_out_error": {32: {"layer": float("nan")}, 7: {}},
    }
    data = {
        "name": "bad",
        "model": "measured",
        "about": "bad",
        "constants": {name: {"value": value, "source": "none"} for name, value in constants.items()},
    }
    with pytest.raises(TargetError) as caught:
        parse_target(data, source="bad.yaml")
    for fault in (
        "no term 'flops'",
        "ns_per.32.dense.layer: must be a number >= 0, got -1.0",
        "no kind 'conv3d'",
        "bits must be 8, 16 or 32, got 7",
        "between_ns_per: must have the bits of ns_per",
        "held_out_error.32.layer: must be a number >= 0, got nan",
    ):
        assert fault in str(caught.value)
