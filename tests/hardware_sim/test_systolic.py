from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.hardware_sim.energy import mac_pj, sram_pj_per_bit
from autocompress.hardware_sim.model import LayerCosts, UnsupportedLayerError
from autocompress.hardware_sim.systolic import DATAFLOWS, Systolic
from autocompress.hardware_sim.table import LayerTable
from autocompress.hardware_sim.target_file import TargetError, load_target, parse_target
from autocompress.testing import check_cost_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
INT8 = Bits(8, 8)
TARGETS = ("systolic-16x16", "systolic-32x32", "edge-tpu-like")
MACHINE = Systolic(
    name="test",
    rows=16,
    columns=16,
    dataflow="ws",
    clock_mhz=500.0,
    ifmap_sram_kib=64.0,
    filter_sram_kib=64.0,
    ofmap_sram_kib=64.0,
    dram_gb_per_s=12.8,
    native_bits=8,
    sram_pj_per_bit=0.4,
    dram_pj_per_bit=20.0,
)


def golden(file: str) -> list[dict[str, str]]:
    lines = (GOLDEN / file).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def conv(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    size: int = 8,
    bits: Bits = INT8,
) -> LayerSpec:
    out = -(-size // stride)
    return LayerSpec(
        "conv",
        "conv",
        in_channels,
        out_channels,
        (kernel, kernel),
        (stride, stride),
        groups,
        (size, size),
        (out, out),
        bits=bits,
    )


def price(machine: Systolic, *layers: LayerSpec) -> LayerCosts:
    return machine.layer_costs(LayerTable.of(layers))


def energy(costs: LayerCosts) -> np.ndarray:
    return np.asarray(sum(costs.energy_pj.values()))


def scalesim_layer(row: dict[str, str]) -> LayerSpec:
    size, kernel, stride = int(row["h_in"]), int(row["kernel"]), int(row["stride"])
    out = (size + 2 * int(row["pad"]) - kernel) // stride + 1
    layer = conv(
        int(row["in_channels"]),
        int(row["out_channels"]),
        kernel=kernel,
        stride=stride,
        groups=int(row["groups"]),
        size=size,
    )
    return replace(layer, out_hw=(out, out))


def scalesim_machine(row: dict[str, str]) -> Systolic:
    # The output buffer is large because SCALE-Sim does not cut a layer into blocks.
    rows, columns = int(row["array_rows"]), int(row["array_columns"])
    return replace(MACHINE, rows=rows, columns=columns, dataflow=row["dataflow"], ofmap_sram_kib=1e6)


def test_compute_cycles_equal_scale_sim_on_every_simulated_layer() -> None:
    rows = [row for row in golden("scalesim.csv") if row["simulated_cycles"]]
    assert {row["dataflow"] for row in rows} == set(DATAFLOWS)
    assert len(rows) == 85
    for row in rows:
        costs = price(scalesim_machine(row), scalesim_layer(row))
        assert costs.extra["compute_cycles"][0] == int(row["simulated_cycles"]), row


def test_compute_cycles_equal_the_published_closed_form_on_whole_networks() -> None:
    for row in golden("scalesim.csv"):
        layer = scalesim_layer(row)
        assert layer.macs == int(row["macs"]), row
        cycles = price(scalesim_machine(row), layer).extra["compute_cycles"][0]
        assert cycles == int(row["closed_form_cycles"]), row


def test_array_side_accesses_equal_scale_sim_but_for_repeated_output_writes() -> None:
    for row in golden("scalesim.csv"):
        if not row["simulated_cycles"]:
            continue
        extra = price(scalesim_machine(row), scalesim_layer(row)).extra
        assert extra["sram_ifmap_reads"][0] == int(row["sram_ifmap_reads"]), row
        assert extra["sram_filter_reads"][0] == int(row["sram_filter_reads"]), row
        outputs = int(row["gemm_m"]) * int(row["gemm_n"]) * int(row["repeat"])
        if row["dataflow"] == "os":  # SCALE-Sim writes some outputs more than once
            assert extra["sram_sum_writes"][0] == outputs <= int(row["sram_ofmap_writes"])
        else:
            assert extra["sram_sum_writes"][0] == int(row["sram_ofmap_writes"]), row


def test_compute_cycles_equal_rtl_simulation_of_rectangular_arrays() -> None:
    rows = [row for row in golden("rtl_validation.csv") if row["unit"] == "ws"]
    assert len(rows) == 6
    for row in rows:
        machine = replace(MACHINE, rows=int(row["rows_or_dk"]), columns=int(row["columns"]))
        m, k, n = (np.array([int(row[key])]) for key in ("m", "k", "n"))
        # The RTL run counts the cycle of the last output, SCALE-Sim's figure does not.
        assert machine.compute_cycles(m, k, n)[0] + 1 == int(row["cycles"]), row


def register_level_cycles(machine: Systolic, stationary: np.ndarray, streamed: np.ndarray) -> int:
    """Steps every register of the array: cycles until the last sum of all folds has left; checks the sums.

    Args:
        stationary: shape (Sr, Sc), held in the cells.
        streamed: shape (T, Sr), entering skewed from the left; sums move down.
    """
    rows, columns = machine.rows, machine.columns
    length = len(streamed)
    cycles = 0
    result = np.zeros((length, stationary.shape[1]), dtype=np.int64)
    for top in range(0, stationary.shape[0], rows):
        for left in range(0, stationary.shape[1], columns):
            tile = stationary[top : top + rows, left : left + columns]
            cells = np.zeros((rows, columns), dtype=np.int64)
            cells[: tile.shape[0], : tile.shape[1]] = tile
            cycles += rows  # the tile is shifted in, one row per cycle
            moving = np.zeros((rows, columns), dtype=np.int64)
            sums = np.zeros((rows, columns), dtype=np.int64)
            for step in range(length + rows + columns - 2):
                entering = np.zeros(rows, dtype=np.int64)
                for row in range(tile.shape[0]):
                    if 0 <= step - row < length:
                        entering[row] = streamed[step - row, top + row]
                moving = np.column_stack([entering, moving[:, :-1]])
                sums = np.vstack([np.zeros((1, columns), dtype=np.int64), sums[:-1]]) + cells * moving
                cycles += 1
                for column in range(tile.shape[1]):
                    index = step - (rows - 1) - column
                    if 0 <= index < length:
                        result[index, left + column] += sums[-1, column]
    np.testing.assert_array_equal(result, streamed @ stationary)
    return cycles


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 5), st.sampled_from(["ws", "is"]))
def test_compute_cycles_equal_stepping_every_register(
    shape: tuple[int, int, int, int, int], flow: str
) -> None:
    rows, columns, m, k, n = shape
    machine = replace(MACHINE, rows=rows, columns=columns, dataflow=flow)
    rng = np.random.default_rng(m + 10 * k + 100 * n)
    acts, weights = rng.integers(-8, 8, (m, k)), rng.integers(-8, 8, (k, n))
    stationary, streamed = (weights, acts) if flow == "ws" else (acts.T, weights.T)
    stepped = register_level_cycles(machine, stationary, streamed)
    assert machine.compute_cycles(*(np.array([v]) for v in (m, k, n)))[0] + 1 == stepped


