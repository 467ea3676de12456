"""Regularised evolution keeps budgets and its seed, and beats chance on an additive table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from nas_tables import random_table

from autocompress.core import Budget, Cost, Knob, Plan, Problem
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.nas.evolution import RegularizedEvolution
from autocompress.nas.reinforce import ReinforceSearch

SHAPE = (6, 7)


def table_problem(seed: int, limit: float | None) -> tuple[Problem, np.ndarray, np.ndarray]:
    """Six decisions of seven operations; scores and costs are sums, costs ascend within a decision."""
    scores, costs = random_table(SHAPE, seed), np.sort(random_table(SHAPE, 100 + seed), axis=1)
    names = [f"d{i}" for i in range(SHAPE[0])]

    def total(table: np.ndarray, plan: Plan) -> float:
        return float(sum(table[i, int(plan.arch[name][1:])] for i, name in enumerate(names)))

    budgets = () if limit is None else (Budget("latency_ms", limit, relative=False),)
    knobs = tuple(Knob("arch", name, tuple(f"o{j}" for j in range(SHAPE[1]))) for name in names)
    problem = Problem(
        knobs,
        budgets,
        lambda plan: Cost({"latency_ms": total(costs, plan)}),
        lambda plan: total(scores, plan),
    )
    return problem, scores, costs


def best_within(scores: np.ndarray, costs: np.ndarray, limit: float) -> float:
    pairs = (
        (sum(s), sum(c)) for s, c in zip(itertools.product(*scores), itertools.product(*costs), strict=True)
    )
    return max(score for score, cost in pairs if cost <= limit)


def test_every_trial_keeps_the_budget_and_none_is_assessed_twice() -> None:
    problem, _, _ = table_problem(0, 2.5)
    trials = RegularizedEvolution(population=20, sample=5)(problem, num_plans=150, seed=0).trials
    assert all(trial.cost["latency_ms"] <= 2.5 for trial in trials)
    assert len({trial.plan for trial in trials}) == 150
    assert {trial.source for trial in trials} == {"random", "mutation"}


def test_the_same_seed_gives_the_same_trials() -> None:
    found = [
        RegularizedEvolution(population=10, sample=3)(table_problem(1, 3.0)[0], num_plans=40, seed=s).trials
        for s in (0, 0, 1)
    ]
    plans = [[trial.plan for trial in trials] for trials in found]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize("seed", range(3))
def test_600_plans_come_within_a_twentieth_of_the_best_of_117649(seed: int) -> None:
    problem, scores, costs = table_problem(seed, 2.5)
    best = RegularizedEvolution()(problem, num_plans=600, seed=seed).best.score
    assert best >= 0.95 * best_within(scores, costs, 2.5)


def test_a_budget_out_of_reach_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InfeasibleBudgetError):
        RegularizedEvolution()(table_problem(0, 1e-6)[0], num_plans=1, seed=0)
    with pytest.raises(RecipeError) as caught:
        RegularizedEvolution(population=1, sample=5, num_mutations=0)
    assert len(caught.value.faults) == 3


def test_a_policy_learnt_from_rewards_keeps_the_budget_and_its_seed_and_beats_its_first_plans() -> None:
    problem, _, _ = table_problem(0, 2.5)
    trials = ReinforceSearch()(problem, num_plans=300, seed=0).trials
    assert all(trial.cost["latency_ms"] <= 2.5 for trial in trials)
    again = ReinforceSearch()(table_problem(0, 2.5)[0], num_plans=300, seed=0).trials
    assert [trial.plan for trial in trials] == [trial.plan for trial in again]
    assert np.mean([t.score for t in trials[-50:]]) > np.mean([t.score for t in trials[:50]]) + 0.3
    with pytest.raises(RecipeError) as caught:
        ReinforceSearch(lr=0.0, batch=0, decay=1.0)
    assert len(caught.value.faults) == 3
