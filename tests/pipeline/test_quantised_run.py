"""Runs that choose bits: what they promise, what they leave, and that a stopped one ends the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autocompress.core import Bits, Ledger, Plan
from autocompress.core.errors import CheckpointError, InfeasibleBudgetError, UnsupportedModelError
from autocompress.export import read_packed
from autocompress.hardware_sim import load_target
from autocompress.pipeline import Event, Recipe, compress, load_compressed, resume, run_recipe
from autocompress.pipeline.bit_score import BitScore, uniform_plan
from autocompress.pipeline.recipe_sections import QuantiseSettings
from autocompress.trace import trace
from autocompress.training import TrainSettings, evaluate, fit, load_data, weights_digest
from autocompress.zoo import build

BOTH = """
name: both
model: digits_vgg
data: digits
threads: 1
target: bismo-zynq7020
reference_bits: 8
budgets: {latency_ms: 0.4}
stages: [train, prune, finetune, quantise, qat, export]
train: {epochs: 2, batch_size: 64}
prune: {calibration_images: 128, recalibrate_batches: 1, score_images: 100}
search: {algorithm: random, num_plans: 5, baselines: [uniform]}
finetune: {epochs: 1, batch_size: 64}
quantise: {calibration_images: 64, score_images: 100, search: {algorithm: ddpg, num_plans: 6}}
qat: {epochs: 2, batch_size: 64}
export: {parity_images: 16, latency_runs: 3}
"""
FILES = {"model.onnx", "original.onnx", "model.safetensors", "quantisers.json", "uniform.json", "report.html"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_recipe(Recipe.parse(BOTH), out=folder)
    return folder


def outcome(folder: Path) -> tuple[str, list[tuple[str, float, str]], dict[str, torch.Tensor]]:
    """What must not depend on interruptions: plan, ledger (without times), final weights."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        rows = [(e.plan.digest, e.score, json.dumps(e.cost)) for e in ledger.entries()]
    return (folder / "plan.json").read_text(), rows, load_file(folder / "model.safetensors")