def test_a_grouped_layer_costs_as_many_products_as_it_has_groups() -> None:
    single, depthwise = conv(1, 1, kernel=3), conv(24, 24, kernel=3, groups=24)
    one, all_groups = price(MACHINE, single), price(MACHINE, depthwise)
    for name in ("compute_cycles", "dram_read_bits", "dram_write_bits", "sram_bits"):
        assert all_groups.extra[name][0] == 24 * one.extra[name][0]


def test_what_fits_its_buffer_moves_through_dram_once() -> None:
    layer = conv(64, 96, kernel=3, bits=Bits(4, 6))
    for flow in DATAFLOWS:
        extra = price(replace(MACHINE, dataflow=flow), layer).extra
        assert extra["refill_cycles"][0] == 0
        assert extra["dram_read_bits"][0] == 64 * 64 * 6 + 9 * 64 * 96 * 4
        assert extra["dram_write_bits"][0] == 96 * 64 * 6


@pytest.mark.parametrize(
    ("flow", "ifmap_passes", "filter_passes"), [("ws", 4, 8), ("os", 4, 64), ("is", 1, 64)]
)
def test_what_does_not_fit_is_loaded_again_for_every_pass(
    flow: str, ifmap_passes: int, filter_passes: int
) -> None:
    # M = 1024, K = 128, N = 64 on a 16x16 array; half of 16 KiB holds 128 rows of 16 sums:
    # ws cuts M into 1024 / 128 = 8 blocks, is keeps all 64 sums of a column of folds in one block.
    layer = conv(128, 64, size=32)
    small = replace(MACHINE, dataflow=flow, ifmap_sram_kib=1.0, filter_sram_kib=1.0, ofmap_sram_kib=16.0)
    extra = price(small, layer).extra
    loads = ifmap_passes * 1024 * 128 + filter_passes * 128 * 64
    assert extra["dram_read_bits"][0] == 8 * loads
    assert extra["dram_write_bits"][0] == 8 * 1024 * 64


