"""Predictions for this machine are anchored at the original network's measured latency."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress.core.graph import Bits
from autocompress.export import Latency
from autocompress.hardware_sim import load_target
from autocompress.hardware_sim.measured import Measured
from autocompress.hardware_sim.target_file import FOLDER
from autocompress.pipeline import Event, Recipe, anchor, measure_fidelity, resume, run_recipe, run_series
from autocompress.trace import trace
from autocompress.zoo import build

RECIPE = """
name: anchored
model: digits_vgg
data: digits
threads: 1
target: this-cpu
budgets: {latency_ms: 0.85}
train: {epochs: 1, batch_size: 64}
prune: {calibration_images: 64, recalibrate_batches: 1}
search: {algorithm: random, num_plans: 4, baselines: [uniform]}
finetune: {epochs: 1, batch_size: 64}
export: {parity_images: 8, latency_runs: 2}
"""
TAKEN = {"32": 3.0, "8": 0.3}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """A profile in the working directory, of a machine on which every original takes ``TAKEN`` ms."""
    shipped = (FOLDER / "xeon-amx.yaml").read_text().replace("name: xeon-amx", "name: this-cpu")
    (tmp_path / "this-cpu.yaml").write_text(shipped)
    monkeypatch.chdir(tmp_path)

    def taken(files: Mapping[str, Path], **options: Any) -> dict[str, Latency]:
        return {name: Latency(TAKEN[name], 0.0, 0.0, 1) for name in files}

    monkeypatch.setattr(anchor, "measure_latency", taken)
    target = load_target("this-cpu")
    assert isinstance(target, Measured)
    return target


def test_all_times_of_a_precision_are_multiplied(machine: Measured) -> None:
    graph = trace(build("digits_vgg", num_classes=10, in_channels=1), (1, 8, 8)).graph
    at8 = graph.with_bits({layer.name: Bits(8, 8) for layer in graph.layers})
    assert machine.scaled({8: 0.01})(at8)["latency_ms"] == pytest.approx(
        machine.scaled({8: 0.02})(at8)["latency_ms"] / 2, rel=1e-12
    )
    scaled = machine.scaled({32: 2.0})
    assert scaled(graph)["latency_ms"] == pytest.approx(2 * machine(graph)["latency_ms"], rel=1e-12)
    assert scaled.scaled({32: 0.5})(graph)["latency_ms"] == pytest.approx(machine(graph)["latency_ms"])
    faster = machine.scaled({8: 0.5})
    assert faster(at8)["latency_ms"] < machine(at8)["latency_ms"]
    assert faster(graph)["latency_ms"] == machine(graph)["latency_ms"]
    with pytest.raises(
        ValueError, match=r"factor of 8 bits must be > 0.*factor of 16 bits.*16 bits were not"
    ):
        machine.scaled({8: 0.0, 16: float("inf")})


@pytest.mark.parametrize("quantised", [False, True])
def test_the_original_costs_what_it_took(machine: Measured, tmp_path: Path, quantised: bool) -> None:
    text = RECIPE
    if quantised:
        kept = RECIPE[: RECIPE.index("budgets")] + "reference_bits: 8\nbudgets: {weight_bytes: 0.6}\n"
        kept += "stages: [train, quantise]\ntrain: {epochs: 1, batch_size: 64}\n"
        text = kept + "quantise: {search: {num_plans: 12, baselines: []}}\n"
    result = run_recipe(Recipe.parse(text), out=tmp_path / "run")
    expected = TAKEN["8" if quantised else "32"]
    assert result.predicted["original"]["latency_ms"] == pytest.approx(expected, rel=1e-9)
    if not quantised:
        assert result.budgets["latency_ms"] == pytest.approx(0.85 * expected)
        graph = trace(build("digits_vgg", num_classes=10, in_channels=1), (1, 8, 8)).graph
        share = machine(result.plan.apply(graph))["latency_ms"] / machine(graph)["latency_ms"]
        assert result.predicted["after"]["latency_ms"] == pytest.approx(share * expected, rel=1e-9)
        assert share <= 0.85


def test_a_resumed_run_keeps_the_first_measurement(
    machine: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if event.stage == "finetune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.parse(RECIPE), out=tmp_path / "run", on_event=stop)
    first = json.loads((tmp_path / "run" / "anchor.json").read_text())
    monkeypatch.setitem(TAKEN, "32", 50.0)
    result = resume(tmp_path / "run")
    assert result.predicted["original"]["latency_ms"] == pytest.approx(3.0, rel=1e-9)
    assert json.loads((tmp_path / "run" / "anchor.json").read_text()) == first
    fidelity = measure_fidelity(tmp_path / "run", num_plans=3, epochs=1)
    assert len(fidelity.tuned) == 3  # the ledger's problem is the anchored one


def test_a_series_shares_one_measurement(machine: Measured, tmp_path: Path) -> None:
    recipe = Recipe.parse(RECIPE.replace("0.85}", "[0.95, 0.85]}"))
    series = run_series(recipe, out=tmp_path / "series")
    texts = {path.read_text() for path in tmp_path.glob("series/**/anchor.json")}
    assert len(list(tmp_path.glob("series/**/anchor.json"))) == 3
    assert len(texts) == 1
    assert [r.budgets["latency_ms"] for r in series.results] == pytest.approx([0.95 * 3.0, 0.85 * 3.0])


def test_other_targets_are_taken_as_they_are(tmp_path: Path) -> None:
    assert not anchor.anchored(load_target("xeon-amx"))
    assert not anchor.anchored(None)
    target = load_target("xeon-amx")
    assert isinstance(target, Measured)
    assert anchor.anchored(replace(target, name="this-cpu"))
