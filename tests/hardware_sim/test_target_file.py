from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from autocompress.core import Bits, LayerGraph, LayerSpec
from autocompress.hardware_sim.model import UnsupportedLayerError
from autocompress.hardware_sim.target_file import (
    MAX_BYTES,
    TargetError,
    bundled_targets,
    load_target,
    parse_target,
)

BUNDLED = [path.stem for path in bundled_targets()]
RIGHT: dict[str, Any] = {
    "rows": 16,
    "columns": 16,
    "dataflow": "ws",
    "clock_mhz": 500,
    "ifmap_sram_kib": 64,
    "filter_sram_kib": 64,
    "ofmap_sram_kib": 64,
    "dram_gb_per_s": 12.8,
    "native_bits": 8,
    "sram_pj_per_bit": 0.4,
    "dram_pj_per_bit": 20,
}
SHAPES: dict[str, LayerGraph] = {
    "vgg-like": LayerGraph(
        (
            LayerSpec("conv1", "conv", 3, 16, (3, 3), in_hw=(32, 32), out_hw=(32, 32)),
            LayerSpec("conv2", "conv", 16, 32, (3, 3), in_hw=(16, 16), out_hw=(16, 16)),
            LayerSpec("conv3", "conv", 32, 32, (3, 3), in_hw=(8, 8), out_hw=(8, 8)),
            LayerSpec("fc", "linear", 512, 10, bias=True),
        ),
        input_shape=(3, 32, 32),
    ),
    "depthwise": LayerGraph(
        (
            LayerSpec("stem", "conv", 3, 16, (3, 3), (2, 2), in_hw=(32, 32), out_hw=(16, 16)),
            LayerSpec("dw", "conv", 16, 16, (3, 3), groups=16, in_hw=(16, 16), out_hw=(16, 16)),
            LayerSpec("pw", "conv", 16, 32, in_hw=(16, 16), out_hw=(16, 16)),
            LayerSpec("fc", "linear", 32, 10, bias=True),
        ),
        input_shape=(3, 32, 32),
    ),
}
WIDTHS = (Bits(8, 8), Bits(2, 2), Bits(1, 1), Bits(32, 32))


def target(**changes: Any) -> dict[str, Any]:
    """A right target's mapping with some constants replaced, or left out where None."""
    constants = {name: {"value": value, "source": "a test"} for name, value in RIGHT.items()}
    for name, entry in changes.items():
        if entry is None:
            del constants[name]
        else:
            constants[name] = entry if isinstance(entry, dict) else {"value": entry, "source": "a test"}
    return {"name": "t", "model": "systolic", "about": "A test.", "constants": constants}


def faults_of(data: Any) -> list[str]:
    with pytest.raises(TargetError) as caught:
        parse_target(data, source="t.yaml")
    assert str(caught.value) == "\n".join(caught.value.faults)
    return list(caught.value.faults)


def test_a_right_target_gives_the_model_it_names_with_its_constants() -> None:
    machine = parse_target(target(), source="t.yaml")
    assert machine.kind == "systolic"
    assert machine.name == "t"
    assert {name: getattr(machine, name) for name in RIGHT} == RIGHT


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"clock_mhz": None}, "t.yaml: constants.clock_mhz: required"),
        (
            {"clock": {"value": 500, "source": "a test"}},
            "t.yaml: constants.clock: unknown constant; did you mean 'clock_mhz'?",
        ),
        (
            {"dram_gb_per_sec": {"value": 1, "source": "a test"}},
            "t.yaml: constants.dram_gb_per_sec: unknown constant; did you mean 'dram_gb_per_s'?",
        ),
        ({"dram_gb_per_s": 0}, "t.yaml: constants.dram_gb_per_s: must be a number > 0, got 0"),
        ({"dram_gb_per_s": -1.5}, "t.yaml: constants.dram_gb_per_s: must be a number > 0, got -1.5"),
        ({"dram_gb_per_s": math.nan}, "t.yaml: constants.dram_gb_per_s: must be a number > 0, got nan"),
        ({"dram_gb_per_s": math.inf}, "t.yaml: constants.dram_gb_per_s: must be a number > 0, got inf"),
        (
            {"dram_gb_per_s": "12.8 GB/s"},
            "t.yaml: constants.dram_gb_per_s: must be a number, got '12.8 GB/s'",
        ),
        ({"dram_gb_per_s": True}, "t.yaml: constants.dram_gb_per_s: must be float, got True"),
        ({"rows": 16.5}, "t.yaml: constants.rows: must be a whole number, got 16.5"),
        ({"dataflow": 3}, "t.yaml: constants.dataflow: must be a text, got 3"),
        ({"rows": {"value": 16}}, "t.yaml: constants.rows: source: required, "),
        ({"rows": {"value": 16, "source": "  "}}, "t.yaml: constants.rows: source: required, "),
        ({"rows": {"source": "a test"}}, "t.yaml: constants.rows: must be {value: ..., source: ...}"),
        (
            {"rows": {"value": 16, "source": "a test", "unit": "cells"}},
            "t.yaml: constants.rows: must be {value: ..., source: ...}",
        ),
    ],
)
def test_one_wrong_constant_is_one_fault_that_says_where_and_what(
    changes: dict[str, Any], fault: str
) -> None:
    (found,) = faults_of(target(**changes))
    assert found.startswith(fault)


