"""The stages that search: channels, then bits; every scored plan is paid for once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autocompress.agents import evaluated_by
from autocompress.core import Bits, Ledger, Plan, Problem, SearchResult, Trial, finalists
from autocompress.pipeline.bit_score import BitScore, uniform_plan
from autocompress.pipeline.problems import (
    Candidate,
    bit_problem_of,
    channel_problem_of,
    made_searches,
    searches_of,
)
from autocompress.pipeline.progress import Event
from autocompress.pipeline.quick_score import QuickScore
from autocompress.pipeline.recipe import Stage
from autocompress.pipeline.run_directory import LEDGER
from autocompress.pipeline.stages import Run
from autocompress.quant import QuantTables
from autocompress.quant.stored import structure_of

EARLIER = "tighter budgets"
"""Who found a plan that the search of a tighter budget of the same series had scored."""


def search_channels(run: Run, candidate: Candidate) -> tuple[Plan, nn.Module]:
    """The plan of channels that was found, and the pruned and repaired network; nothing is trained."""
    recipe = run.prepared.recipe
    with run.timed("prune"):
        run.on_event(Event("analyse channels", 0, 1))
        score = QuickScore(
            candidate.model, candidate.traced, run.prepared.data, settings=recipe.prune, seed=recipe.seed
        )
        run.on_event(Event("analyse channels", 1, 1))
        plan = search_plan(run, "prune", channel_problem_of(candidate, recipe, score))
        return plan, score.build(plan)


def search_bits(run: Run, candidate: Candidate, model: nn.Module, pruned: Plan) -> tuple[Plan, BitScore]:
    """The plan of bits that was found, with the channels of the plan before, and what makes its network.

    Args:
        run: the run.
        candidate: the network as it was before pruning.
        model: the network whose bits are looked for.
        pruned: what was done to it.
    """
    recipe = run.prepared.recipe
    with run.timed("quantise"):
        score = calibrated(run, model)
        problem = bit_problem_of(candidate, recipe, score, pruned=pruned)
        plan = search_plan(run, "quantise", problem)
        run.directory.write_json("uniform.json", _uniform_points(run, candidate, problem, pruned))
        return plan, score


def calibrated(run: Run, model: nn.Module) -> BitScore:
    """What rounds a network as the recipe says; its quantisers' structure is written down."""
    recipe = run.prepared.recipe
    run.on_event(Event("analyse ranges", 0, 1))
    score = BitScore(model, run.prepared.data, settings=recipe.quantise, seed=recipe.seed)
    run.on_event(Event("analyse ranges", 1, 1))
    if isinstance(score.tables, QuantTables):
        run.directory.write_json("quantisers.json", structure_of(score.tables.calibration))
    return score


def search_plan(run: Run, stage: Stage, problem: Problem) -> Plan:
    """Run the stage's search, and its baselines with as many plans; the best plan of all is taken.

    Where plans can be scored with more effort, the best ones are before one is taken.

    Every evaluated plan is in the ledger before the next begins, so a repeated call fast-forwards.
    """
    settings = searches_of(run.prepared.recipe)[stage]
    results: dict[str, SearchResult] = {}
    seconds: dict[str, float] = {}
    problem.reachable()
    with _ledger(run) as ledger, evaluated_by(problem, run.workers) as shared:
        recorded = ledger.in_front_of(shared)
        for name, search in made_searches(settings).items():
            start = time.perf_counter()
            shown = Shown(run, f"{stage} {name}", recorded, settings.num_plans)
            results[name] = search(
                recorded, num_plans=settings.num_plans, seed=run.prepared.recipe.seed, callbacks=(shown,)
            )
            shown.end(results[name])
            seconds[name] = time.perf_counter() - start
            run.trials[stage] = {k: trials_of(v.trials) for k, v in results.items()}
            run.directory.write_json("trials.json", run.trials)
    known = [t for t in run.earlier.get(problem.digest, ()) if problem.meets_budgets(problem.price(t.plan))]
    if known:
        results[EARLIER] = SearchResult(tuple(known))
    winner = max(results, key=lambda name: (results[name].best.score, name == settings.algorithm))
    best = results[winner].best
    finals = _finals(run, stage, problem, list(results.values()), settings.finalists)
    if finals:
        best = max(finals, key=lambda trial: trial.score)
        winner = next(n for n, r in results.items() if any(t.plan == best.plan for t in r.trials))
    run.directory.write("plan.json", best.plan.to_json() + "\n")
    run.found[stage] = {
        "algorithm": settings.algorithm,
        "num_plans": settings.num_plans,
        "problem": problem.digest,
        "best_score": results[settings.algorithm].best.score,
        "found_by": winner,
        "seconds": seconds[settings.algorithm],
        "baselines": {n: r.best.score for n, r in results.items() if n != settings.algorithm},
        "budgets": {budget.metric: budget.limit for budget in problem.budgets},
        "finals": trials_of(finals),
    }
    return best.plan


