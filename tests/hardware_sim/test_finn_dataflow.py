"""FINN pipeline: its own figures, laws over random networks, and the exact folding search."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.finn_dataflow import LADDER, FinnDataflow
from autocompress.hardware_sim.finn_folding import (
    buildable,
    cheapest_at,
    fastest_within,
    matrix_luts,
    stage_costs,
    weight_bram18s,
)
from autocompress.hardware_sim.finn_latency import first_image_cycles
from autocompress.hardware_sim.target_file import TargetError, load_target, parse_target
from autocompress.testing import check_cost_model

GOLDEN = Path(__file__).parents[1] / "golden" / "finn_cnv.csv"
TARGETS = ("finn-zynq7020", "finn-zcu102", "finn-u250")
CNV_CONVS = ((3, 64, 32), (64, 64, 30), (64, 128, 14), (128, 128, 12), (128, 256, 5), (256, 256, 3))
CNV_LINEARS = ((256, 512), (512, 512), (512, 64))


def conv(name: str, inputs: int, outputs: int, size: int, kernel: int = 3, **other: object) -> LayerSpec:
    out = size - kernel + 1
    spec = LayerSpec(name, "conv", inputs, outputs, (kernel, kernel), in_hw=(size, size), out_hw=(out, out))
    return replace(spec, **other)


def cnv(bits: Bits) -> LayerGraph:
    """BNN-PYNQ's CNV network; its image has 8 bits."""
    convs = [conv(f"conv{i}", *shape, bits=bits) for i, shape in enumerate(CNV_CONVS)]
    convs[0] = replace(convs[0], bits=Bits(bits.weight, 8))
    linears = [LayerSpec(f"fc{i}", "linear", a, b, bits=bits) for i, (a, b) in enumerate(CNV_LINEARS)]
    return LayerGraph((*convs, *linears), input_shape=(3, 32, 32))


def golden(net: str) -> list[dict[str, str]]:
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return [row for row in csv.DictReader(lines) if row["net"] == net]


def columns(rows: list[dict[str, str]], *names: str) -> list[np.ndarray]:
    return [np.array([int(row[name]) for row in rows])[:, None] for name in names]


def chain(widths: list[int], kernels: list[int], size: int, bits: Bits) -> LayerGraph:
    """Convolutions one after another, all prunable but the last."""
    layers, groups, inputs, in_width = [], [], 3, Width(3)
    for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        name, last = f"conv{i}", i == len(widths) - 1
        out_width = Width(width) if last else Width(terms=((name, 1),))
        spec = conv(name, inputs, width, size, kernel, in_width=in_width, out_width=out_width, bits=bits)
        layers.append(spec)
        if not last:
            groups.append(ChannelGroup(name, width, (name,), (f"conv{i + 1}",)))
        inputs, in_width, size = width, out_width, size - kernel + 1
    return LayerGraph(tuple(layers), tuple(groups), input_shape=(3, size, size))


def tiny(brams: int, luts: int, **other: object) -> FinnDataflow:
    return FinnDataflow("tiny", 100.0, luts, brams, 100, 1.0, 1.0, 1.0, **other)


@pytest.mark.parametrize(("net", "bits"), [("cnvW1A1", Bits(1, 1)), ("cnvW2A2", Bits(2, 2))])
def test_stage_cycles_equal_finns_for_every_layer(net: str, bits: Bits) -> None:
    rows = golden(net)
    pe, simd, cycles = columns(rows, "PE", "SIMD", "cycles")
    costs = stage_costs(LayerTable.of(cnv(bits).layers), pe, simd, multipliers="lut")
    assert costs.cycles.tolist() == cycles.tolist()


@pytest.mark.parametrize(("net", "bits"), [("cnvW1A1", Bits(1, 1)), ("cnvW2A2", Bits(2, 2))])
def test_interval_at_300_mhz_is_within_5_percent_of_the_measured_one(net: str, bits: Bits) -> None:
    rows = golden(net)
    pe, simd = columns(rows, "PE", "SIMD")
    costs = stage_costs(LayerTable.of(cnv(bits).layers), pe, simd, multipliers="lut")
    measured = float(rows[0]["measured_us_per_image_whole_net"])
    assert costs.cycles.max() / 300 == pytest.approx(measured, rel=0.05)


