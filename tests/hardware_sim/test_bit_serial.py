from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, LayerGraph, LayerSpec
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.bit_serial import BitSerial
from autocompress.hardware_sim.energy import mac_pj, sram_pj_per_bit
from autocompress.hardware_sim.target_file import load_target
from autocompress.testing import check_cost_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BATCH = 16
INT8 = Bits(8, 8)
TARGETS = ("bismo-zynq7020", "bismo-ultra96", "bismo-zcu102", "bismo-cloud")


def golden(file: str) -> list[dict[str, str]]:
    lines = (GOLDEN / file).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def target(name: str, batch: int = 1) -> BitSerial:
    machine = load_target(name, batch=batch)
    assert isinstance(machine, BitSerial)
    return machine


MACHINES = {name: target(name) for name in TARGETS}


def conv(
    inputs: int, outputs: int, size: int, *, kernel: int = 1, groups: int = 1, bits: Bits = INT8
) -> LayerSpec:
    hw = (size, size)
    return LayerSpec(
        "l", "conv", inputs, outputs, (kernel, kernel), groups=groups, in_hw=hw, out_hw=hw, bits=bits
    )


def haq_layers() -> list[LayerSpec]:
    """MobileNetV2's 53 layers."""
    layers = []
    for row in golden("haq_cloud.csv"):
        kernel, stride, size = int(row["kernel"]), int(row["stride"]), int(row["in_hw"])
        out = -(-size // stride)
        layers.append(
            LayerSpec(
                row["layer"],
                "linear" if row["layer"] == "fc" else "conv",
                int(row["inputs"]),
                int(row["outputs"]),
                (kernel, kernel),
                (stride, stride),
                int(row["groups"]),
                (size, size),
                (out, out),
            )
        )
    return layers


def haq_table() -> np.ndarray:
    """Cycles per batch of 16, shape (53, 8, 8): layer, weight bits - 1, activation bits - 1."""
    rows = [
        [int(row[f"w{w}a{a}"]) for w in range(1, 9) for a in range(1, 9)] for row in golden("haq_cloud.csv")
    ]
    return np.array(rows).reshape(53, 8, 8)


def modelled_table() -> np.ndarray:
    layers = [
        replace(layer, bits=Bits(w, a)) for layer in haq_layers() for w in range(1, 9) for a in range(1, 9)
    ]
    cycles = target("bismo-cloud", BATCH).layer_costs(LayerTable.of(layers)).extra["cycles"]
    return cycles.reshape(53, 8, 8) * BATCH


@pytest.mark.parametrize("row", golden("bismo.csv"), ids=lambda row: row["board"])
def test_peak_rate_and_resources_equal_bismo_to_the_printed_digits(row: dict[str, str]) -> None:
    machine = target({"PYNQ-Z1": "bismo-zynq7020", "Ultra96": "bismo-ultra96"}[row["board"]])
    shape = (machine.rows, machine.depth, machine.columns, machine.clock_mhz)
    assert shape == tuple(int(row[name]) for name in ("rows", "depth", "columns", "clock_mhz"))
    # 6.5 and 15.4 as printed, the first cut and the second rounded: 6.5536 and 15.36.
    assert machine.peak_binary_tops == pytest.approx(float(row["peak_binary_tops"]), abs=0.06)
    assert machine.peak_binary_tops == 2 * shape[0] * shape[1] * shape[2] * shape[3] / 1e6
    cost = machine(LayerGraph((conv(8, 8, 4),)))
    assert round(cost["luts"]) == int(row["luts"])
    assert cost["brams"] == int(row["brams"])


def test_the_released_table_of_haq_is_met_within_eight_percent_on_average() -> None:
    ours, released = modelled_table(), haq_table()
    error = np.abs(ours / released - 1)
    assert released.size == 3392
    assert error.mean() < 0.06
    assert np.median(error) < 0.025
    assert error.max() < 0.41
    assert (ours <= released).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_network_totals_of_haq_are_met_within_four_percent(bits: int) -> None:
    ours, released = modelled_table()[:, bits - 1, bits - 1], haq_table()[:, bits - 1, bits - 1]
    assert ours.sum() == pytest.approx(released.sum(), rel=0.02)


def test_depthwise_layers_follow_activation_bits_and_the_classifier_weight_bits() -> None:
    table, layers = modelled_table(), haq_layers()
    depthwise = [i for i, layer in enumerate(layers) if layer.groups > 1 and layer.out_hw[0] >= 14]
    assert len(depthwise) == 13
    for i in depthwise:
        assert table[i, 0, 7] == 8 * table[i, 0, 0]
        assert table[i, 1, 7] == table[i, 0, 7]
    classifier = table[-1]
    assert list(classifier[:, 0]) == [5000 * w for w in range(1, 9)]
    assert np.array_equal(classifier[:, :5], np.repeat(classifier[:, :1], 5, axis=1))
    assert classifier[7, 7] == 40_000  # 40,021 in the released table


def test_compute_cycles_are_weight_bits_times_act_bits_times_tiles() -> None:
    machine = target("bismo-zynq7020")
    layers = [conv(300, 20, 5, kernel=3, bits=Bits(w, a)) for w in (1, 3, 8) for a in (1, 2, 7)]
    cycles = machine.layer_costs(LayerTable.of(layers)).extra["compute_cycles"]
    tiles = 4 * 11 * 3  # ceil(25 / 8) * ceil(2700 / 256) * ceil(20 / 8)
    assert list(cycles) == [w * a * tiles for w in (1, 3, 8) for a in (1, 2, 7)]


def test_a_full_array_reaches_its_peak_rate() -> None:
    machine = replace(target("bismo-zynq7020"), dram_bits_per_cycle=1 << 20)
    costs = machine.layer_costs(LayerTable.of([conv(512, 64, 8, bits=Bits(2, 3))]))
    assert costs.utilisation[0] == 1.0
    assert not costs.memory_bound[0]
    tera_ops = 2 * 512 * 64 * 64 * 6 / (costs.latency_ms[0] * 1e-3) * 1e-12
    assert tera_ops == pytest.approx(machine.peak_binary_tops)


def test_energy_is_board_power_times_time() -> None:
    for name in TARGETS:
        machine = target(name)
        cost = machine(LayerGraph((conv(64, 64, 14, kernel=3), conv(64, 64, 14, kernel=3, groups=64))))
        assert cost["energy_mj"] == pytest.approx(machine.board_w * cost["latency_ms"])


def test_components_are_operations_and_bits_times_the_table_and_the_rest_of_the_board() -> None:
    machine = target("bismo-zynq7020")  # 8 x 256 x 8, 64 bits a cycle, 200 MHz, 5 W
    layer = conv(300, 20, 5, kernel=3, bits=Bits(2, 4))
    energy = {k: v[0] for k, v in machine.layer_costs(LayerTable.of([layer])).energy_pj.items()}
    words = 11  # ceil(2700 / 256)
    moved = (4 * 25 + 2 * 20) * words * 256
    compute = 2 * 4 * 4 * words * 3  # ceil(25 / 8) and ceil(20 / 8) tiles
    assert energy["mac"] == pytest.approx(layer.macs * float(mac_pj(2, 4)))
    assert energy["dram"] == pytest.approx(moved * 20.0)
    assert energy["buffer"] == pytest.approx((compute * 16 * 256 + moved) * sram_pj_per_bit(4.5))
    cycles = max(compute, 4 * 25 * words * 4, 2 * 20 * words * 4)
    assert sum(energy.values()) == pytest.approx(5.0 * cycles / 200e6 * 1e12)
    assert all(value > 0 for value in energy.values())


def test_a_board_whose_power_is_below_the_tables_parts_takes_those() -> None:
    table = LayerTable.of([conv(64, 64, 14, kernel=3)])
    energy = replace(target("bismo-zynq7020"), board_w=1e-6).layer_costs(table).energy_pj
    assert energy["rest"][0] == 0
    assert sum(energy.values())[0] > 0


def test_the_zcu102_array_is_the_largest_square_of_no_larger_share_than_the_ultra96_build() -> None:
    ultra96, zcu102 = target("bismo-ultra96"), target("bismo-zcu102")
    share = ultra96.luts / 70_560
    assert zcu102.luts / 274_080 <= share < replace(zcu102, rows=20, columns=20).luts / 274_080
    assert zcu102.brams <= 912
    assert zcu102.peak_binary_tops == pytest.approx(55.4, abs=0.1)


LAYERS = st.builds(
    lambda group_inputs, group_outputs, groups, size, kernel, w, a: conv(
        group_inputs * groups, group_outputs * groups, size, kernel=kernel, groups=groups, bits=Bits(w, a)
    ),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 1, 2, 3, 7, 16, 50]),
    st.integers(1, 20),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 8),
    st.integers(1, 8),
)


