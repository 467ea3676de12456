"""How well the quick score ranks plans: some of a run's plans are fine-tuned, and the two are compared."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from autocompress.core import Ledger, Problem
from autocompress.core.errors import RecipeError, RunDirectoryError
from autocompress.core.ledger import Entry
from autocompress.pipeline import stages
from autocompress.pipeline.anchor import anchor
from autocompress.pipeline.arch_stage import search_architecture
from autocompress.pipeline.fidelity_outcome import Fidelity, Tuned, write_fidelity
from autocompress.pipeline.prepare import prepare
from autocompress.pipeline.problems import Candidate, channel_problem_of
from autocompress.pipeline.progress import Event, OnEvent, silent
from autocompress.pipeline.quick_score import QuickScore
from autocompress.pipeline.recipe import Recipe
from autocompress.pipeline.run import check_inputs, recipe_threads
from autocompress.pipeline.run_directory import LEDGER, RunDirectory
from autocompress.training import TrainSettings, evaluate, fit, weights_digest

FOLDER = "fidelity"
LEAST = 3
"""Two plans are always in perfect order or in perfect disorder."""


def measure_fidelity(
    path: Path, *, num_plans: int = 12, epochs: int | None = None, on_event: OnEvent = silent
) -> Fidelity:
    """Fine-tune plans that a run has scored, and say how well the scores ranked them.

    The plans are taken from the run's ledger, among those within its budgets, evenly over the ranks of their
    quick scores, from the worst to the best. Each is fine-tuned as the recipe says and then measured on the
    whole search split: the figure is there to choose how to score and search, and the test split must not
    choose anything. The quick score has seen some of the same images, but neither score was trained on them.

    Each fine-tuned plan is written to ``fidelity/`` in the run's folder when it is done, and training
    checkpoints by epoch, so that a call that was killed goes on when it is repeated.

    Args:
        path: folder of a run or of a comparison of searches, finished or searched at least.
        num_plans: at most so many plans; all where the ledger has fewer.
        epochs: of fine-tuning; None for the recipe's.
        on_event: called while it works.

    Raises:
        RecipeError: too few plans or epochs, or a recipe without stage prune.
        RunDirectoryError: not a run directory, in use, started from Python, or with too few plans scored.
    """
    low = {"plans": (num_plans, LEAST), "epochs": (1 if epochs is None else epochs, 1)}
    if faults := [f"{what} must be >= {least}, got {n}" for what, (n, least) in low.items() if n < least]:
        raise RecipeError(faults)
    with RunDirectory.open(path) as directory:
        recipe = directory.recipe
        _check(recipe, path)
        _check_number(_num_scored(path), path)
        with recipe_threads(recipe):
            run = stages.Run(prepare(recipe), directory, on_event)
            return _measure(run, num_plans, epochs)


def spread_over_ranks(entries: Sequence[Entry], count: int) -> list[Entry]:
    """At most ``count`` entries, evenly over the ranks of their scores, worst and best included.

    Of equal scores, the order is that of the plans' digests.
    """
    ranked = sorted(entries, key=lambda entry: (entry.score, entry.plan.digest))
    if len(ranked) <= count:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count)]


def _check(recipe: Recipe, path: Path) -> None:
    if recipe.data is None or not (recipe.model or "nas" in recipe.stages):
        raise RunDirectoryError(
            f"{path} was started from Python with its own model and data; fidelity needs a recipe that names "
            "both (model: package.module:factory works)"
        )
    if "prune" not in recipe.stages:
        raise RecipeError(
            f"fidelity is about plans of channels, and {recipe.name} has no stage prune; give it another run"
        )


def _measure(run: stages.Run, num_plans: int, epochs: int | None) -> Fidelity:
    check_inputs(run)
    anchor(run)
    if run.prepared.architectures:
        found = search_architecture(run, run.prepared.architectures)
        run.prepared = replace(run.prepared, candidates=(found,))
    recipe, data = run.prepared.recipe, run.prepared.data
    candidate = stages.train(run)
    quick = QuickScore(candidate.model, candidate.traced, data, settings=recipe.prune, seed=recipe.seed)
    problem = channel_problem_of(candidate, recipe, quick)
    chosen = spread_over_ranks(_entries(run, problem), num_plans)
    settings = _settings(recipe, epochs)
    run.on_event(Event("fine-tune plans", 0, len(chosen)))
    tuned: list[Tuned] = []
    for entry in chosen:
        tuned.append(_tuned(run, candidate, quick, entry, settings=settings))
        figures = {"quick": f"{tuned[-1].score:.2%}", "fine-tuned": f"{tuned[-1].accuracy:.2%}"}
        run.on_event(Event("fine-tune plans", len(tuned), len(chosen), figures))
    fidelity = Fidelity(recipe.name, settings.epochs, tuple(tuned), run.directory.path)
    write_fidelity(fidelity, run.directory)
    return fidelity


def _settings(recipe: Recipe, epochs: int | None) -> TrainSettings:
    settings = TrainSettings(**recipe.finetune.model_dump())
    if epochs is None:
        return settings
    return replace(settings, epochs=epochs, warmup_epochs=min(settings.warmup_epochs, epochs - 1))


def _entries(run: stages.Run, problem: Problem) -> list[Entry]:
    """The scored plans within the budgets."""
    with Ledger(run.directory.path / LEDGER) as ledger:
        entries = [e for e in ledger.entries(problem) if problem.meets_budgets(problem.price(e.plan))]
    _check_number(len(entries), run.directory.path)
    return entries


def _num_scored(path: Path) -> int:
    """Scored plans of all kinds: an upper bound that is known before the network is."""
    if not (path / LEDGER).exists():
        return 0
    with Ledger(path / LEDGER) as ledger:
        return len(ledger.entries())


def _check_number(number: int, path: Path) -> None:
    if number < LEAST:
        raise RunDirectoryError(
            f"{path} holds {number} scored plans within its budgets, and a correlation takes {LEAST}; "
            "finish its search (autocompress run --resume), or let it score more plans (search.num_plans)"
        )


def _tuned(
    run: stages.Run, candidate: Candidate, quick: QuickScore, entry: Entry, *, settings: TrainSettings
) -> Tuned:
    """One plan fine-tuned, or read if it was before."""
    recipe, data = run.prepared.recipe, run.prepared.data
    small = copy.deepcopy(quick.build(entry.plan))
    name = f"{FOLDER}/{entry.plan.digest}-{_digest(small, settings, recipe.seed)}.json"
    stored = run.directory.read_json(name)
    if stored is None:
        (run.directory.path / FOLDER).mkdir(exist_ok=True)
        checkpoint = (run.directory.path / name).with_suffix(".checkpoint")
        start = time.perf_counter()
        fit(small, data, settings, seed=recipe.seed, teacher=candidate.model, checkpoint=checkpoint)
        accuracy = evaluate(small, data.search).accuracy
        stored = {"accuracy": accuracy, "seconds": time.perf_counter() - start}
        run.directory.write_json(name, stored)
        checkpoint.unlink()
    return Tuned(entry.plan, entry.score, stored["accuracy"], entry.cost, stored["seconds"])


def _digest(model: nn.Module, settings: TrainSettings, seed: int) -> str:
    """Of all that decides what fine-tuning ends with, so that no other figure is taken for it."""
    return hashlib.sha256(f"{weights_digest(model)} {settings} {seed}".encode()).hexdigest()[:8]