def test_mobilenet_v1_on_zcu102_is_bounded_by_its_first_pointwise_layer() -> None:
    # Folding of Xilinx/finn-examples at 0650567, build/mobilenet-v1, ZCU102_folding_config.json:
    # (PE, SIMD) of stem, first depthwise and first pointwise layer; all later layers take fewer cycles.
    big = {"in_hw": (112, 112), "out_hw": (112, 112), "bits": Bits(4, 4)}
    layers = (
        LayerSpec("stem", "conv", 3, 32, (3, 3), (2, 2), 1, (224, 224), (112, 112), bits=Bits(8, 8)),
        LayerSpec("depthwise", "conv", 32, 32, (3, 3), groups=32, **big),
        LayerSpec("pointwise", "conv", 32, 64, **big),
    )
    pe, simd = np.array([[16], [16], [8]]), np.array([[3], [1], [8]])
    cycles = stage_costs(LayerTable.of(layers), pe, simd, multipliers="lut").cycles.ravel()
    assert cycles[2] == cycles.max() == 401408
    # The depthwise stage waits for its window unit, which first fills two rows and three pixels of 114.
    assert cycles[1] == 32 * 9 // 16 * 112 * 112 + (2 * 114 + 3) * 2


def test_luts_of_finns_unit_test_are_317() -> None:
    # Xilinx/finn tests/fpgadataflow/test_fpgadataflow_res_estimate.py: 4x4, PE = SIMD = 1, INT2. There the 16
    # weight words lie in LUTs, which take PE * SIMD * bits * ceil(16 / 64) more.
    one, two = np.array([[1]]), np.array([[2]])
    luts = matrix_luts((one, one), 4 * one, two, two, signed=one == 1, multipliers="lut")
    assert luts[0, 0] + 1 * 1 * 2 * 1 == 317


def test_cnv_w1a1_takes_the_20587_luts_and_147_block_rams_that_finn_estimates() -> None:
    # FINN evaluated on BNN-PYNQ's folding, matrix units only; it takes the image for signed.
    rows = golden("cnvW1A1")
    pe, simd, length, outputs = columns(rows, "PE", "SIMD", "MW", "MH")
    act_bits = np.array([8] + [1] * 8)[:, None]
    ones = np.ones_like(act_bits)
    luts = matrix_luts((pe, simd), length, ones, act_bits, signed=ones == 1, multipliers="lut")
    assert luts.sum() == 20587
    assert weight_bram18s(pe * simd, length * outputs // (pe * simd)).sum() == 147


@given(st.integers(1, 72), st.integers(1, 40000))
def test_block_rams_hold_the_weights_and_more_words_never_take_fewer(width: int, words: int) -> None:
    sizes = np.array([words, words + 1])
    brams = weight_bram18s(np.array([width, width]), sizes)
    assert brams[0] * 18 * 1024 >= width * words
    assert brams[1] >= brams[0]


def test_every_rung_of_the_ladder_is_at_least_as_parallel_as_the_one_before() -> None:
    assert (np.diff(LADDER, axis=0) >= 0).all()
    assert (np.diff(LADDER.prod(axis=1)) > 0).all()


@pytest.mark.parametrize("name", TARGETS)
def test_bundled_targets_keep_the_laws_of_a_cost_model(name: str) -> None:
    check_cost_model(load_target(name), chain([12, 20, 9], [3, 1, 3], 12, Bits(4, 4)))


@pytest.mark.parametrize("multipliers", ["lut", "dsp"])
def test_a_target_rate_keeps_the_laws_of_a_cost_model(multipliers: str) -> None:
    model = tiny(280, 53200, multipliers=multipliers, frames_per_s=2000.0)
    check_cost_model(model, chain([12, 20, 9], [3, 1, 3], 12, Bits(4, 4)))


shapes = st.tuples(
    st.lists(st.integers(2, 70), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, 3]), min_size=3, max_size=3),
    st.integers(8, 20),
    st.integers(1, 7),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2), st.sampled_from([None, 500.0, 20000.0]), st.integers(30, 300))
