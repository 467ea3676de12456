"""The stage that finds the network: a supernet is trained, and one of its members taken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from autocompress.core import Ledger, Plan, Problem, Trial
from autocompress.nas import CostTerm, PathScore, RegularizedEvolution, Supernet, SupernetSearch
from autocompress.nas import SearchSettings as SupernetSettings
from autocompress.nas.spaces import operation_costs
from autocompress.nas.supernet import SearchEpoch, load_supernet
from autocompress.pipeline.architectures import (
    CHECKPOINT,
    FOUND,
    Architectures,
    can_go_on,
    method_of,
    supernet_file,
    tightened,
)
from autocompress.pipeline.costs import Counted
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.progress import Event
from autocompress.pipeline.run_directory import LEDGER
from autocompress.pipeline.search_stage import Shown, trials_of
from autocompress.pipeline.stages import Run
from autocompress.training import weights_digest

_POPULATION = 50


def search_architecture(run: Run, architectures: Architectures) -> Candidate:
    """The member that was found, with fresh weights.

    A repeated call goes on where the last one stopped, and trains nothing twice.

    Raises:
        InfeasibleBudgetError: no member that can be derived leaves the stages after this one a way.
    """
    recipe = run.prepared.recipe
    with run.timed("nas"):
        found = run.directory.read_json(FOUND)
        if found is None:
            found = _search(run, architectures)
            run.directory.write_json(FOUND, found)
    if "trials" in found:
        run.trials["nas"], run.found["nas"] = found["trials"], found["found"]
        run.directory.write_json("trials.json", run.trials)
    run.decided = Plan(arch=found["arch"])
    return architectures.candidate(found["arch"], recipe)


def _search(run: Run, architectures: Architectures) -> dict[str, Any]:
    supernet, reports = _supernet(run, architectures)
    problem = architectures.problem
    while True:
        plan = architectures.within(supernet.probability_table(), problem.budgets)
        scored: dict[str, Any] = {}
        if run.prepared.recipe.nas.num_plans:
            plan, scored = _scored(run, problem, supernet, plan)
        if can_go_on(architectures.candidate(plan.arch, run.prepared.recipe), run.prepared.recipe):
            break
        problem = tightened(problem)
    return {
        "arch": dict(plan.arch),
        "space": architectures.space.name,
        "decisions": {name: list(ops) for name, ops in architectures.space.decisions.items()},
        "probabilities": {name: p.tolist() for name, p in supernet.probability_table().items()},
        "cost": dict(problem.price(plan).totals),
        "largest": dict(architectures.problem.largest.totals),
        "smallest": dict(architectures.problem.smallest.totals),
        "budgets": {budget.metric: budget.limit for budget in problem.budgets},
        "epochs": [asdict(report) for report in reports],
        **scored,
    }


def _supernet(run: Run, architectures: Architectures) -> tuple[Supernet, tuple[SearchEpoch, ...]]:
    """The trained supernet, or the one of another run."""
    recipe, space = run.prepared.recipe, architectures.space
    settings, method = recipe.nas, method_of(recipe.nas)
    if (path := supernet_file(settings)) is not None:
        supernet = Supernet(space, seed=recipe.seed, affine=method.affine)
        load_supernet(path, supernet)
        supernet.network.to(recipe.device)
        return supernet, ()

    def on_epoch(report: SearchEpoch) -> None:
        figures = {"loss": f"{report.loss:.3f}", "accuracy": f"{report.accuracy:.2%}"}
        if report.expected_cost is not None:
            figures["expected"] = f"{report.expected_cost / budget.limit:.0%} of {budget.metric}"
        run.on_event(Event("nas", report.epoch + 1, settings.epochs, figures))

    budget = architectures.problem.budgets[0]
    costs = operation_costs(
        space,
        Counted(architectures.largest.costs.target),
        budget.metric,
        bits=architectures.largest.costs.bits,
    )
    weights = SupernetSettings(
        epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        min_lr=min(settings.min_lr, settings.lr),
        weight_decay=settings.weight_decay,
    )
    run.on_event(Event("nas", 0, settings.epochs))
    result = SupernetSearch(
        method, weights, CostTerm(costs, budget.limit, "add_excess", settings.cost_weight)
    )(
        space,
        run.prepared.data,
        seed=recipe.seed,
        checkpoint=run.directory.path / CHECKPOINT,
        on_epoch=on_epoch,
        device=recipe.device,
    )
    run.on_event(Event("nas", settings.epochs, settings.epochs))
    return result.supernet, result.reports


def _scored(run: Run, problem: Problem, supernet: Supernet, derived: Plan) -> tuple[Plan, dict[str, Any]]:
    """The best by the accuracy with the supernet's weights: of evolution, and of the derived member."""
    recipe = run.prepared.recipe
    settings = recipe.nas
    score = PathScore(supernet, run.prepared.data.search, settings.score_images)
    known = Counted(run.prepared.candidates[0].costs.target).name
    scored = replace(
        problem,
        evaluate=score,
        identity=f"paths {weights_digest(supernet)} {settings.score_images} {known}",
    )
    evolution = RegularizedEvolution(population=max(2, min(_POPULATION, settings.num_plans // 4)), sample=2)
    start = time.perf_counter()
    with Ledger(run.directory.path / LEDGER) as ledger:
        recorded = ledger.in_front_of(scored)
        values = [derived.arch[knob.name] for knob in problem.knobs]
        first = recorded.assess(values, index=0, source="distribution")
        shown = Shown(run, "nas evolution", recorded, settings.num_plans)
        result = evolution(recorded, num_plans=settings.num_plans, seed=recipe.seed, callbacks=(shown,))
        shown.end(result)
    trials: Mapping[str, list[dict[str, Any]]] = {
        "evolution": trials_of(result.trials),
        "distribution": trials_of((first,)),
    }
    best: Trial = max((first, result.best), key=lambda trial: trial.score)
    found = {
        "algorithm": "evolution",
        "num_plans": settings.num_plans,
        "best_score": result.best.score,
        "found_by": "distribution" if best is first else "evolution",
        "seconds": time.perf_counter() - start,
        "baselines": {"distribution": first.score},
        "budgets": {budget.metric: budget.limit for budget in problem.budgets},
    }
    return best.plan, {"trials": trials, "found": found}
