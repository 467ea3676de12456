"""How well quick scores rank plans: correlations by hand, a fair choice of plans, nothing trained twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from commands import command
from scipy.stats import pearsonr, spearmanr

from autocompress.core import Ledger, Plan
from autocompress.core.ledger import Entry
from autocompress.pipeline import Event, Fidelity, Recipe, fidelity, measure_fidelity, run_recipe
from autocompress.pipeline.fidelity import spread_over_ranks
from autocompress.pipeline.fidelity_outcome import Tuned, fidelity_figure

SMALL = """
name: small
model: digits_vgg
data: digits
threads: 1
stages: [train, prune, finetune]
budgets: {macs: 0.5}
train: {epochs: 1, batch_size: 64}
prune: {calibration_images: 64, recalibrate_batches: 1, score_images: 50}
search: {algorithm: random, num_plans: 6, baselines: [uniform]}
finetune: {epochs: 2, batch_size: 64, warmup_epochs: 1}
"""
WITHOUT_PRUNE = """
name: small
model: digits_vgg
data: digits
stages: [train, quantise]
budgets: {weight_bytes: 0.2}
"""


def entry(number: int, score: float) -> Entry:
    return Entry(Plan(channels={"a": number}), score, {"macs": 1.0}, 0.1)


def outcome(scores: Sequence[float], accuracies: Sequence[float]) -> Fidelity:
    both = zip(scores, accuracies, strict=True)
    tuned = [Tuned(Plan(channels={"a": i + 1}), s, a, {"macs": 1.0}, 2.0) for i, (s, a) in enumerate(both)]
    return Fidelity("made-up", 3, tuple(tuned), Path())


def test_plans_are_taken_evenly_over_the_ranks_from_worst_to_best() -> None:
    scores = [0.9, 0.1, 0.2, 0.21, 0.22, 0.8, 0.3]
    chosen = spread_over_ranks([entry(i + 1, score) for i, score in enumerate(scores)], 4)
    assert [one.score for one in chosen] == [0.1, 0.21, 0.3, 0.9]
    few = [entry(1, 0.5), entry(2, 0.4)]
    assert [one.score for one in spread_over_ranks(few, 4)] == [0.4, 0.5]


def test_equal_scores_give_the_same_plans_in_any_order_of_the_ledger() -> None:
    entries = [entry(i, 0.5) for i in range(1, 9)]
    assert spread_over_ranks(entries, 3) == spread_over_ranks(entries[::-1], 3)
    assert len({one.plan for one in spread_over_ranks(entries, 5)}) == 5


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy_and_lie_in_their_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, size=12) / 8  # with ties
    accuracies = scores + rng.normal(size=12) * 0.2
    found = outcome(scores.tolist(), accuracies.tolist())
    assert found.spearman.value == pytest.approx(spearmanr(scores, accuracies).statistic)
    assert found.pearson.value == pytest.approx(pearsonr(scores, accuracies).statistic)
    for one in (found.spearman, found.pearson):
        assert -1 <= one.low < one.value < one.high <= 1


def test_noise_is_not_called_a_ranking_and_perfect_order_is() -> None:
    rng = np.random.default_rng(1)
    noise = outcome(rng.uniform(size=12).tolist(), rng.uniform(size=12).tolist())
    assert noise.spearman.low < 0 < noise.spearman.high
    assert "do not show" in noise.verdict()
    perfect = outcome([0.1, 0.2, 0.3, 0.5], [0.6, 0.7, 0.8, 0.81])
    assert perfect.spearman.value == pytest.approx(1) == perfect.spearman.low
    assert perfect.verdict().startswith("Spearman 1.00 (1.00 to 1.00), Pearson 0.8")


def test_scores_that_are_all_equal_have_no_correlation() -> None:
    found = outcome([0.3, 0.3, 0.3], [0.6, 0.7, 0.8])
    assert "No correlation" in found.verdict()
    written = found.to_dict()
    assert written["spearman"] == {"value": None, "low": None, "high": None}
    json.dumps(written, allow_nan=False)


def test_the_table_ranks_both_sides_and_starts_with_the_best_score() -> None:
    headings, rows = outcome([0.1, 0.2, 0.3], [0.9, 0.7, 0.7]).table()
    assert headings == ["plan", "quick score", "rank", "fine-tuned", "rank", "seconds"]
    assert [row[1:5] for row in rows] == [
        ["30 %", "1", "70 %", "2.5"],
        ["20 %", "2", "70 %", "2.5"],
        ["10 %", "3", "90 %", "1"],
    ]


def test_the_drawing_has_a_dot_for_every_plan() -> None:
    root = ET.fromstring(str(fidelity_figure(outcome([0.1, 0.2, 0.4], [0.6, 0.5, 0.8])).svg))
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    run_recipe(Recipe.parse(SMALL), out=folder)
    return folder


def figures(found: Fidelity) -> list[tuple[str, float, float]]:
    return [(one.plan.digest, one.score, one.accuracy) for one in found.tuned]


def test_a_measurement_that_is_killed_goes_on_and_trains_nothing_twice(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    fit = fidelity.fit

    def counting(*args: object, **options: object) -> object:
        trained.append(1)
        return fit(*args, **options)  # type: ignore[arg-type]

    def interrupt(event: Event) -> None:
        if event.stage == "fine-tune plans" and event.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fidelity, "fit", counting)
    with pytest.raises(KeyboardInterrupt):
        measure_fidelity(run_dir, num_plans=4, epochs=1, on_event=interrupt)
    assert len(trained) == 2
    assert not (run_dir / "fidelity.json").exists()
    found = measure_fidelity(run_dir, num_plans=4, epochs=1)
    assert len(trained) == len(found.tuned) == 4
    assert figures(measure_fidelity(run_dir, num_plans=4, epochs=1)) == figures(found)
    assert len(trained) == 4
    assert not list((run_dir / "fidelity").glob("*.checkpoint"))
    for path in (run_dir / "fidelity").iterdir():
        path.unlink()
    assert figures(measure_fidelity(run_dir, num_plans=4, epochs=1)) == figures(found)


def test_scores_are_the_runs_own_and_other_epochs_are_trained_anew(run_dir: Path) -> None:
    found = measure_fidelity(run_dir, num_plans=3)
    assert found.epochs == 2
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        scores = {one.plan.digest: one.score for one in ledger.entries() if one.plan.digest}
    trials = json.loads((run_dir / "trials.json").read_text())["prune"]
    quick = {Plan.from_json(json.dumps(t["plan"])).digest: t["score"] for own in trials.values() for t in own}
    assert set(quick) <= set(scores)
    assert all(quick[one.plan.digest] == one.score for one in found.tuned)
    assert found.tuned[0].score == min(quick.values())
    assert found.tuned[-1].score == max(quick.values())
    assert figures(measure_fidelity(run_dir, num_plans=3, epochs=1)) != figures(found)


def test_the_command_prints_a_table_and_leaves_a_drawing_and_figures(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "fidelity", str(run_dir), "--plans", "3", "--epochs", "1")
    assert code == 0
    assert "Spearman" in out or "No correlation" in out
    stored = json.loads((run_dir / "fidelity.json").read_text())
    assert (stored["epochs"], stored["split"], len(stored["plans"])) == (1, "search", 3)
    ET.parse(run_dir / "fidelity.svg")
    assert all(Plan.from_json(one["plan"]).digest in out for one in stored["plans"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plans", "2"], "plans must be >= 3, got 2"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
    ],
)
def test_wrong_numbers_end_with_code_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, _, err = command(capsys, "fidelity", str(run_dir), *words)
    assert code == 2
    assert message in err


def test_a_folder_without_a_run_or_without_plans_ends_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "fidelity", str(tmp_path))[0] == 2
    (tmp_path / "recipe.yaml").write_text(SMALL)
    code, _, err = command(capsys, "fidelity", str(tmp_path))
    assert code == 2
    assert "holds 0 scored plans within its budgets" in err
    (tmp_path / "recipe.yaml").write_text(WITHOUT_PRUNE)
    code, _, err = command(capsys, "fidelity", str(tmp_path))
    assert code == 2
    assert "no stage prune" in err