def test_fewer_channels_bits_or_pixels_never_cost_more(
    shape: tuple[list[int], list[int], int, int], which: int, rate: float | None, brams: int
) -> None:
    widths, kernels, size, bits = shape
    model = tiny(brams, 100 * brams, frames_per_s=rate)
    large = model(chain(widths, kernels, size, Bits(bits, bits)))
    thinner = [w - (i == which) for i, w in enumerate(widths)]
    for small in (
        chain(thinner, kernels, size, Bits(bits, bits)),
        chain(widths, kernels, size - 1, Bits(bits, bits)),
        chain(widths, kernels, size, Bits(max(1, bits - 1), bits)),
        chain(widths, kernels, size, Bits(bits, max(1, bits - 1))),
    ):
        cost = model(small)
        for metric in model.metrics:
            assert cost[metric] <= large[metric] * (1 + 1e-12), metric


def test_a_smaller_device_is_never_faster() -> None:
    graph = cnv(Bits(2, 2))
    intervals = [tiny(brams, 1200 * brams)(graph)["latency_ms"] for brams in (20, 60, 150, 250, 500, 2000)]
    assert intervals == sorted(intervals, reverse=True)
    assert intervals[0] > intervals[-1]


def test_energy_components_sum_to_the_total_and_resources_to_their_layers() -> None:
    model, graph = tiny(280, 53200, frames_per_s=500.0), cnv(Bits(2, 2))
    costs, cost = model.layer_costs(LayerTable.of(graph.layers)), model(graph)
    assert sum(part.sum() for part in costs.energy_pj.values()) * 1e-9 == pytest.approx(cost["energy_mj"])
    for name in ("luts", "brams", "dsps"):
        assert costs.extra[name].sum() == cost[name]


def test_the_interval_is_that_of_the_slowest_stage_whatever_the_batch() -> None:
    model, graph = load_target("finn-zcu102"), cnv(Bits(4, 4))
    stages = model.layer_costs(LayerTable.of(graph.layers)).latency_ms
    assert model(graph)["latency_ms"] == stages.max()
    assert load_target("finn-zcu102", batch=16)(graph)["latency_ms"] == stages.max()


# Single images, Xilinx/BNN-PYNQ at d39c1c7, notebooks/CNV-QNN_Cifar10.ipynb; 300 MHz as for the rates.
@pytest.mark.parametrize(
    ("net", "bits", "measured_us", "error"),
    [("cnvW1A1", Bits(1, 1), 527, 0.01), ("cnvW2A2", Bits(2, 2), 1622, 0.06)],
)
def test_one_image_takes_what_was_measured(net: str, bits: Bits, measured_us: float, error: float) -> None:
    (cycles,) = columns(golden(net), "cycles")
    microseconds = first_image_cycles(LayerTable.of(cnv(bits).layers), cycles.ravel()) / 300
    assert microseconds == pytest.approx(measured_us, rel=error)


def test_rows_of_two_convolutions_overlap_as_counted_by_hand() -> None:
    # Rows 0 to 5 of the first end at 10, 20, ..., 60. The second writes four rows: the first needs rows 0 to
    # 2, reads row 3 with them and starts at 40; the third reads row 5 and starts at 60; the fourth follows.
    table = LayerTable.of([conv("a", 3, 8, 8), conv("b", 8, 8, 6)])
    assert first_image_cycles(table, np.array([60, 16])) == 60 + 4 + 4
    # At 20 a row the second is the slower one: 40 + 4 * 20.
    assert first_image_cycles(table, np.array([60, 80])) == 120
    # A 2x2 pooling between: the second reads 3 rows, there at 20, 40 and 60, and writes one.
    pooled = LayerTable.of([conv("a", 3, 8, 8), conv("b", 8, 8, 3)])
    assert first_image_cycles(pooled, np.array([60, 16])) == 60 + 16
    # A 1x1 layer has no window unit: its rows follow at once.
    pointwise = LayerTable.of([conv("a", 3, 8, 8), conv("b", 8, 8, 6, 1)])
    assert first_image_cycles(pointwise, np.array([60, 30])) == 65