def test_a_constant_given_bare_is_refused_because_it_has_no_source() -> None:
    data = target()
    data["constants"]["rows"] = 16
    assert faults_of(data) == ["t.yaml: constants.rows: must be {value: ..., source: ...}"]


def test_every_fault_of_a_file_is_reported_at_once() -> None:
    data = target(clock_mhz=None, dram_gb_per_s=0, rows={"value": 16}, cloumns=16)
    del data["about"]
    data["owner"] = "me"
    found = faults_of(data)
    assert len(found) == 6
    for part in ("'owner'", "about: required", "clock_mhz", "dram_gb_per_s", "rows: source", "'columns'?"):
        assert sum(part in fault for fault in found) == 1, part


def test_an_unknown_model_is_answered_with_the_nearest_one() -> None:
    assert faults_of(target() | {"model": "systolik"}) == [
        "t.yaml: model: no model 'systolik'; did you mean 'systolic'?"
    ]


@pytest.mark.parametrize("model", [["systolic"], {}, 3, None])
def test_a_model_that_is_no_text_is_an_ordinary_fault(model: object) -> None:
    assert faults_of(target() | {"model": model}) == ["t.yaml: model: required, a text"]


@pytest.mark.parametrize("data", [None, [], "systolic", 3])
def test_what_is_not_a_mapping_is_refused(data: object) -> None:
    assert faults_of(data) == ["t.yaml: a target file is a mapping with name, model, about and constants"]


def test_constants_that_are_no_mapping_are_refused() -> None:
    (found,) = faults_of(target() | {"constants": [1]})
    assert "constants: must be a mapping" in found


def test_an_unknown_name_is_answered_with_the_nearest_target() -> None:
    with pytest.raises(TargetError, match=r"no target 'systolic-16x61'; did you mean 'systolic-16x16'\?"):
        load_target("systolic-16x61")


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_without_samples_is_refused(batch: int) -> None:
    with pytest.raises(TargetError, match=f"batch must be >= 1, got {batch}"):
        load_target("systolic-16x16", batch=batch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: [unclosed", "cannot be read as YAML"),
        (b"name: a\nname: b\n", "cannot be read as YAML: .*duplicate key"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"#" * (MAX_BYTES + 1), "larger than 1,000,000 bytes"),
        (b"", "a target file is a mapping"),
    ],
)
def test_a_file_that_is_no_target_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(TargetError, match=message):
        load_target(path)


def test_a_file_of_ones_own_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with path.open("w") as file:
        YAML().dump(target(), file)
    assert load_target(path, batch=4) == replace(parse_target(target(), source=""), batch=4)  # type: ignore[type-var]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_target_carries_the_name_of_its_file(name: str) -> None:
    machine = load_target(name)
    assert machine.name == name
    assert machine.mapping
    assert "energy_mj" not in machine.metrics or machine.energy_table != "none"


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_target_prices_a_plain_and_a_depthwise_network_or_names_the_layers_it_cannot_run(
    name: str,
) -> None:
    machine = load_target(name)
    priced, refusals = [], []
    for graph in SHAPES.values():
        for bits in WIDTHS:
            try:
                priced.append(machine(graph.with_bits({layer.name: bits for layer in graph.layers})))
            except UnsupportedLayerError as fault:
                refusals.append(str(fault))
    assert priced
    assert all("layer" in refusal for refusal in refusals)
    for cost in priced:
        assert cost["latency_ms"] > 0
        assert all(math.isfinite(cost[metric]) and cost[metric] >= 0 for metric in machine.metrics)


def test_this_cpu_is_measured_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError, match="autocompress profile"):
        load_target("this-cpu")
    shipped = next(path for path in bundled_targets() if path.stem == "xeon-amx")
    (tmp_path / "this-cpu.yaml").write_text(shipped.read_text())
    assert load_target("this-cpu").kind == "measured"