def test_every_further_block_fills_and_drains_the_array_once_more_per_fold() -> None:
    extra = price(replace(MACHINE, ofmap_sram_kib=16.0), conv(128, 64, size=32)).extra
    blocks, folds, fill_and_drain = 8, (128 // 16) * (64 // 16), 2 * 16 + 16 - 2
    assert extra["refill_cycles"][0] == (blocks - 1) * folds * fill_and_drain


def test_latency_is_compute_when_bandwidth_is_plenty_and_traffic_when_it_is_scarce() -> None:
    layer = conv(64, 64, kernel=3, size=16)
    fast = price(replace(MACHINE, dram_gb_per_s=1e9), layer)
    cycles = fast.extra["compute_cycles"] + fast.extra["refill_cycles"]
    np.testing.assert_allclose(fast.latency_ms * 500e3, cycles, rtol=1e-6)
    assert not fast.memory_bound[0]
    slow = price(replace(MACHINE, dram_gb_per_s=1e-3), layer)
    bits = slow.extra["dram_read_bits"] + slow.extra["dram_write_bits"]
    np.testing.assert_allclose(slow.latency_ms * 1e-3, bits / 8 / 1e6, rtol=1e-12)
    assert slow.memory_bound[0]


def test_the_first_tile_is_waited_for() -> None:
    costs = price(MACHINE, conv(64, 64, kernel=3, size=16))
    tile_bits, bits_per_cycle = 16 * 16 * 8, 12.8e9 * 8 / 500e6
    assert costs.extra["stall_cycles"][0] == pytest.approx(tile_bits / bits_per_cycle)


def test_narrow_bits_save_traffic_but_no_cycles() -> None:
    wide, narrow = conv(64, 64, kernel=3), conv(64, 64, kernel=3, bits=Bits(4, 4))
    costs = price(replace(MACHINE, dram_gb_per_s=0.1), wide, narrow)
    assert costs.extra["compute_cycles"][0] == costs.extra["compute_cycles"][1]
    assert costs.extra["dram_read_bits"][1] == costs.extra["dram_read_bits"][0] / 2
    assert costs.latency_ms[1] == pytest.approx(costs.latency_ms[0] / 2)


def test_energy_is_counts_times_constants() -> None:
    costs = price(MACHINE, conv(64, 96, kernel=3, bits=Bits(4, 6)))
    macs = 64 * 96 * 9 * 64
    traffic = costs.extra["dram_read_bits"] + costs.extra["dram_write_bits"]
    assert costs.energy_pj["mac"][0] == pytest.approx(macs * mac_pj(4, 6))
    assert costs.energy_pj["dram"][0] == pytest.approx(20 * traffic[0])
    assert costs.energy_pj["sram"][0] == pytest.approx(0.4 * costs.extra["sram_bits"][0])


def test_sram_traffic_is_array_reads_sums_fills_and_drain() -> None:
    # ws, M = 64, K = 576, N = 96: 36 row folds and 6 column folds, one block, all fits.
    extra = price(MACHINE, conv(64, 96, kernel=3, bits=Bits(4, 6))).extra
    to_array = 6 * (64 * 576) * 6 + 4 * (576 * 96)
    sums = 32 * 64 * 96 * (36 + 35)
    fills_and_drain = extra["dram_read_bits"][0] + extra["dram_write_bits"][0]
    assert extra["sram_bits"][0] == to_array + sums + fills_and_drain


def test_utilisation_is_the_share_of_the_peak_rate() -> None:
    costs = price(MACHINE, conv(64, 64, kernel=3, size=16))
    cycles = costs.latency_ms[0] * 500e3
    assert costs.utilisation[0] == pytest.approx(64 * 64 * 9 * 256 / (cycles * 256))
    single_cell = replace(MACHINE, rows=1, columns=1, dataflow="os", dram_gb_per_s=1e6)
    assert price(single_cell, conv(4, 4)).utilisation[0] == 1.0  # 1,023 counted cycles, 1,024 multiplications


LAYERS = st.builds(
    lambda inputs, outputs, groups, kernel, stride, size, weight, act: conv(
        inputs * groups,
        outputs * groups,
        kernel=kernel,
        stride=stride,
        groups=groups,
        size=size,
        bits=Bits(weight, act),
    ),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([1, 1, 2, 5]),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 8),
)
MACHINES = st.builds(
    lambda rows, columns, flow, ifmap, filters, ofmap, bandwidth: replace(
        MACHINE,
        rows=rows,
        columns=columns,
        dataflow=flow,
        ifmap_sram_kib=ifmap,
        filter_sram_kib=filters,
        ofmap_sram_kib=ofmap,
        dram_gb_per_s=bandwidth,
    ),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DATAFLOWS),
    st.floats(0.1, 64),
    st.floats(0.1, 64),
    st.floats(1, 64),
    st.floats(0.1, 100),
)