@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(st.integers(1, 5000), min_size=3, max_size=3))
def test_one_image_takes_at_least_the_slowest_stage_and_at_most_all_of_them(
    shape: tuple[list[int], list[int], int, int], cycles: list[int]
) -> None:
    widths, kernels, size, _ = shape
    table = LayerTable.of(chain(widths, kernels, size, Bits(4, 4)).layers)
    total = first_image_cycles(table, np.array(cycles))
    assert max(cycles) <= total * (1 + 1e-12)
    assert total <= sum(cycles) * (1 + 1e-12)
    linear = LayerTable.of([LayerSpec(f"fc{i}", "linear", 8, 8) for i in range(3)])
    assert first_image_cycles(linear, np.array(cycles)) == sum(cycles)


def test_one_image_through_a_folding_uses_its_stages() -> None:
    model, graph = load_target("finn-zcu102"), cnv(Bits(2, 2))
    folding, table = model.folding(graph), LayerTable.of(graph.layers)
    expected = first_image_cycles(table, folding.costs.cycles) / (model.clock_mhz * 1e3)
    assert model.single_image_ms(graph, folding) == pytest.approx(expected)
    stages = model.layer_costs(table)
    expected = first_image_cycles(table, stages.extra["cycles"]) / (model.clock_mhz * 1e3)
    assert model.single_image_ms(graph) == pytest.approx(expected)


def test_a_target_rate_is_reached_with_every_stage() -> None:
    model, graph = tiny(280, 53200, frames_per_s=500.0), cnv(Bits(2, 2))
    costs = model.layer_costs(LayerTable.of(graph.layers))
    assert costs.extra["cycles"].max() <= 100e6 / 500
    assert model(graph)["latency_ms"] == pytest.approx(1000 / 500)


def test_a_network_that_does_not_fit_costs_more_the_less_it_fits() -> None:
    graph = cnv(Bits(8, 8))
    models = [tiny(brams, 50000) for brams in (200, 100, 50)]
    shares = [m.layer_costs(LayerTable.of(graph.layers)).extra["device_share"][0] for m in models]
    assert shares == pytest.approx([shares[0], 2 * shares[0], 4 * shares[0]])
    assert shares[0] > 1
    assert models[2](graph)["latency_ms"] == pytest.approx(4 * models[0](graph)["latency_ms"])


def test_many_plans_priced_together_cost_what_each_costs_alone() -> None:
    graph, model = chain([24, 40, 30], [3, 3, 1], 14, Bits(4, 4)), load_target("finn-zynq7020")
    rng = np.random.default_rng(0)
    sizes = {group.name: rng.integers(1, group.size + 1, 30) for group in graph.groups}
    bits = {layer.name: rng.integers(1, 9, 30) for layer in graph.layers}
    many = model.price_plans(graph, sizes=sizes, weight_bits=bits)
    for p in range(30):
        one = graph.with_channels({name: int(size[p]) for name, size in sizes.items()})
        one = one.with_bits({name: Bits(int(value[p]), 4) for name, value in bits.items()})
        cost = model(one)
        assert {metric: values[p] for metric, values in many.items()} == pytest.approx(dict(cost.totals))


def small_table() -> LayerTable:
    layers = (
        conv("a", 2, 6, 9, bits=Bits(5, 4)),
        conv("b", 6, 6, 7, groups=6, bits=Bits(3, 4)),
        LayerSpec("c", "linear", 30, 8, bits=Bits(5, 4)),
    )
    return LayerTable.of(layers)


