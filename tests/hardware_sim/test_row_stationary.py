from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_devices import eyeriss
from numpy.typing import NDArray

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim import LayerCosts, LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.row_stationary import RowStationary
from autocompress.hardware_sim.target_file import load_target
from autocompress.testing import check_cost_model


def chip(batch: int = 1) -> RowStationary:
    model = load_target("eyeriss", batch=batch)
    assert isinstance(model, RowStationary)
    return model


def conv(inputs: int, outputs: int, *, kernel: int = 3, groups: int = 1, size: int = 14) -> LayerSpec:
    return LayerSpec(
        "conv",
        "conv",
        inputs,
        outputs,
        kernel=(kernel, kernel),
        groups=groups,
        in_hw=(size, size),
        out_hw=(size, size),
        bits=Bits(16, 16),
    )


def costs_of(model: RowStationary, *layers: LayerSpec) -> LayerCosts:
    return model.layer_costs(LayerTable.of(layers))


def energy(costs: LayerCosts) -> NDArray[np.float64]:
    return np.asarray(sum(costs.energy_pj.values()))


def measured(network: str, column: str) -> NDArray[np.float64]:
    return np.array([float(row[column]) for row in eyeriss(network)[1]])


def modelled(network: str) -> tuple[LayerCosts, int]:
    layers, _, batch = eyeriss(network)
    return costs_of(chip(batch), *layers), batch


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_network_latency_is_within_9_percent_of_the_chip(network: str) -> None:
    costs, batch = modelled(network)
    assert costs.latency_ms.sum() * batch == pytest.approx(measured(network, "total_ms").sum(), rel=0.09)


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_processing_time_of_every_layer_is_within_10_percent_of_the_chip(network: str) -> None:
    costs, batch = modelled(network)
    error = costs.extra["processing_ms"] * batch / measured(network, "processing_ms") - 1
    assert np.abs(error).max() < 0.11
    assert np.abs(error).mean() < 0.05


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_network_energy_without_dram_is_within_5_percent_of_the_chip(network: str) -> None:
    costs, batch = modelled(network)
    on_chip = sum(part.sum() for name, part in costs.energy_pj.items() if name != "dram")
    assert on_chip * batch * 1e-9 == pytest.approx(measured(network, "energy_mj").sum(), rel=0.05)


def test_buffer_accesses_of_vgg_are_within_5_percent_of_the_chip_where_the_buffer_is_the_bound() -> None:
    costs, batch = modelled("vgg16")
    mebibytes = costs.extra["buffer_words"] * batch * 2 / 2**20
    bound = costs.extra["buffer_cycles"] > costs.extra["array_cycles"]
    assert bound[:10].all()
    assert np.abs(mebibytes / measured("vgg16", "buffer_mb") - 1)[:10].max() < 0.05


def test_one_pass_computes_its_macs_plus_the_hand_over_of_partial_sums() -> None:
    # 4 sets of 3 x 14 elements on 4 filters; 4 channels x 3 weights, then 1.75 cycles to hand the sum on.
    assert costs_of(chip(), conv(4, 4)).extra["array_cycles"][0] == 14 * (4 * 3 + 1.75)


def test_a_map_taller_than_the_array_is_folded_into_strips() -> None:
    one, two = (costs_of(chip(), conv(4, 4, size=size)).extra["array_cycles"][0] for size in (14, 28))
    assert two == 4 * one  # twice the strips, twice the width


def test_groups_run_one_after_the_other() -> None:
    whole, grouped = costs_of(chip(), conv(4, 4)), costs_of(chip(), conv(16, 16, groups=4))
    assert grouped.extra["array_cycles"][0] == 4 * whole.extra["array_cycles"][0]


def test_sums_pass_the_buffer_twice_for_every_pass_over_the_channels() -> None:
    words = costs_of(chip(), conv(8, 4)).extra["buffer_words"][0]
    inputs = 8 * 16 * 16
    assert (
        words == 2 * 2 * (4 * 14 * 14) + inputs + inputs
    )  # two passes of 4 channels; read from DRAM, fed once


def test_energy_components_follow_the_published_ratios() -> None:
    model = chip()
    costs = costs_of(model, conv(8, 8))
    active = 8 * 8 * 9 * 196 * (1 - model.zero_share) * model.mac_pj
    assert costs.energy_pj["mac"][0] == pytest.approx(active)
    assert costs.energy_pj["scratch_pad"][0] == pytest.approx(4 * active)
    assert costs.energy_pj["buffer"][0] == pytest.approx(6 * model.mac_pj * costs.extra["buffer_words"][0])
    assert costs.energy_pj["dram"][0] == pytest.approx(200 * model.mac_pj * costs.extra["dram_words"][0])
    assert costs.energy_pj["clock"][0] == pytest.approx(costs.latency_ms[0] * model.clock_mw * 1e6)


