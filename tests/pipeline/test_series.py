"""Series of limits: one training, a network for each limit, and the same end after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autocompress.core import Ledger
from autocompress.core.errors import InfeasibleBudgetError, RecipeError, RunDirectoryError
from autocompress.pipeline import (
    Event,
    Recipe,
    SeriesResult,
    compress,
    contest_of,
    is_series,
    resume,
    resume_series,
    run_recipe,
    run_series,
)
from autocompress.training import load_data
from autocompress.zoo import build

SERIES = """
name: curve
model: digits_vgg
data: digits
threads: 1
budgets: {macs: [0.6, 0.4, 0.3]}
train: {epochs: 2, batch_size: 64}
prune: {calibration_images: 64, recalibrate_batches: 1, score_images: 60, round_to: 4}
search: {algorithm: random, num_plans: 5, baselines: [uniform]}
finetune: {epochs: 1, batch_size: 64}
export: {parity_images: 16, latency_runs: 3}
"""
NAMES = ["curve-macs-0.6", "curve-macs-0.4", "curve-macs-0.3"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> SeriesResult:
    return run_series(Recipe.parse(SERIES), out=tmp_path_factory.mktemp("runs") / "straight")


def outcome(folder: Path) -> tuple[list[str], list[tuple[str, float]], list[dict[str, torch.Tensor]]]:
    with Ledger(folder / "ledger.sqlite") as ledger:
        rows = [(entry.plan.digest, entry.score) for entry in ledger.entries()]
    weights = [load_file(folder / name / "model.safetensors") for name in NAMES]
    return [(folder / name / "plan.json").read_text() for name in NAMES], rows, weights


def test_every_limit_has_a_network_within_it_and_all_come_from_one_training(straight: SeriesResult) -> None:
    assert [result.name for result in straight.results] == NAMES
    original = straight.results[0].before["macs"]
    for result, limit in zip(straight.results, (0.6, 0.4, 0.3), strict=True):
        assert result.budgets == {"macs": limit * original}
        assert result.after["macs"] <= limit * original
        for key in ("accuracy", "macs", "params", "file_bytes"):
            assert result.before[key] == straight.results[0].before[key]
        assert result.run_dir is not None
        assert not list(result.run_dir.glob("train*.checkpoint"))
        assert (result.run_dir / "report.html").exists()
    assert len(list(straight.folder.glob("train*.checkpoint"))) == 1


def test_a_looser_limit_chooses_among_what_tighter_ones_scored_as_well(straight: SeriesResult) -> None:
    earlier: list[tuple[float, str]] = []
    for result in reversed(straight.results):
        assert result.run_dir is not None
        trials = json.loads((result.run_dir / "trials.json").read_text())["prune"]
        own = [(t["score"], json.dumps(t["plan"])) for found in trials.values() for t in found]
        said = result.search["prune"]
        if earlier:
            assert said["baselines"]["tighter budgets"] == max(score for score, _ in earlier)
        else:
            assert "tighter budgets" not in said["baselines"]
        best = max(score for score, _ in own + earlier)
        leaders = {plan for score, plan in own + earlier if score == best}
        assert leaders & {json.dumps(final["plan"]) for final in said["finals"]}
        earlier += own


def test_the_report_links_to_every_network(straight: SeriesResult) -> None:
    html = (straight.folder / "series.html").read_text()
    assert all(f'href="{name}/report.html"' in html for name in NAMES)
    headings, rows = straight.table()
    assert rows[0][0] == "original"
    assert len(rows) == 4
    assert {len(row) for row in rows} == {len(headings)}
    assert html.count("<circle") >= 4


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", ["2/3 finetune", "1/3 prune finals"])
def test_a_stopped_series_ends_as_if_it_had_not_been(straight: SeriesResult, tmp_path: Path, at: str) -> None:
    def stop(event: Event) -> None:
        if event.stage == at and event.done:
            raise StoppedError

    folder = tmp_path / "stopped"
    with pytest.raises(StoppedError):
        run_series(Recipe.parse(SERIES), out=folder, on_event=stop)
    assert is_series(folder)
    resume_series(folder)
    plans, rows, weights = outcome(folder)
    expected_plans, expected_rows, expected_weights = outcome(straight.folder)
    assert (plans, rows) == (expected_plans, expected_rows)
    for one, other in zip(weights, expected_weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_series_and_a_run_are_not_taken_for_each_other(straight: SeriesResult, tmp_path: Path) -> None:
    single = "".join(SERIES).replace("[0.6, 0.4, 0.3]", "0.6")
    with pytest.raises(RecipeError, match="several limits"):
        run_recipe(Recipe.parse(SERIES), out=tmp_path / "x")
    with pytest.raises(RecipeError, match="no budget has several"):
        run_series(Recipe.parse(single), out=tmp_path / "x")
    with pytest.raises(RecipeError, match="several limits"):
        resume(straight.folder)
    with pytest.raises(RunDirectoryError, match="not a series"):
        resume_series(straight.folder / NAMES[0])
    with pytest.raises(RecipeError, match="has several"):
        contest_of(Recipe.parse(SERIES))
    own = {"budgets": {"macs": [0.6, 0.4]}, "stages": ["prune"]}
    with pytest.raises(RecipeError, match="several limits"):
        compress(build("digits_vgg", num_classes=10, in_channels=1), load_data("digits"), own)
    assert not is_series(tmp_path)
    assert not (tmp_path / "x").exists()


def test_every_limit_that_cannot_be_met_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudgetError) as fault:
        run_series(Recipe.parse(SERIES.replace("0.4, 0.3", "0.004, 0.003")), out=tmp_path / "x")
    assert "curve-macs-0.004: " in str(fault.value)
    assert "curve-macs-0.003: " in str(fault.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("budgets", "fault"),
    [
        ("{macs: [0.3, 0.4]}", r"budgets.macs: limits come from the loosest to the tightest, got 0.3, 0.4"),
        ("{macs: [0.5, 0.5]}", "from the loosest to the tightest"),
        ("{macs: [0.5, 0.0]}", "0"),
        ("{macs: [0.5, 0.4], params: [0.5, 0.4, 0.3]}", "equally many, got 2 on macs, 3 on params"),
        ("{macs: []}", "must be a number"),
        ("{macs: [0.5, x]}", "must be a number, got 'x'"),
    ],
)
def test_faults_in_limits_are_worded(budgets: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        Recipe.parse(SERIES.replace("{macs: [0.6, 0.4, 0.3]}", budgets))


def test_members_hold_fixed_limits_and_halve_flops() -> None:
    recipe = Recipe.parse(SERIES.replace("{macs: [0.6, 0.4, 0.3]}", "{flops: [2000.0, 1000.0], params: 0.5}"))
    members = recipe.members()
    assert [[b.limit for b in member.budgets] for member in members] == [[1000.0, 0.5], [500.0, 0.5]]
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert [member.members() for member in members] == [(member,) for member in members]
