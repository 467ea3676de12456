"""Binary CNN pipeline: its arithmetic, the published design, and the laws."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, LayerGraph, LayerSpec
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.binary_dataflow import (
    BinaryDataflow,
    balance,
    fold_batch_norm,
    titan_x_costs,
    xnor_popcount,
)
from autocompress.hardware_sim.energy import mac_pj, sram_pj_per_bit
from autocompress.hardware_sim.target_file import load_target

GOLDEN = Path(__file__).parents[1] / "golden" / "binary_cnn_virtex7.csv"
LINEARS = ((8192, 1024), (1024, 1024), (1024, 10))
BINARY = Bits(1, 1)


def golden() -> list[dict[str, int]]:
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    rows = csv.DictReader(lines)
    return [{key: int(value) for key, value in row.items() if key != "layer"} for row in rows]


def published_convs() -> tuple[LayerSpec, ...]:
    return tuple(
        LayerSpec(
            f"conv{i}",
            "conv",
            row["cin"],
            row["cout"],
            (3, 3),
            in_hw=(row["ofm"],) * 2,
            out_hw=(row["ofm"],) * 2,
            bits=BINARY,
        )
        for i, row in enumerate(golden())
    )


def published_network() -> LayerGraph:
    linears = (LayerSpec(f"fc{i}", "linear", a, b, bits=BINARY) for i, (a, b) in enumerate(LINEARS))
    return LayerGraph((*published_convs(), *linears))


def chain(widths: list[int], size: int, act_bits: int) -> LayerGraph:
    pairs = itertools.pairwise([3, *widths])
    layers = [
        LayerSpec(f"c{i}", "conv", a, b, (3, 3), in_hw=(size, size), out_hw=(size, size), bits=BINARY)
        for i, (a, b) in enumerate(pairs)
    ]
    return LayerGraph((replace(layers[0], bits=Bits(1, act_bits)), *layers[1:]))


@pytest.mark.parametrize("length", range(1, 13))
def test_popcounts_of_xnor_equal_dot_products_for_every_pair_of_vectors(length: int) -> None:
    inputs = np.array(list(itertools.product([False, True], repeat=length)))
    for weights in inputs[:: max(1, len(inputs) // 64)]:  # xnor is symmetric under flips: 64 weights suffice
        dots = np.where(inputs, 1, -1) @ np.where(weights, 1, -1)
        assert (2 * xnor_popcount(weights, inputs) - length == dots).all()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0]),
    st.integers(-40, 40),
    st.integers(-40, 40),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_folded_threshold_equals_batch_norm_and_sign(
    length: int, gamma: float, eighths_beta: int, eighths_mean: int, deviation: float
) -> None:
    # Eighths and powers of two are exact in binary, so ties fall where they should.
    beta, mean = eighths_beta / 8, eighths_mean / 8
    popcounts = np.arange(length + 1)[:, None]
    dots = 2 * popcounts - length
    expected = gamma * (dots - mean) / deviation + beta >= 0
    threshold = fold_batch_norm(
        np.array([gamma]),
        np.array([beta]),
        mean=np.array([mean]),
        deviation=np.array([deviation]),
        dot_length=length,
    )
    assert (threshold(popcounts) == expected).all()


def test_a_folded_layer_equals_the_float_layer_on_a_thousand_inputs() -> None:
    rng = np.random.default_rng(0)
    length, channels = 27, 16
    weights = rng.random((channels, length)) < 0.5
    inputs = rng.random((1000, 1, length)) < 0.5
    gamma, beta = rng.normal(size=channels), rng.normal(size=channels)
    mean, deviation = rng.normal(size=channels), rng.uniform(0.5, 2, channels)
    folded = fold_batch_norm(gamma, beta, mean=mean, deviation=deviation, dot_length=length)
    dots = np.where(inputs[:, 0], 1, -1) @ np.where(weights, 1, -1).T
    expected = gamma * (dots - mean) / deviation + beta >= 0
    assert (gamma < 0).any()
    assert (folded(xnor_popcount(weights, inputs)) == expected).all()


def test_the_published_lanes_give_a_balanced_pipeline() -> None:
    cycles = [row["macs"] / (row["UF"] * row["P"]) for row in golden()]
    assert cycles == [4096] + 5 * [12288] == [row["cycles"] for row in golden()]
    assert [layer.macs for layer in published_convs()] == [row["macs"] for row in golden()]


def test_the_measured_bottleneck_gives_6218_images_and_7_66_tera_operations_per_second() -> None:
    rate = 90e6 / max(row["cycles_measured"] for row in golden())
    assert rate == pytest.approx(6218, abs=1)
    operations = 2 * sum(layer.macs for layer in published_network().layers)
    assert operations * rate == pytest.approx(7.663e12, rel=2e-3)


def test_the_target_prices_the_published_network_within_1_percent_of_its_rate() -> None:
    cost = load_target("binary-virtex7-690t")(published_network())
    assert 1e3 / cost["latency_ms"] == pytest.approx(6218, rel=0.01)
    assert cost["energy_mj"] == pytest.approx(8.2 * 1e3 / 6218, rel=0.01)


def test_balancing_finds_the_published_interval_with_no_more_lanes() -> None:
    rows = golden()
    budget = sum(row["UF"] * row["P"] for row in rows)
    shapes = [(9 * row["cin"], row["cout"]) for row in rows]
    found = balance([row["macs"] for row in rows], shapes, budget)
    assert max(row["macs"] / (uf * p) for row, (uf, p) in zip(rows, found, strict=True)) == 12288
    assert found[1:] == [(row["UF"], row["P"]) for row in rows[1:]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([2, 3, 4, 6]), st.sampled_from([2, 4, 5])), min_size=4, max_size=4),
    st.lists(st.integers(10, 200), min_size=4, max_size=4),
    st.integers(4, 70),
)
def test_balancing_equals_brute_force_on_four_layers(
    shapes: list[tuple[int, int]], pixels: list[int], budget: int
) -> None:
    work = [dot * out * n for (dot, out), n in zip(shapes, pixels, strict=True)]
    choices = [
        [(u, p) for u in range(1, dot + 1) if dot % u == 0 for p in range(1, out + 1) if out % p == 0]
        for dot, out in shapes
    ]
    best = min(
        max(-(-w // (u * p)) for w, (u, p) in zip(work, design, strict=True))
        for design in itertools.product(*choices)
        if sum(u * p for u, p in design) <= budget
    )
    found = balance(work, shapes, budget)
    assert sum(u * p for u, p in found) <= budget
    assert max(-(-w // (u * p)) for w, (u, p) in zip(work, found, strict=True)) == best


def test_fewer_lanes_than_layers_is_an_error() -> None:
    with pytest.raises(InfeasibleBudgetError, match="4 layers need as many lanes, got 3"):
        balance([10] * 4, [(2, 2)] * 4, 3)


def test_what_a_gpu_takes_follows_from_the_published_ratios() -> None:
    ours = load_target("binary-virtex7-690t")(published_network())
    gpu = titan_x_costs(ours)
    small, large = gpu["small batch"], gpu["large batch"]
    assert 1e3 / small["latency_ms"] == pytest.approx(6218 / 8.3, rel=0.01)
    assert large["latency_ms"] == ours["latency_ms"]
    assert large["energy_mj"] == pytest.approx(9.5 * ours["energy_mj"])
    watts = [cost["energy_mj"] / cost["latency_ms"] for cost in (small, large)]
    assert watts == pytest.approx([8.2 * 75 / 8.3, 8.2 * 9.5], rel=1e-3)


def test_it_is_repeatable_and_gives_the_metrics_it_announces() -> None:
    model, graph = load_target("binary-virtex7-690t"), published_network()
    assert model(graph).totals == model(graph).totals
    assert set(model(graph).totals) == set(model.metrics)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=3, max_size=3), st.integers(3, 20), st.integers(2, 8))
def test_fewer_channels_bits_or_pixels_never_cost_more(widths: list[int], size: int, bits: int) -> None:
    model = BinaryDataflow("small", 90.0, 1000, 1.0, 7.0, 1.2, 8.0)
    large = model(chain(widths, size, bits))
    smaller = [chain([*widths[:i], widths[i] - 1, *widths[i + 1 :]], size, bits) for i in range(3)]
    smaller += [chain(widths, size - 1, bits), chain(widths, size, bits - 1)]
    for graph in smaller:
        cost = model(graph)
        assert all(cost[metric] <= large[metric] * (1 + 1e-12) for metric in model.metrics)


def test_a_smaller_device_is_never_faster_and_never_takes_more_lanes_than_it_has() -> None:
    graph, intervals = published_network(), []
    for luts in (100, 1_000, 10_000, 100_000, 10_000_000):
        model = BinaryDataflow("d", 90.0, luts, 1.0, 7.0, 1.0, 8.0)
        intervals.append(model(graph)["latency_ms"])
        lanes = model.layer_costs(LayerTable.of(graph.layers)).extra["lanes"]
        assert lanes.sum() <= model.lane_budget
    assert intervals == sorted(intervals, reverse=True)
    assert intervals[-1] == pytest.approx(32 * 32 / 90e3)  # one output position per cycle is the limit


def test_energy_is_power_times_interval_and_sums_over_layers() -> None:
    model, graph = load_target("binary-virtex7-690t"), published_network()
    cost = model(graph)
    assert cost["energy_mj"] == pytest.approx(8.2 * cost["latency_ms"])
    assert sum(layer["energy_mj"] for layer in cost.layers.values()) == pytest.approx(cost["energy_mj"])


def test_components_are_what_the_table_prices_and_the_rest_of_the_board() -> None:
    model, graph = load_target("binary-virtex7-690t"), published_network()
    table = LayerTable.of(graph.layers)
    energy = model.layer_costs(table).energy_pj
    assert energy["mac"].tolist() == pytest.approx((table.macs * mac_pj(1, table.act_bits)).tolist())
    assert energy["weight_bram"].tolist() == pytest.approx((table.macs * sram_pj_per_bit(2.25)).tolist())
    # The published design takes 8.2 W; the table's circuits would take an eighth of it.
    table_mj = sum(part.sum() for name, part in energy.items() if name != "rest") * 1e-9
    assert 0.05 < table_mj / model(graph)["energy_mj"] < 0.2


def test_plans_priced_together_cost_what_each_costs_alone() -> None:
    model, graph = load_target("binary-virtex7-690t"), chain([8, 8, 8], 12, 6)
    bits = {graph.layers[0].name: np.array([1, 3, 8])}
    many = model.price_plans(graph, act_bits=bits)
    alone = [model(chain([8, 8, 8], 12, b)) for b in (1, 3, 8)]
    for metric in model.metrics:
        assert many[metric].tolist() == pytest.approx([cost[metric] for cost in alone])


def test_every_layer_that_is_not_binary_is_named() -> None:
    layers = (replace(published_convs()[0], bits=Bits(2, 9)), replace(published_convs()[1], transposed=True))
    with pytest.raises(UnsupportedLayerError) as caught:
        load_target("binary-virtex7-690t")(LayerGraph(layers))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "layers conv0",
        "layers conv0",
        "layers conv1",
    ]


def test_the_recalled_constants_of_the_target_are_marked() -> None:
    text = (
        Path(__file__).parents[2] / "autocompress/hardware_sim/targets/binary-virtex7-690t.yaml"
    ).read_text()
    assert text.count("unverified:") == 5