def test_a_linear_layer_reads_every_weight_from_dram_at_least_once_per_four_images() -> None:
    layer = LayerSpec("fc", "linear", 4096, 1000, bits=Bits(16, 16))
    for batch, share in ((1, 1.0), (4, 1 / 4), (8, 1 / 4)):
        words = costs_of(chip(batch), layer).extra["dram_words"][0]
        assert words - 4096 * 1000 * share == pytest.approx((4096 + 1000) * 0.42 * 4 / 3)


@st.composite
def layers(draw: st.DrawFn) -> LayerSpec:
    groups, width = draw(st.sampled_from([1, 2, 7])), draw(st.integers(1, 40))
    kernel = draw(st.sampled_from([1, 3, 5, 11, 13]))
    return conv(groups * width, groups * width, kernel=kernel, groups=groups, size=draw(st.integers(1, 60)))


@settings(max_examples=60, deadline=None)
@given(base=layers(), batch=st.integers(1, 9))
def test_more_channels_or_pixels_never_cost_less(base: LayerSpec, batch: int) -> None:
    size = base.in_hw[0] + 1
    larger = [
        replace(base, in_channels=base.in_channels + base.groups),
        replace(base, out_channels=base.out_channels + base.groups),
        replace(base, in_hw=(size, size), out_hw=(size, size)),
    ]
    costs = costs_of(chip(batch), base, *larger)
    assert (costs.latency_ms[1:] >= costs.latency_ms[0] * (1 - 1e-12)).all()
    assert (energy(costs)[1:] >= energy(costs)[0] * (1 - 1e-12)).all()
    assert ((costs.utilisation > 0) & (costs.utilisation <= 1)).all()


@settings(max_examples=60, deadline=None)
@given(base=layers(), factor=st.floats(0.1, 1.0), batch=st.integers(1, 4))
def test_less_memory_or_bandwidth_never_costs_less(base: LayerSpec, factor: float, batch: int) -> None:
    model = chip(batch)
    before = costs_of(model, base)
    # bank_kib is not in the list: it divides the buffer, and less for activations is more for sums.
    for field in ("buffer_kib", "buffer_bytes_per_cycle", "dram_mb_per_s"):
        value = getattr(model, field) * factor
        smaller = replace(
            model, **{field: max(value, model.bank_kib + 1) if field == "buffer_kib" else value}
        )
        after = costs_of(smaller, base)
        assert after.latency_ms[0] >= before.latency_ms[0] * (1 - 1e-12), field
        assert energy(after)[0] >= energy(before)[0] * (1 - 1e-12), field


@settings(max_examples=20, deadline=None)
@given(base=layers(), batch=st.integers(1, 8))
def test_a_batch_costs_at_least_as_much_as_a_smaller_one(base: LayerSpec, batch: int) -> None:
    small, large = (costs_of(chip(n), base) for n in (batch, batch + 1))
    assert large.latency_ms[0] * (batch + 1) >= small.latency_ms[0] * batch * (1 - 1e-12)
    assert energy(large)[0] * (batch + 1) >= energy(small)[0] * batch * (1 - 1e-12)


def test_narrow_words_cost_what_16_bits_cost() -> None:
    costs = costs_of(chip(), *(replace(conv(8, 8), bits=Bits(b, b)) for b in (1, 8, 16)))
    assert len(set(costs.latency_ms.tolist())) == len(set(energy(costs).tolist())) == 1


def test_the_target_is_a_lawful_cost_model() -> None:
    width = Width(terms=(("a", 1),))
    graph = LayerGraph(
        layers=(
            replace(conv(3, 20), name="a", in_width=Width(3), out_width=width),
            replace(conv(20, 20, groups=20), name="dw", in_width=width, out_width=width),
            replace(conv(20, 10, kernel=1), name="b", in_width=width, out_width=Width(10)),
        ),
        groups=(ChannelGroup("a", 20, producers=("a",), consumers=("b",)),),
        input_shape=(3, 14, 14),
    )
    check_cost_model(chip(), graph)


def test_layers_the_array_cannot_run_are_reported_together() -> None:
    table = [
        conv(4, 4),
        replace(conv(4, 4), bits=Bits()),
        replace(conv(4, 4), bits=Bits(8, 17)),
        replace(conv(4, 4), transposed=True),
    ]
    with pytest.raises(UnsupportedLayerError) as caught:
        costs_of(chip(), *table)
    first, second = str(caught.value).splitlines()
    assert first.startswith("layers 1, 2: eyeriss computes integers of 1 to 16 bits")
    assert second.startswith("layers 3: a transposed convolution")


def test_impossible_constants_are_reported_together() -> None:
    with pytest.raises(
        ValueError, match=r"zero_share must be below 1, got 1; bank_kib must be below buffer_kib"
    ):
        replace(chip(), zero_share=1.0, bank_kib=100.0)
