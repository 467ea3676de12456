"""Several searches on one problem of a recipe, with equal numbers of plans; every plan is paid for once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from autocompress.agents import ALONE, SEARCHES, Workers, evaluated_by, least_plans, make_search
from autocompress.core import Ledger, Plan, Problem, Scored, Search, Trial
from autocompress.core.errors import RecipeError, RunDirectoryError
from autocompress.core.wording import did_you_mean
from autocompress.pipeline import stages
from autocompress.pipeline.arch_stage import search_architecture
from autocompress.pipeline.bit_score import BitScore
from autocompress.pipeline.contest_outcome import Attempt, Outcome
from autocompress.pipeline.contest_report import write_contest_report
from autocompress.pipeline.prepare import Prepared, prepare
from autocompress.pipeline.problems import bit_problem_of, channel_problem_of, problems_of, searches_of
from autocompress.pipeline.progress import OnEvent, silent
from autocompress.pipeline.quick_score import QuickScore
from autocompress.pipeline.recipe import Recipe, Stage
from autocompress.pipeline.run import absolute_paths, check_inputs, recipe_threads
from autocompress.pipeline.run_directory import LEDGER, RunDirectory
from autocompress.pipeline.search_stage import Shown, search_channels

_Score = TypeVar("_Score")

CONTEST = "contest.json"
CONTESTED: tuple[Stage, ...] = ("prune", "quantise")


@dataclass(frozen=True)
class Contest:
    """What is compared: searches that all get the same problem, seeds and number of plans.

    Args:
        stage: whose problem it is.
        searches: by name; the stage's own has the recipe's settings, the others their defaults.
        num_seeds: each search runs with so many seeds, the recipe's and the following ones.
        num_plans: of each search and seed.
    """

    stage: Stage
    searches: tuple[str, ...]
    num_seeds: int
    num_plans: int

    def made(self, recipe: Recipe) -> dict[str, Search]:
        """The searches."""
        own = searches_of(recipe)[self.stage]
        return {
            name: make_search(name, own.settings if name == own.algorithm else {}) for name in self.searches
        }


def contest_of(
    recipe: Recipe,
    *,
    searches: Sequence[str] = (),
    stage: str | None = None,
    num_seeds: int = 3,
    num_plans: int | None = None,
) -> Contest:
    """A contest on one of a recipe's stages, checked as far as that goes without its networks.

    Args:
        recipe: with stage prune or quantise.
        searches: names; none for the stage's own search and its baselines.
        stage: ``prune`` or ``quantise``; None for the only one there is.
        num_seeds: at least 1.
        num_plans: of each search and seed; None for what the recipe says.

    Raises:
        RecipeError: names every fault.
    """
    there = [one for one in CONTESTED if one in recipe.stages]
    if not there:
        raise RecipeError(f"searches are compared on stages prune and quantise; {recipe.name} has neither")
    if stage is None and len(there) > 1:
        raise RecipeError(f"{recipe.name} searches in stages prune and quantise; name one with --stage")
    if stage is not None and stage not in there:
        raise RecipeError(f"{recipe.name} has no searching stage {stage!r}; it has {', '.join(there)}")
    chosen: Stage = next(one for one in there if stage in (None, one))
    if recipe.is_series:
        raise RecipeError(
            f"searches are compared within one limit; {recipe.name} has several: --set budgets=..."
        )
    own = searches_of(recipe)[chosen]
    names = tuple(dict.fromkeys(searches or (own.algorithm, *own.baselines)))
    faults = [f"no search named {n!r}{did_you_mean(n, SEARCHES)}" for n in names if n not in SEARCHES]
    if chosen == "prune" and "milp" in names:
        faults.append("milp decides bits only; leave it out for stage prune")
    plans = own.num_plans if num_plans is None else num_plans
    faults += [
        f"{what} must be >= 1, got {n}" for what, n in (("seeds", num_seeds), ("plans", plans)) if n < 1
    ]
    if faults:
        raise RecipeError(faults)
    return Contest(chosen, names, num_seeds, plans)


def run_contest(
    recipe: Recipe,
    contest: Contest,
    *,
    out: Path | None = None,
    workers: Workers = ALONE,
    on_event: OnEvent = silent,
) -> Outcome:
    """Run the stages before the contested one as the recipe says, then every search on its problem.

    Everything that can be checked is checked before the first file is written.

    Args:
        recipe: names its networks and data.
        contest: of :func:`contest_of`.
        out: folder of the run; ``runs/<name>-<stage>-searches`` with the next free number when absent.
        workers: who scores batches of plans; changes no result.
        on_event: called while it works.

    Raises:
        AutocompressError: any of its kinds.
    """
    with recipe_threads(recipe):
        recipe = absolute_paths(recipe)
        prepared = prepare(recipe)
        _check_plans(prepared, contest)
        name = f"{recipe.name}-{contest.stage}-searches"
        path = out or RunDirectory.next_free(Path("runs"), name)
        with RunDirectory.create(path, recipe) as directory:
            directory.write_json(CONTEST, asdict(contest))
            return _run(stages.Run(prepared, directory, on_event, workers), contest)


def resume_contest(path: Path, *, workers: Workers = ALONE, on_event: OnEvent = silent) -> Outcome:
    """Go on with a contest that was stopped or killed; it ends as if it had not been.

    Raises:
        RunDirectoryError: not the directory of a contest, or in use.
    """
    with RunDirectory.open(path) as directory:
        contest = _stored(directory)
        recipe = directory.recipe
        with recipe_threads(recipe):
            return _run(stages.Run(prepare(recipe), directory, on_event, workers), contest)


def _stored(directory: RunDirectory) -> Contest:
    stored = directory.read_json(CONTEST)
    if stored is None:
        raise RunDirectoryError(
            f"{directory.path} holds no {CONTEST}, so it is not of `autocompress search`; "
            "`autocompress run --resume` goes on with runs of recipes"
        )
    try:
        return Contest(**(stored | {"searches": tuple(stored["searches"])}))
    except (TypeError, KeyError) as fault:
        raise RunDirectoryError(f"{directory.path / CONTEST} is damaged: {fault!r}; start anew") from fault


def _check_plans(prepared: Prepared, contest: Contest) -> None:
    """Refuse searches that cannot work with so few plans."""
    faults = []
    for candidate in prepared.candidates:
        num_knobs = len(problems_of(candidate, prepared.recipe)[contest.stage].knobs)
        for name, search in contest.made(prepared.recipe).items():
            least = least_plans(search, num_knobs)
            if contest.num_plans < least:
                faults.append(
                    f"{name} needs at least {least} plans for {num_knobs} knobs, got {contest.num_plans}"
                )
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))


def _run(run: stages.Run, contest: Contest) -> Outcome:
    check_inputs(run)
    problem = _problem(run, contest.stage)
    problem.reachable()
    attempts: list[Attempt] = []
    with (
        Ledger(run.directory.path / LEDGER) as ledger,
        evaluated_by(problem, run.workers) as shared,
    ):
        recorded = ledger.in_front_of(shared)
        for seed in range(run.prepared.recipe.seed, run.prepared.recipe.seed + contest.num_seeds):
            for name, search in contest.made(run.prepared.recipe).items():
                shown = Shown(run, f"{name}, seed {seed}", recorded, contest.num_plans)
                attempts.append(_attempt(search, recorded, ledger, name=name, seed=seed, shown=shown))
    name, folder = run.prepared.recipe.name, run.directory.path
    outcome = Outcome(name, contest.stage, contest.num_plans, problem.budgets, attempts, folder)
    write_contest_report(outcome, run.directory)
    return outcome


def _attempt(
    search: Search, problem: Problem, ledger: Ledger, *, name: str, seed: int, shown: Shown
) -> Attempt:
    """One search with one seed, and what it would take on its own, without plans that others paid for."""
    meter = _Meter(problem)
    start = time.perf_counter()
    result = search(meter.problem, num_plans=shown.total, seed=seed, callbacks=(shown, meter.notice))
    thinking = time.perf_counter() - start - meter.seconds
    shown.end(result)
    entries = [ledger.get(problem, plan) for plan in meter.plans]
    scoring = sum(entry.seconds for entry in entries if entry is not None)
    return Attempt(name, seed, result.trials, tuple(meter.scored_at), thinking, scoring)


class _Meter:
    """Counts what a search has scored, and times how long it waited for that.

    Args:
        problem: what is searched.

    Attributes:
        problem: the same, to be given to the search.
        plans: all different plans that were scored, within the budgets or not.
        scored_at: for every trial, how many plans had been scored when it was known.
        seconds: waited for scores.
    """

    def __init__(self, problem: Problem) -> None:
        self._evaluate, self._evaluate_many = problem.evaluate, problem.evaluate_many
        self.problem = replace(
            problem, evaluate=self._one, evaluate_many=self._many if problem.evaluate_many else None
        )
        self.plans: dict[Plan, None] = {}
        self.scored_at: list[int] = []
        self.seconds = 0.0
        self._num_scored = 0

    def notice(self, trial: Trial) -> None:
        """Called after every trial."""
        self.scored_at.append(self._num_scored)

    def _one(self, plan: Plan) -> float:
        return self._timed(plan, lambda: self._evaluate(plan))

    def _many(self, plans: Sequence[Plan]) -> Iterator[Scored]:
        assert self._evaluate_many is not None  # for the type checker
        found = iter(self._evaluate_many(plans))
        for plan in plans:
            yield self._timed(plan, lambda: next(found))

    def _timed(self, plan: Plan, score: Callable[[], _Score]) -> _Score:
        start = time.perf_counter()
        scored = score()
        self.seconds += time.perf_counter() - start
        self.plans[plan] = None
        self._num_scored += 1
        return scored


def _problem(run: stages.Run, stage: Stage) -> Problem:
    """The contested problem, after the stages before it."""
    prepared = run.prepared
    if prepared.architectures:
        found = search_architecture(run, prepared.architectures)
        run.prepared = prepared = replace(prepared, candidates=(found,))
    recipe, data = prepared.recipe, prepared.data
    candidate = stages.train(run)
    if stage == "prune":
        quick = QuickScore(candidate.model, candidate.traced, data, settings=recipe.prune, seed=recipe.seed)
        return channel_problem_of(candidate, recipe, quick)
    pruned, model = Plan(), candidate.model
    if "prune" in recipe.stages:
        pruned, model = search_channels(run, candidate)
        model = stages.finetune(run, candidate, model)
    score = BitScore(model, data, settings=recipe.quantise, seed=recipe.seed)
    return bit_problem_of(candidate, recipe, score, pruned=pruned)