def every_design(table: LayerTable) -> list[tuple[int, np.ndarray]]:
    """(interval, resources) of every combination of legal foldings."""
    stages = []
    for i in range(len(table)):
        row = LayerTable(**{name: column[i : i + 1] for name, column in vars(table).items()})
        outputs, inputs = int(row.out_channels[0]), int(row.in_channels[0] // row.groups[0])
        foldings = [
            (pe, simd)
            for pe, simd in itertools.product(range(1, outputs + 1), range(1, inputs + 1))
            if outputs % pe == 0 and inputs % simd == 0
        ]
        pe, simd = (np.array([list(column)]) for column in zip(*foldings, strict=True))
        c = stage_costs(row, pe, simd, multipliers="lut")
        stages.append(list(zip(c.cycles[0], np.stack([c.luts[0], c.brams[0], c.dsps[0]], 1), strict=True)))
    return [
        (max(int(cycles) for cycles, _ in design), sum(use for _, use in design))
        for design in itertools.product(*stages)
    ]


@pytest.mark.parametrize("capacity", [(1500, 5, 0), (1700, 6, 0), (2600, 7, 0), (4000, 9, 0), (9000, 40, 0)])
def test_the_fastest_folding_equals_brute_force(capacity: tuple[int, int, int]) -> None:
    table = small_table()
    fitting = [interval for interval, use in every_design(table) if (use <= capacity).all()]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match="does not fit"):
            fastest_within(table, capacity, multipliers="lut")
        return
    assert fastest_within(table, capacity, multipliers="lut").interval_cycles == min(fitting)


@pytest.mark.parametrize("interval", [500, 900, 2000, 6000])
def test_the_cheapest_folding_at_a_rate_equals_brute_force(interval: int) -> None:
    table, capacity = small_table(), np.array([9000, 40, 1])
    shares = [
        (use / capacity).sum()
        for reached, use in every_design(table)
        if reached <= interval and (use <= capacity).all()
    ]
    folding = cheapest_at(table, interval, capacity, multipliers="lut")
    costs = folding.costs
    used = np.array([costs.luts.sum(), costs.brams.sum(), costs.dsps.sum()])
    assert folding.interval_cycles <= interval
    assert (used / capacity).sum() == pytest.approx(min(shares))


def test_a_rate_nothing_reaches_is_an_error_that_names_the_best_one() -> None:
    fastest = fastest_within(small_table(), (9000, 40, 0), multipliers="lut").interval_cycles
    with pytest.raises(InfeasibleBudgetError, match=f"shortest interval that fits is {fastest:,}"):
        cheapest_at(small_table(), fastest - 1, (9000, 40, 0), multipliers="lut")


@pytest.mark.parametrize(
    ("target", "bits"), itertools.product(TARGETS[1:], (Bits(1, 1), Bits(4, 4), Bits(8, 8)))
)
def test_the_price_is_within_a_factor_of_one_and_a_half_of_the_exact_folding(target: str, bits: Bits) -> None:
    model, graph = load_target(target), cnv(bits)
    exact = model.folding(graph).interval_cycles / (model.clock_mhz * 1e3)
    assert 1 / 1.51 <= model(graph)["latency_ms"] / exact <= 1.51


def test_the_folding_file_divides_every_layer_and_reaches_the_interval() -> None:
    model = load_target("finn-zcu102")
    layers = (
        conv("stem", 3, 24, 18, bits=Bits(4, 8)),
        conv("depthwise", 24, 24, 16, groups=24, bits=Bits(4, 4)),
        conv("point", 24, 40, 14, 1, bits=Bits(4, 4)),
        LayerSpec("head", "linear", 40, 10, bits=Bits(4, 4)),
    )
    graph = LayerGraph(layers)
    folding, config = model.folding(graph), model.folding_config(graph)
    assert list(config) == [
        "Defaults",
        *("ConvolutionInputGenerator_rtl_0", "MVAU_hls_0", "ConvolutionInputGenerator_rtl_1", "VVAU_hls_0"),
        *("MVAU_hls_1", "MVAU_hls_2"),
    ]
    assert all(layer.out_channels % pe == 0 for layer, pe in zip(layers, folding.pe, strict=True))
    assert all(
        layer.in_channels // layer.groups % simd == 0
        for layer, simd in zip(layers, folding.simd, strict=True)
    )
    assert config["ConvolutionInputGenerator_rtl_1"]["SIMD"] == config["VVAU_hls_0"]["PE"] == folding.pe[1]


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.parametrize("bits", [Bits(2, 2), Bits(8, 8)])
def test_every_stage_of_a_folding_keeps_finns_rules(target: str, bits: Bits) -> None:
    # Xilinx/finn: calc_wmem (divisors), MVAU_hls.defines (SIMD >= MW / 1024), get_ap_int_max_w (8191 bits),
    # StreamingDataWidthConverter (whole words of both widths make up an image).
    graph = cnv(bits)
    big = LayerSpec("big", "linear", 64, 2880, bits=bits)
    layers = (*graph.layers, big, LayerSpec("last", "linear", 2880, 10, bits=bits))
    folding = load_target(target).folding(LayerGraph(layers))
    for layer, pe, simd in zip(layers, folding.pe, folding.simd, strict=True):
        products = layer.in_channels * layer.kernel[0] * layer.kernel[1]
        assert layer.out_channels % pe == 0
        assert layer.in_channels % simd == 0
        assert simd >= products / 1024
        assert pe * simd * layer.bits.weight <= 8191
        assert max(simd * layer.bits.act, pe * 32) <= 8191 or pe * 32 > 8191 >= pe * 24
    for before, after, pe, simd in zip(layers, layers[1:], folding.pe, folding.simd[1:], strict=False):
        values = before.out_channels * before.out_hw[0] * before.out_hw[1]
        assert values % math.lcm(pe, simd) == 0
        assert after.in_channels % before.out_channels == 0