def _finals(
    run: Run, stage: Stage, problem: Problem, results: Sequence[SearchResult], count: int
) -> list[Trial]:
    """The best trials, scored with more effort; empty where there is none to take or none is wanted."""
    full = problem.finals()
    if full is None or count == 0:
        return []
    chosen = finalists(results, count)
    label = f"{stage} finals"
    run.on_event(Event(label, 0, len(chosen)))
    scored: list[Trial] = []
    with _ledger(run) as ledger, evaluated_by(full, run.workers) as shared:
        scores = ledger.in_front_of(shared).score_many([trial.plan for trial in chosen])
        for index, (trial, (score, seconds)) in enumerate(zip(chosen, scores, strict=True)):
            scored.append(replace(trial, score=score, seconds=seconds, index=index))
            run.on_event(Event(label, index + 1, len(chosen), {"score": f"{score:.2%}"}))
    return scored


def _ledger(run: Run) -> Ledger:
    return Ledger(run.ledger or run.directory.path / LEDGER)


@dataclass
class Shown:
    """Tells of every trial of one search."""

    run: Run
    stage: str
    problem: Problem
    total: int
    best: float = float("-inf")

    def __post_init__(self) -> None:
        self.run.on_event(Event(self.stage, 0, self.total))

    def __call__(self, trial: Trial) -> None:
        """Tell of one trial."""
        self.best = max(self.best, trial.score)
        budget = self.problem.budgets[0]
        figures = {
            "score": f"{trial.score:.2%}",
            "best": f"{self.best:.2%}",
            "budget used": f"{trial.cost[budget.metric] / budget.limit:.0%} of {budget.metric}",
        }
        self.run.on_event(Event(self.stage, trial.index + 1, self.total, figures))

    def end(self, result: SearchResult) -> None:
        """Tell that the search is over."""
        self.run.on_event(Event(self.stage, self.total, self.total, {"best": f"{result.best.score:.2%}"}))


def trials_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Trials as they are written to ``trials.json``."""
    return [
        {
            "index": trial.index,
            "score": trial.score,
            "cost": dict(trial.cost.totals),
            "source": trial.source,
            "seconds": trial.seconds,
            "plan": json.loads(trial.plan.to_json()),
        }
        for trial in trials
    ]


def _uniform_points(
    run: Run, candidate: Candidate, problem: Problem, pruned: Plan
) -> list[Mapping[str, Any]]:
    """Score and cost with the same bits in every layer that may have them, within the budgets or not."""
    settings = run.prepared.recipe.quantise
    points: list[Mapping[str, Any]] = []
    with _ledger(run) as ledger:
        recorded = ledger.in_front_of(problem)
        for bits in settings.weight_bits:
            if settings.act_bits and bits not in settings.act_bits:
                continue
            both = Bits(bits, bits if settings.act_bits else 32)
            chosen = uniform_plan(candidate.traced.graph, both, settings=settings)
            plan = Plan(channels=pruned.channels, bits=chosen.bits)
            cost = dict(recorded.price(plan).totals)
            points.append({"bits": bits, "score": recorded.evaluate(plan), "cost": cost})
    return points
