"""Whole runs: what they promise, what they leave behind, and that a stopped one ends the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import TinyResNet
from safetensors.torch import load_file

from autocompress.core import Bits, Ledger
from autocompress.core.errors import CheckpointError, RecipeError, RunDirectoryError
from autocompress.hardware_sim import bundled_targets, load_target
from autocompress.pipeline import Event, Recipe, compress, load_compressed, resume, run_recipe
from autocompress.pipeline.comparison import shortfalls
from autocompress.pipeline.run_directory import RunDirectory
from autocompress.trace import measure, trace
from autocompress.training import evaluate, load_data
from autocompress.zoo import build

SMALL = """
name: small
model: [digits_vgg, digits_mobilenet]
data: digits
threads: 1
budgets: {macs: 0.5, params: 0.6}
train: {epochs: 2, batch_size: 64}
prune: {calibration_images: 128, recalibrate_batches: 1, score_images: 100}
search: {algorithm: ddpg, num_plans: 8}
finetune: {epochs: 2, batch_size: 64}
export: {parity_images: 16, latency_runs: 3}
"""
NUM_KILLS = 20
FILES = {
    "report.html",
    "plan.json",
    "model.onnx",
    "original.onnx",
    "model.safetensors",
    "result.json",
    "ledger.sqlite",
    "recipe.yaml",
    "layers.json",
    "trials.json",
    "training.json",
}


def outcome(folder: Path) -> tuple[str, list[tuple[str, float, str]], dict[str, torch.Tensor]]:
    """What must not depend on interruptions: plan, ledger (without times), final weights."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        rows = [(e.plan.digest, e.score, json.dumps(e.cost)) for e in ledger.entries()]
    return (folder / "plan.json").read_text(), rows, load_file(folder / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    (plan, rows, weights), (other_plan, other_rows, other_weights) = outcome(a), outcome(b)
    assert plan == other_plan
    assert rows == other_rows
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    run_recipe(Recipe.parse(SMALL), out=folder)
    return folder


def test_a_run_leaves_every_file_and_nothing_half_written(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert names >= FILES
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_result_meets_every_budget_and_is_what_the_network_measures(straight: Path) -> None:
    result = json.loads((straight / "result.json").read_text())
    model = build(result["provenance"]["model"], num_classes=10, in_channels=1)
    small = load_compressed(model, straight)
    measured = measure(small, (1, 8, 8))
    for metric, share in (("macs", 0.5), ("params", 0.6)):
        assert result["after"][metric] == measured[metric] <= share * result["before"][metric]
    assert evaluate(small, load_data("digits").test).accuracy == result["after"]["accuracy"]


def test_every_search_gets_as_many_plans(straight: Path) -> None:
    trials = json.loads((straight / "trials.json").read_text())
    assert {name: len(rows) for name, rows in trials["prune"].items()} == {
        "ddpg": 8,
        "random": 8,
        "uniform": 1,
    }


@pytest.mark.parametrize("stop_at", [3, 9, 16, 26])
def test_a_run_interrupted_at_any_event_and_resumed_equals_the_straight_run(
    straight: Path, tmp_path: Path, stop_at: int
) -> None:
    count = 0

    def interrupt(event: Event) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.parse(SMALL), out=folder, on_event=interrupt)
    assert not (folder / "result.json").exists()
    resume(folder)
    assert_same(straight, folder)


@pytest.mark.slow
def test_kill_minus_nine_at_twenty_random_moments_changes_nothing(straight: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL)
    rng = np.random.default_rng(0)
    script = [sys.executable, "-m", "autocompress.cli", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    subprocess.run([*script, str(recipe), "--out", str(tmp_path / "timed")], check=True, env=environment)
    whole = time.perf_counter() - start
    kills = 0
    for attempt in range(3 * NUM_KILLS):
        folder = tmp_path / f"run-{attempt}"
        process = subprocess.Popen([*script, str(recipe), "--out", str(folder)], env=environment)
        delay = rng.uniform(0.05, 0.95) * whole
        try:
            process.wait(timeout=delay)
            whole = delay  # it ended before it was to be killed: the machine is faster than it was
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        again = (
            ["--resume", str(folder)]
            if (folder / "recipe.yaml").exists()
            else [str(recipe), "--out", str(folder)]
        )
        subprocess.run([*script, *again], check=True, env=environment)
        assert_same(straight, folder)
        if kills == NUM_KILLS:
            return
    pytest.fail(f"only {kills} runs could be killed")


def test_an_own_network_and_own_data_are_compressed_and_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyResNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(120, 3, 16, 16)
    samples = [(image, index % 10) for index, image in enumerate(images)]
    recipe = {
        "budgets": {"macs": 0.6},
        "stages": ["prune", "finetune", "export"],
        "search": {"num_plans": 4, "algorithm": "random", "baselines": []},
        "finetune": {"epochs": 1},
        "export": {"latency_runs": 2, "parity_images": 4},
    }
    result = compress(model, (samples[:100], samples[100:]), recipe, run_dir=tmp_path / "own")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    small = load_compressed(model, tmp_path / "own")
    assert measure(small, (3, 16, 16))["macs"] == result.after["macs"] <= 0.6 * result.before["macs"]
    again = compress(model, (samples[:100], samples[100:]), recipe, run_dir=tmp_path / "own")
    assert again.plan == result.plan
    with pytest.raises(RunDirectoryError, match="another recipe"):
        compress(model, (samples[:100], samples[100:]), recipe | {"seed": 1}, run_dir=tmp_path / "own")
    with pytest.raises(RunDirectoryError, match="other inputs"):
        compress(model, (samples[:99], samples[100:]), recipe, run_dir=tmp_path / "own")
    with pytest.raises(RecipeError, match="weights: leave it out"):
        compress(
            model, (samples[:100], samples[100:]), recipe | {"weights": "w.pth"}, run_dir=tmp_path / "own"
        )
    with pytest.raises(CheckpointError, match="another network"):
        load_compressed(build("digits_vgg", num_classes=10, in_channels=3), tmp_path / "own")


def test_a_run_within_a_latency_budget_goes_on_only_with_the_same_target(tmp_path: Path) -> None:
    shipped = next(path for path in bundled_targets() if path.stem == "bismo-zynq7020").read_text()
    (tmp_path / "own.yaml").write_text(shipped.replace("name: bismo-zynq7020", "name: own"))
    (tmp_path / "r.yaml").write_text(
        SMALL.replace("{macs: 0.5, params: 0.6}", "{latency_ms: 0.7, bitops: 0.9}").replace("ddpg", "random")
        + "target: own.yaml\nbits: {weight: 8, act: 8}\nexpected: {accuracy_after: 1.0, tolerance: 0.0}\n"
    )
    stopped = False

    def interrupt(event: Event) -> None:
        nonlocal stopped
        if event.stage == "prune random" and event.done == 4 and not stopped:
            stopped = True
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.load(tmp_path / "r.yaml"), out=folder, on_event=interrupt)
    (tmp_path / "own.yaml").write_text(shipped.replace("name: bismo-zynq7020", "name: own") + "# a remark\n")
    changed = shipped.replace("value: 200", "value: 100")
    original = (tmp_path / "own.yaml").read_text()
    (tmp_path / "own.yaml").write_text(changed.replace("name: bismo-zynq7020", "name: own"))
    with pytest.raises(RunDirectoryError, match=r"other inputs \(target\)"):
        resume(folder)
    (tmp_path / "own.yaml").write_text(original)
    result = resume(folder)
    model = build(result.provenance["model"], num_classes=10, in_channels=1)
    eight = {layer.name: Bits(8, 8) for layer in trace(model, (1, 8, 8)).graph.layers}
    target = load_target(tmp_path / "own.yaml")
    measured = target(trace(load_compressed(model, folder), (1, 8, 8)).graph.with_bits(eight))
    before = target(trace(model, (1, 8, 8)).graph.with_bits(eight))
    assert result.predicted["after"]["latency_ms"] == measured["latency_ms"] <= result.budgets["latency_ms"]
    assert result.budgets["latency_ms"] == 0.7 * before["latency_ms"]
    assert result.predicted["before"]["latency_ms"] == before["latency_ms"]
    assert result.provenance["target"]["name"] == "own"
    layers = json.loads((folder / "layers.json").read_text())
    assert sum(layer["cost_after"]["latency_ms"] for layer in layers) == pytest.approx(measured["latency_ms"])
    assert shortfalls(result) != []
    assert "the recipe expects" in (folder / "report.html").read_text()


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) < 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    result = names["result"]
    assert result.after["macs"] <= 0.5 * result.before["macs"]  # type: ignore[attr-defined]
    assert result.after["accuracy"] > 0.8  # type: ignore[attr-defined]


def test_a_run_directory_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    recipe = Recipe.parse(SMALL)
    with RunDirectory.create(tmp_path / "run", recipe), pytest.raises(RunDirectoryError, match="in use"):
        RunDirectory.open(tmp_path / "run")
    with RunDirectory.open(tmp_path / "run") as again:
        assert again.recipe.digest == recipe.digest


def test_a_run_killed_before_its_recipe_was_written_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "recipe.yaml.tmp").write_text("half")
    with RunDirectory.create(tmp_path / "run", Recipe.parse(SMALL)) as directory:
        assert directory.recipe.name == "small"
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory.create(tmp_path / "file", Recipe.parse(SMALL))


def test_names_of_runs_count_upward(tmp_path: Path) -> None:
    assert RunDirectory.next_free(tmp_path, "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    assert RunDirectory.next_free(tmp_path, "a") == tmp_path / "a-2"


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDirectory.create(tmp_path / "run", Recipe.parse(SMALL)) as directory:
        directory.write("plan.json", "old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match="Free some space"):
            directory.write("plan.json", "new")
        assert (directory.path / "plan.json").read_text() == "old"
        assert not list(directory.path.glob("*.tmp"))