def larger(layer: LayerSpec, what: str, by: int) -> LayerSpec:
    if what == "inputs":
        return replace(layer, in_channels=layer.in_channels + by * layer.groups)
    if what == "outputs":
        return replace(layer, out_channels=layer.out_channels + by * layer.groups)
    if what == "pixels":
        size = layer.in_hw[0] + by
        out = -(-size // layer.stride[0])
        return replace(layer, in_hw=(size, size), out_hw=(out, out))
    if what == "kernel":
        return replace(layer, kernel=(layer.kernel[0] + by, layer.kernel[1] + by))
    if what == "groups":
        per_group = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        groups = layer.groups + by
        return replace(
            layer, groups=groups, in_channels=per_group[0] * groups, out_channels=per_group[1] * groups
        )
    weight, act = layer.bits.weight, layer.bits.act
    grown = Bits(min(8, weight + by), act) if what == "weight bits" else Bits(weight, min(8, act + by))
    return replace(layer, bits=grown)


GROWTHS = ("inputs", "outputs", "pixels", "kernel", "groups", "weight bits", "act bits")


@settings(max_examples=300, deadline=None)
@given(MACHINES, LAYERS, st.sampled_from(GROWTHS), st.integers(1, 20), st.integers(1, 5))
def test_a_larger_layer_is_never_cheaper(
    machine: Systolic, layer: LayerSpec, what: str, by: int, batch: int
) -> None:
    costs = price(replace(machine, batch=batch), layer, larger(layer, what, by))
    assert costs.latency_ms[1] >= costs.latency_ms[0] * (1 - 1e-12)
    for component in costs.energy_pj.values():
        assert component[1] >= component[0] * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(
    MACHINES,
    LAYERS,
    st.sampled_from(["ifmap_sram_kib", "filter_sram_kib", "ofmap_sram_kib", "dram_gb_per_s"]),
    st.floats(1.0, 20.0),
)
def test_less_memory_or_bandwidth_is_never_cheaper(
    machine: Systolic, layer: LayerSpec, field: str, factor: float
) -> None:
    base, more = (
        price(machine, layer),
        price(replace(machine, **{field: getattr(machine, field) * factor}), layer),
    )
    assert more.latency_ms[0] <= base.latency_ms[0] * (1 + 1e-12)
    assert energy(more)[0] <= energy(base)[0] * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(MACHINES, LAYERS, st.integers(1, 7))
def test_a_larger_batch_takes_longer_in_total_and_the_same_macs_per_sample(
    machine: Systolic, layer: LayerSpec, batch: int
) -> None:
    small, large = (
        price(replace(machine, batch=batch), layer),
        price(replace(machine, batch=batch + 1), layer),
    )
    assert large.latency_ms[0] * (batch + 1) >= small.latency_ms[0] * batch * (1 - 1e-12)
    assert large.energy_pj["mac"][0] == small.energy_pj["mac"][0]


@settings(max_examples=50, deadline=None)
@given(MACHINES, st.lists(LAYERS, min_size=1, max_size=5))
def test_a_network_costs_the_sum_of_its_layers_and_components(
    machine: Systolic, layers: list[LayerSpec]
) -> None:
    named = tuple(replace(layer, name=f"l{i}") for i, layer in enumerate(layers))
    cost, costs = machine(LayerGraph(named)), price(machine, *named)
    assert cost["latency_ms"] == pytest.approx(sum(costs.latency_ms))
    assert cost["energy_mj"] == pytest.approx(1e-9 * sum(energy(costs)))
    assert cost["energy_mj"] == pytest.approx(sum(parts["energy_mj"] for parts in cost.layers.values()))
    assert np.all((costs.utilisation > 0) & (costs.utilisation <= 1))


def two_layer_graph() -> LayerGraph:
    width = Width(terms=(("a", 1),))
    first = replace(conv(3, 32, kernel=3), name="a", in_width=Width(3), out_width=width)
    last = replace(conv(32, 10), name="b", in_width=width, out_width=Width(10))
    return LayerGraph((first, last), (ChannelGroup("a", 32, ("a",), ("b",)),), input_shape=(3, 8, 8))


@pytest.mark.parametrize("target", TARGETS)
def test_plans_priced_together_cost_what_they_cost_alone(target: str) -> None:
    machine, graph = load_target(target, batch=3), two_layer_graph()
    sizes, bits = np.array([1, 7, 32]), np.array([2, 8, 5])
    together = machine.price_plans(graph, sizes={"a": sizes}, weight_bits={"b": bits})
    for index, (size, weight) in enumerate(zip(sizes, bits, strict=True)):
        alone = machine(graph.with_channels({"a": int(size)}).with_bits({"b": Bits(int(weight), 8)}))
        for metric, values in together.items():
            assert values[index] == pytest.approx(alone[metric], rel=1e-12)


def test_every_layer_the_array_cannot_run_is_named_at_once() -> None:
    layers = [
        conv(8, 8, bits=Bits(16, 8)),
        conv(8, 8),
        conv(8, 8, bits=Bits()),
        replace(conv(8, 8), transposed=True),
    ]
    with pytest.raises(UnsupportedLayerError) as caught:
        price(MACHINE, *layers)
    bits, transposed = str(caught.value).splitlines()
    assert bits.startswith("layers 0, 2: ")
    assert "1 to 8 bits" in bits
    assert transposed.startswith("layers 3: ")


def test_a_wrong_dataflow_and_a_tiny_output_buffer_are_reported_together() -> None:
    with pytest.raises(ValueError, match="dataflow must be one of ws, os, is, got 'rs'") as caught:
        replace(MACHINE, dataflow="rs", ofmap_sram_kib=0.1)
    assert "ofmap_sram_kib must be >= 0.125, got 0.1" in str(caught.value)


def test_a_target_file_with_a_wrong_dataflow_is_refused() -> None:
    names = {field.name for field in fields(MACHINE)} - {"name", "batch"}
    constants = {name: {"value": getattr(MACHINE, name), "source": "test"} for name in names}
    data = {"name": "t", "model": "systolic", "about": "test", "constants": constants}
    assert parse_target(data, source="t.yaml") == replace(MACHINE, name="t")
    constants["dataflow"] = {"value": "ows", "source": "test"}
    with pytest.raises(TargetError, match=r"t\.yaml: dataflow must be one of ws, os, is"):
        parse_target(data, source="t.yaml")


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundled_target_keeps_the_contract_of_cost_models(target: str) -> None:
    graph = two_layer_graph()
    check_cost_model(load_target(target), graph)


@pytest.mark.parametrize("target", TARGETS)
def test_bundled_energies_are_those_of_the_table_they_name(target: str) -> None:
    machine = load_target(target)
    assert isinstance(machine, Systolic)
    assert machine.sram_pj_per_bit == pytest.approx(sram_pj_per_bit(machine.ifmap_sram_kib), rel=1e-3)
    assert machine.energy_table == "Horowitz ISSCC 2014, 45 nm"


def test_the_edge_tpu_like_array_has_the_published_peak_of_four_tops() -> None:
    machine = load_target("edge-tpu-like")
    assert isinstance(machine, Systolic)
    assert 2 * machine.rows * machine.columns * machine.clock_mhz * 1e6 == pytest.approx(4e12, rel=1e-3)