def larger(layer: LayerSpec) -> list[LayerSpec]:
    """The layer with one more of everything it can have more of; groups come whole."""
    c, o, g, bits = layer.in_channels, layer.out_channels, layer.groups, layer.bits
    more = (layer.out_hw[0] + 1, layer.out_hw[1] + 1)
    widths = [Bits(min(8, bits.weight + 1), bits.act), Bits(bits.weight, min(8, bits.act + 1))]
    return [
        replace(layer, in_channels=c + g),
        replace(layer, out_channels=o + g),
        replace(layer, in_channels=c // g * (g + 1), out_channels=o // g * (g + 1), groups=g + 1),
        replace(layer, in_hw=more, out_hw=more),
        *(replace(layer, bits=b) for b in widths),
    ]


@settings(max_examples=200, deadline=None)
@given(LAYERS, st.sampled_from(TARGETS), st.sampled_from([1, 3, 16]))
def test_more_channels_groups_pixels_or_bits_never_cost_less(layer: LayerSpec, name: str, batch: int) -> None:
    costs = replace(MACHINES[name], batch=batch).layer_costs(LayerTable.of([layer, *larger(layer)]))
    assert (costs.latency_ms[1:] >= costs.latency_ms[0]).all()
    energy = sum(costs.energy_pj.values())
    assert (energy[1:] >= energy[0] * (1 - 1e-12)).all()


@settings(max_examples=50, deadline=None)
@given(LAYERS, st.sampled_from(TARGETS), st.integers(1, 20))
def test_less_bandwidth_never_costs_less_and_a_larger_batch_never_takes_less_time(
    layer: LayerSpec, name: str, batch: int
) -> None:
    machine, table = replace(MACHINES[name], batch=batch), LayerTable.of([layer])
    here = machine.layer_costs(table).latency_ms[0]
    narrow = replace(machine, dram_bits_per_cycle=machine.dram_bits_per_cycle // 2)
    assert narrow.layer_costs(table).latency_ms[0] >= here
    more = replace(machine, batch=batch + 1).layer_costs(table).latency_ms[0]
    assert more * (batch + 1) >= here * batch * (1 - 1e-12)


def test_layers_add_up_and_resources_do_not() -> None:
    layers = tuple(replace(layer, bits=Bits(4, 4)) for layer in haq_layers())
    machine = target("bismo-ultra96")
    cost = machine(LayerGraph(layers))
    for metric in ("latency_ms", "energy_mj"):
        assert cost[metric] == pytest.approx(sum(part[metric] for part in cost.layers.values()))
    single = machine(LayerGraph(layers[:1]))
    assert (single["luts"], single["brams"]) == (cost["luts"], cost["brams"])


def test_every_fault_of_a_network_is_listed_with_its_layers() -> None:
    layers = [conv(8, 8, 4), conv(8, 8, 4, bits=Bits(32, 8)), conv(8, 8, 4, bits=Bits(8, 9))]
    layers.append(replace(conv(8, 8, 4), transposed=True))
    with pytest.raises(UnsupportedLayerError) as fault:
        target("bismo-cloud").layer_costs(LayerTable.of(layers))
    first, second = str(fault.value).splitlines()
    assert first.startswith("layers 1, 2: bismo-cloud multiplies integers of 1 to 8 bits")
    assert second.startswith("layers 3: ")
    assert "transposed" in second


def test_the_target_keeps_the_laws_of_cost_models(two_layers: LayerGraph) -> None:
    check_cost_model(load_target("bismo-zynq7020"), two_layers)