def test_the_network_left_behind_is_the_one_that_was_measured_and_meets_the_budget(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    plan = Plan.from_json((straight / "plan.json").read_text())
    model = build("digits_vgg", num_classes=10, in_channels=1)
    graph = trace(model, (1, 8, 8)).graph
    target = load_target("bismo-zynq7020")
    eight = graph.with_bits({layer.name: Bits(8, 8) for layer in graph.layers})
    assert set(plan.bits) == {layer.name for layer in graph.layers}
    latency = target(plan.apply(graph))["latency_ms"]
    assert result["predicted"]["after"]["latency_ms"] == pytest.approx(latency, rel=1e-12)
    assert result["budgets"]["latency_ms"] == 0.4 * target(eight)["latency_ms"] >= latency
    network = load_compressed(model, straight)
    assert evaluate(network, load_data("digits").test).accuracy == result["after"]["accuracy"]
    assert {path.name for path in straight.iterdir()} >= FILES


def test_speed_and_size_are_measured_in_float_and_in_8_bits(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    before, after = result["before"], result["after"]
    for key in ("file_bytes", "latency_ms"):
        assert before[f"{key}_float32"] == before[key]
        assert after[f"{key}_int8"] == after[key]
        assert {k for k in after if k.startswith(key)} == {key, f"{key}_float32", f"{key}_int8"}
    assert after["file_bytes_int8"] < after["file_bytes_float32"] < before["file_bytes_float32"]
    assert before["file_bytes_int8"] < before["file_bytes_float32"]
    assert "as int8" in (straight / "report.html").read_text()
    assert {path.name for path in straight.glob("*.onnx")} == {"model.onnx", "original.onnx"}


def test_the_plans_taken_are_the_best_of_the_finalists_on_the_whole_search_split(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    trials = json.loads((straight / "trials.json").read_text())
    taken = json.loads((straight / "plan.json").read_text())
    for stage, decided in (("prune", "channels"), ("quantise", "bits")):
        finals = result["search"][stage]["finals"]
        assert max(finals, key=lambda trial: trial["score"])["plan"][decided] == taken[decided]
        assert {t["plan"]["channels"] != {} for t in finals} == {True}
        best = {max(found, key=lambda t: t["score"])["score"] for found in trials[stage].values()}
        quick = {json.dumps(t["plan"]): t["score"] for found in trials[stage].values() for t in found}
        assert best <= {quick[json.dumps(t["plan"])] for t in finals}
    whole = len(load_data("digits").search)
    assert whole > 100  # the images of a quick score
    for stage in ("prune", "quantise"):
        rights = [trial["score"] * whole for trial in result["search"][stage]["finals"]]
        assert rights == pytest.approx([round(right) for right in rights])


def test_finalists_of_bits_are_trained_before_they_are_scored() -> None:
    data, model = load_data("digits"), build("digits_vgg", num_classes=10, in_channels=1)
    settings = TrainSettings(epochs=8, lr=0.05, batch_size=64)
    fit(model, data, settings, seed=0)
    score = BitScore(model, data, settings=QuantiseSettings(calibration_images=64), seed=0)
    before = weights_digest(model), data.train
    plan = uniform_plan(trace(model, (1, 8, 8)).graph, Bits(2, 2), settings=QuantiseSettings())
    rounded, trained = score(plan), score.after_training(plan, replace(settings, lr=0.01), 15)
    assert trained > rounded + 0.03
    assert trained == score.after_training(plan, replace(settings, lr=0.01), 15)
    assert score(plan) == rounded
    assert (weights_digest(model), data.train) == before


def test_the_onnx_file_runs_on_integers_and_agrees(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    export = result["export"]
    assert export["num_images"] == 16
    assert export["top1_agreement"] == export["top1_agreement_as_written"] == 1
    assert export["integer_convolutions"] == export["convolutions"] == 5
    assert result["files"]["model.onnx"]["bytes"] == result["after"]["file_bytes"]
    assert result["after"]["file_bytes"] < result["before"]["file_bytes"] / 2


def test_pruning_takes_a_part_of_the_budget_and_bits_the_rest(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    trials = json.loads((straight / "trials.json").read_text())
    limits = {stage: figures["budgets"]["latency_ms"] for stage, figures in result["search"].items()}
    start = result["predicted"]["before"]["latency_ms"]
    assert limits["quantise"] == result["budgets"]["latency_ms"] < limits["prune"] < start
    for stage, searches in trials.items():
        for rows in searches.values():
            assert all(row["cost"]["latency_ms"] <= limits[stage] for row in rows)
    chosen = json.loads((straight / "plan.json").read_text())
    for row in (row for rows in trials["quantise"].values() for row in rows):
        assert row["plan"]["channels"] == chosen["channels"]


def test_uniform_bits_are_scored_beside_the_searches(straight: Path) -> None:
    points = json.loads((straight / "uniform.json").read_text())
    assert [point["bits"] for point in points] == [2, 3, 4, 5, 6, 7, 8]
    latencies = [point["cost"]["latency_ms"] for point in points]
    assert latencies == sorted(latencies)
    assert points[-1]["score"] > points[0]["score"]


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("prune random", marks=pytest.mark.slow),
        "quantise ddpg",
        "qat",
        pytest.param("export", marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_in_any_stage_and_resumed_equals_the_straight_run(
    straight: Path, tmp_path: Path, stage: str
) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == stage and event.done == 1:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.parse(BOTH), out=folder, on_event=interrupt)
    assert not (folder / "result.json").exists()
    resume(folder)
    (plan, rows, weights), (other_plan, other_rows, other_weights) = outcome(straight), outcome(folder)
    assert plan == other_plan
    assert rows == other_rows
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_packed_weights_take_the_plans_bits_and_are_what_the_network_computes_with(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    plan = Plan.from_json((straight / "plan.json").read_text())
    network = load_compressed(build("digits_vgg", num_classes=10, in_channels=1), straight)
    modules = dict(network.named_modules())
    packed = read_packed(straight / "model.packed.safetensors")
    stored = load_file(straight / "model.packed.safetensors")
    for name, bits in plan.bits.items():
        weight = packed[f"{name}.weight"]
        assert torch.equal(weight, modules[name].quant_weight().value)  # type: ignore[operator]
        assert len(stored[f"{name}.weight.codes"]) == math.ceil(weight.numel() * bits.weight / 8)
    grids = json.loads((straight / "bits.json").read_text())["layers"]
    assert {n: (g["weight"]["bits"], g["input"]["bits"]) for n, g in grids.items()} == {
        name: (bits.weight, bits.act) for name, bits in plan.bits.items()
    }
    for name, file in result["files"].items():
        assert file["bytes"] == (straight / name).stat().st_size


def test_the_report_shows_bits_what_layers_cost_and_what_training_gave_back(straight: Path) -> None:
    html = (straight / "report.html").read_text()
    result = json.loads((straight / "result.json").read_text())
    for heading in ("Bits per layer", "Search for channels", "Search for bits", "Files"):
        assert f"<h2>{heading}</h2>" in html
    layers = json.loads((straight / "layers.json").read_text())
    total = sum(layer["cost_after"]["latency_ms"] for layer in layers)
    energy = sum(layer["cost_after"]["energy_mj"] for layer in layers)
    for layer in layers:
        weight, act = layer["bits_after"]
        shares = [layer["cost_after"]["latency_ms"] / total, layer["cost_after"]["energy_mj"] / energy]
        assert " · ".join([f"{weight}/{act}", *(f"{100 * s:.0f} %" for s in shares)]) in html
    gained = result["after"]["accuracy"] - result["after"]["accuracy_before_qat"]
    assert f"training with rounding then by {100 * gained:+.2f} points" in html
    assert html.count("bits everywhere: score") == 2 * 7


def test_budgets_of_stage_prune_replace_its_part(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        BOTH, overrides=["prune.budgets={macs: 0.7}", "stages=[train, prune, quantise]", "train.epochs=1"]
    )
    result = run_recipe(recipe, out=tmp_path / "run")
    limit = 0.7 * result.before["macs"]
    assert result.search["prune"]["budgets"] == {"macs": limit}
    assert result.after["macs"] <= limit
    assert result.predicted["after"]["latency_ms"] <= result.budgets["latency_ms"]


def test_weights_of_few_values_meet_a_budget_on_bytes(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        "model: digits_vgg\ndata: digits\nthreads: 1\nbudgets: {weight_bytes: 0.12}\n"
        "stages: [train, quantise, qat, export]\ntrain: {epochs: 2, batch_size: 64}\n"
        "quantise: {method: kmeans, act_bits: [], weight_bits: [1, 2, 3, 4, 5, 6, 7, 8], score_images: 100,\n"
        "  search: {algorithm: random, num_plans: 3}}\nqat: {epochs: 1, batch_size: 64}\n"
        "export: {parity_images: 16, latency_runs: 3}"
    )
    result = run_recipe(recipe, out=tmp_path / "run")
    limit = 0.12 * result.predicted["before"]["weight_bytes"]
    assert result.predicted["after"]["weight_bytes"] <= limit == result.budgets["weight_bytes"]
    network = load_compressed(build("digits_vgg", num_classes=10, in_channels=1), tmp_path / "run")
    assert evaluate(network, load_data("digits").test).accuracy == result.after["accuracy"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    path = tmp_path / "run" / "model.packed.safetensors"
    tensors = network.state_dict()
    rest = sum(t.numel() * t.element_size() for n, t in tensors.items() if n[:-7] not in result.plan.bits)
    headers = 300 * (len(tensors) + len(result.plan.bits))
    assert result.files[path.name]["bytes"] == path.stat().st_size
    assert path.stat().st_size <= result.predicted["after"]["weight_bytes"] + rest + headers
    with pytest.raises(CheckpointError):
        load_compressed(build("digits_mobilenet", num_classes=10, in_channels=1), tmp_path / "run")
    modules = dict(network.named_modules())
    assert set(result.plan.bits) > {"features.3", "classifier"}
    for name, bits in result.plan.bits.items():
        weight: torch.Tensor = modules[name].weight  # type: ignore[assignment]
        assert len(torch.unique(weight)) <= 2**bits.weight
        assert bits.act == 32


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    tight = Recipe.parse(BOTH, overrides=["budgets={latency_ms: 0.001}"])
    with pytest.raises(InfeasibleBudgetError, match=r"held up by [a-z.0-9]+ \(\d+%\)"):
        run_recipe(tight, out=tmp_path / "run")
    samples = [(torch.randn(1, 8, 8), index % 2) for index in range(40)]
    twice = torch.nn.Conv2d(1, 1, 3, padding=1)
    net = torch.nn.Sequential(twice, torch.nn.ReLU(), twice, torch.nn.Flatten(), torch.nn.Linear(64, 2))
    recipe = {"budgets": {"bitops": 0.1}, "stages": ["quantise"]}
    with pytest.raises(UnsupportedModelError, match="runs more than once"):
        compress(net, (samples, samples), recipe, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_quantised_run_is_not_loaded_into_another_network(straight: Path) -> None:
    with pytest.raises(CheckpointError):
        load_compressed(build("digits_mobilenet", num_classes=10, in_channels=1), straight)


def test_calibration_images_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from autocompress.core.errors import DataError

    images = np.random.default_rng(0).standard_normal((60, 1, 8, 8)).astype(np.float32)
    images[7] = np.nan
    samples = [(torch.from_numpy(image), index % 10) for index, image in enumerate(images)]
    recipe = {"budgets": {"bitops": 0.1}, "stages": ["quantise"], "quantise": {"search": {"num_plans": 2}}}
    with pytest.raises(DataError):
        compress(
            build("digits_vgg", num_classes=10, in_channels=1),
            (samples, samples),
            recipe,
            run_dir=tmp_path / "r",
        )