def test_foldings_finn_cannot_build_are_told_apart() -> None:
    wide = LayerSpec("wide", "linear", 4096, 512, bits=Bits(8, 8))
    one = np.ones(1, dtype=np.int64)
    table = LayerTable.of([wide])

    def allowed(pe: int, simd: int) -> bool:
        return bool(buildable(table, pe * one[None], simd * one[None])[0, 0])

    assert allowed(1, 4)
    assert not allowed(1, 2)  # 2,048 folds of the inputs
    assert allowed(8, 64)
    assert not allowed(16, 64)  # 8,192 bits of weights a cycle
    assert not allowed(3, 64)  # 512 outputs in threes
    assert not allowed(1, 12)


def test_a_layer_without_any_folding_is_named() -> None:
    prime = LayerSpec("prime", "linear", 25013, 10, bits=Bits(8, 8))
    with pytest.raises(UnsupportedLayerError, match="layers prime: FINN has no folding"):
        load_target("finn-u250").folding(LayerGraph((prime,)))


def test_strided_pointwise_layers_become_downsamplers_of_square_maps() -> None:
    model = load_target("finn-zcu102")
    point = LayerSpec("p", "conv", 8, 16, (1, 1), (2, 2), in_hw=(8, 8), out_hw=(4, 4), bits=Bits(4, 4))
    config = model.folding_config(LayerGraph((point,)))
    assert config["DownSampler_hls_0"] == {"SIMD": config["MVAU_hls_0"]["SIMD"]}
    skewed = replace(point, in_hw=(8, 6), out_hw=(4, 3))
    with pytest.raises(UnsupportedLayerError, match="layers p: 1x1 convolutions with strides"):
        model(LayerGraph((skewed,)))


def test_every_layer_finn_cannot_build_is_named_at_once() -> None:
    layers = (
        conv("float", 3, 8, 9),
        conv("grouped", 8, 8, 7, groups=2, bits=Bits(4, 4)),
        conv("transposed", 8, 8, 5, transposed=True, bits=Bits(4, 9)),
    )
    with pytest.raises(UnsupportedLayerError) as caught:
        load_target("finn-zcu102")(LayerGraph(layers))
    text = str(caught.value)
    for part in (
        "float: weights",
        "float, transposed: activations",
        "grouped: grouped",
        "transposed: transposed",
    ):
        assert f"layers {part}" in text


def test_wrong_constants_are_all_named() -> None:
    data = {"name": "x", "model": "finn_dataflow", "about": "x"}
    constants = {"clock_mhz": 100, "device_luts": 1, "device_bram18s": 1, "device_dsps": 1}
    constants |= {"usable_lut_share": 1.5, "multipliers": "luts"}
    data["constants"] = {name: {"value": value, "source": "test"} for name, value in constants.items()}
    with pytest.raises(TargetError, match=r"multipliers must be lut or dsp.*usable_lut_share must be in"):
        parse_target(data, source="file")
