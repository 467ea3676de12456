"""Searches compared: figures by hand, nothing paid twice, and a stopped comparison ends the same."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from commands import command

from autocompress.agents import Workers
from autocompress.core import Budget, Cost, Ledger, Plan, Trial
from autocompress.core.errors import RecipeError, RunDirectoryError
from autocompress.pipeline import Event, Outcome, Recipe, contest_of, resume_contest, run_contest, run_recipe
from autocompress.pipeline.contest_outcome import Attempt, as_csv, table
from autocompress.pipeline.contest_report import curves_figure
from autocompress.pipeline.quick_score import QuickScore

SMALL = """
name: small
model: digits_vgg
data: digits
threads: 1
budgets: {macs: 0.5}
train: {epochs: 1, batch_size: 64}
prune: {calibration_images: 64, recalibrate_batches: 1, score_images: 50, reconstruct: false}
search: {algorithm: random, num_plans: 5, baselines: [uniform]}
"""
FILES = {"searches.html", "searches.svg", "searches.csv", "contest.json", "ledger.sqlite", "recipe.yaml"}


def attempt(
    search: str, seed: int, scores: list[float], *, skipped: int = 0, seconds: float = 1.0
) -> Attempt:
    """An attempt whose first trial comes after some plans over budget."""
    trials = tuple(
        Trial(Plan(channels={"a": n + 1}), score, Cost({"macs": 10.0 + n}), n)
        for n, score in enumerate(scores)
    )
    return Attempt(search, seed, trials, tuple(skipped + n + 1 for n in range(len(scores))), seconds, 0.0)


def outcome(*attempts: Attempt) -> Outcome:
    return Outcome("made-up", "prune", 10, (Budget("macs", 20.0, relative=False),), attempts, Path())


def test_standings_give_mean_deviation_and_plans_until_99_percent_of_the_best_of_all() -> None:
    found = outcome(
        attempt("slow", 0, [0.2, 0.5, 0.6], skipped=4),
        attempt("slow", 1, [0.2, 0.8, 1.0], skipped=4),
        attempt("quick", 0, [0.995]),
        attempt("quick", 1, [0.5, 0.991, 0.999]),
    )
    assert found.goal == pytest.approx(0.99)
    first, second = found.standings()
    assert (first.search, second.search) == ("quick", "slow")
    assert first.mean == pytest.approx(0.997)
    assert first.deviation == pytest.approx(0.004 / 2**0.5)
    assert second.deviation == pytest.approx(0.4 / 2**0.5)
    assert (first.arrived, second.arrived) == ((1, 2), (7,))
    assert (first.wins, second.wins) == (1, 1)
    headings, rows = table(found)
    assert [row[0] for row in rows] == ["quick", "slow"]
    assert rows[1][headings.index("plans to 99% of the best")] == "7 (1 of 2 seeds)"


def test_a_negative_best_score_has_a_goal_below_it() -> None:
    found = outcome(attempt("one", 0, [-0.5, -0.2]))
    assert found.goal == pytest.approx(-0.202)
    assert found.standings()[0].arrived == (2,)


def test_the_verdict_says_when_the_lead_may_be_chance() -> None:
    clear = outcome(*(attempt("a", n, [0.9]) for n in range(3)), *(attempt("b", n, [0.5]) for n in range(3)))
    assert "a found the best plans: 0.9000 ± 0.0000 in the mean of 3 seeds; next is b" in clear.verdict()
    assert "more than two standard errors" in clear.verdict()
    level = outcome(
        attempt("a", 0, [0.9]), attempt("a", 1, [0.5]), *(attempt("b", n, [0.6]) for n in range(2))
    )
    assert "level with b" in level.verdict()
    assert "One seed tells nothing" in outcome(attempt("a", 0, [0.9]), attempt("b", 0, [0.5])).verdict()


def test_of_equal_scores_the_search_that_takes_less_time_is_first() -> None:
    found = outcome(attempt("a", 0, [0.9], seconds=2.0), attempt("b", 0, [0.9], seconds=1.0))
    assert [standing.search for standing in found.standings()] == ["b", "a"]


def test_curves_hold_the_mean_between_the_lowest_and_the_highest_seed() -> None:
    found = outcome(attempt("a", 0, [0.2, 0.4]), attempt("a", 1, [0.4, 0.4, 0.8]))
    root = ET.fromstring(str(curves_figure(found).svg))
    (band,) = [shape for shape in root.iter() if "band" in shape.get("class", "")]
    line, carried = root.iter("{http://www.w3.org/2000/svg}polyline")
    places = [[tuple(map(float, p.split(","))) for p in s.get("points", "").split()] for s in (band, line)]
    lowest_and_highest = {x: (min(ys), max(ys)) for x, ys in by_x(places[0]).items()}
    assert lowest_and_highest.keys() == by_x(places[1]).keys()
    for x, y in places[1]:
        low, high = lowest_and_highest[x]
        assert low - 1e-9 <= y <= high + 1e-9
    assert "dashed" in carried.get("class", "")


def by_x(points: list[tuple[float, ...]]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(x, []).append(y)
    return found


def test_the_csv_has_every_trial_and_its_best_never_falls() -> None:
    found = outcome(attempt("a", 0, [0.4, 0.2, 0.8], skipped=2))
    rows = list(csv.DictReader(as_csv(found).splitlines()))
    assert [int(row["plans_scored"]) for row in rows] == [3, 4, 5]
    assert [float(row["best"]) for row in rows] == [0.4, 0.4, 0.8]
    assert [float(row["macs"]) for row in rows] == [10, 11, 12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"searches": ["cma"]}, "no search named 'cma'; did you mean 'cma_es'"),
        ({"searches": ["milp", "rndom"]}, "did you mean 'random'.*milp decides bits only"),
        ({"stage": "quantise"}, "no searching stage 'quantise'; it has prune"),
        ({"num_seeds": 0, "num_plans": 0}, "seeds must be >= 1, got 0.*plans must be >= 1, got 0"),
    ],
)
def test_wrong_contests_are_refused_with_all_their_faults(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        contest_of(Recipe.parse(SMALL), **changes)  # type: ignore[arg-type]
    assert re.search(message, " ".join(caught.value.faults))


def test_a_recipe_with_two_searching_stages_needs_one_named() -> None:
    both = Recipe.parse(SMALL.replace("threads: 1", "stages: [train, prune, quantise]"))
    with pytest.raises(RecipeError, match="name one with --stage"):
        contest_of(both)
    assert contest_of(both, stage="quantise").searches == ("milp", "uniform")


def contest(searches: str = "random,uniform,cma_es"):
    recipe = Recipe.parse(SMALL)
    return recipe, contest_of(recipe, searches=searches.split(","), num_seeds=2)


def scores(found: Outcome) -> list[tuple[str, int, list[tuple[Plan, float]], tuple[int, ...]]]:
    return [
        (one.search, one.seed, [(trial.plan, trial.score) for trial in one.trials], one.scored_at)
        for one in found.attempts
    ]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[Plan]]:
    """A comparison that was not interrupted, and the plans that were scored for it."""
    recipe, settings = contest()
    calls: list[Plan] = []
    score = QuickScore.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuickScore, "__call__", lambda self, plan: calls.append(plan) or score(self, plan))
        return run_contest(recipe, settings, out=tmp_path_factory.mktemp("runs") / "straight"), calls


@pytest.fixture(scope="module")
def straight(counted: tuple[Outcome, list[Plan]]) -> Outcome:
    return counted[0]


def test_every_search_gets_the_same_seeds_and_plans_and_all_files_are_there(straight: Outcome) -> None:
    assert {path.name for path in straight.folder.iterdir()} >= FILES
    assert [(one.search, one.seed) for one in straight.attempts] == [
        (name, seed) for seed in (0, 1) for name in ("random", "uniform", "cma_es")
    ]
    assert {one.search: one.scored_at[-1] for one in straight.attempts} == {
        "random": 5,
        "uniform": 1,
        "cma_es": 5,
    }
    rows = list(csv.DictReader((straight.folder / "searches.csv").open()))
    assert len(rows) == 22
    ET.parse(straight.folder / "searches.svg")
    html = (straight.folder / "searches.html").read_text()
    assert straight.verdict() in html
    assert "<script" not in html


def test_a_plan_that_several_searches_try_is_paid_for_once(counted: tuple[Outcome, list[Plan]]) -> None:
    found, calls = counted
    tried = [trial.plan for one in found.attempts for trial in one.trials]
    assert len(set(tried)) < len(tried)
    assert sorted(plan.digest for plan in calls) == sorted({plan.digest for plan in tried})
    with Ledger(found.folder / "ledger.sqlite") as ledger:
        assert {entry.plan for entry in ledger.entries()} == set(tried)


@pytest.mark.parametrize("stop_at", [4, 14])
def test_an_interrupted_comparison_resumes_to_the_same_outcome(
    straight: Outcome, tmp_path: Path, stop_at: int
) -> None:
    count = 0

    def interrupt(event: Event) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    recipe, settings = contest()
    with pytest.raises(KeyboardInterrupt):
        run_contest(recipe, settings, out=tmp_path / "run", on_event=interrupt)
    assert not (tmp_path / "run" / "searches.html").exists()
    assert scores(resume_contest(tmp_path / "run")) == scores(straight)
    assert (tmp_path / "run" / "searches.csv").read_text() == (straight.folder / "searches.csv").read_text()


def test_a_run_of_a_recipe_is_not_resumed_as_a_comparison(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(Recipe.parse(SMALL), out=tmp_path / "run", on_event=stop)
    with pytest.raises(RunDirectoryError, match=r"not of `autocompress search`"):
        resume_contest(tmp_path / "run")


def test_the_command_prints_the_standings_and_refuses_what_is_wrong(
    straight: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, "search", "--resume", str(straight.folder))
    assert code == 0
    assert all(
        name in out for name in ("random", "uniform", "cma_es", "searches.html", "found the best plans")
    )
    (tmp_path / "small.yaml").write_text(SMALL)
    wrong = {
        ("--searches", "greedy"): "greedy needs at least 7 plans for 5 knobs, got 5",
        ("--searches", "ddgp"): "did you mean 'ddpg'",
        ("--workers", "0"): "number of workers must be >= 1, got 0",
    }
    for words, message in wrong.items():
        code, out, told = command(capsys, "search", "small.yaml", *words)
        assert code == 2
        assert message in told
        assert told.count("error:") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_kill_minus_nine_changes_nothing_and_pays_for_no_plan_twice(
    straight: Outcome, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    words = ["--searches", "random,uniform,cma_es", "--seeds", "2", "--out", str(tmp_path / "run")]
    script = [sys.executable, "-m", "autocompress.cli", "search"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*script, "small.yaml", *words], cwd=tmp_path, env=environment)
    ledger = tmp_path / "run" / "ledger.sqlite"
    while process.poll() is None and num_entries(ledger) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert num_entries(ledger) >= 4
    assert scores(resume_contest(tmp_path / "run")) == scores(straight)


def num_entries(path: Path) -> int:
    if not path.exists():
        return 0
    with Ledger(path) as ledger:
        return len(ledger.entries())


@pytest.mark.slow
def test_workers_score_the_plans_of_a_recipe_and_change_nothing(straight: Outcome, tmp_path: Path) -> None:
    recipe, settings = contest()
    shared = run_contest(recipe, settings, out=tmp_path / "run", workers=Workers(2))
    assert scores(shared) == scores(straight)
    assert all(one.thinking >= 0 for one in shared.attempts)
