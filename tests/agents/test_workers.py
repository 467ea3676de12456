"""Worker processes: the same results as one process, and a killed worker costs one evaluation."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.agents import Workers, evaluated_by, make_search
from autocompress.core import Ledger, Plan, Problem
from autocompress.core.errors import RecipeError, WorkerError
from autocompress.testing import waterfilling_problem


def small() -> Problem:
    return waterfilling_problem(0, num_layers=3)[0]


def plans_of(problem: Problem, count: int) -> list[Plan]:
    return [problem.plan([20 + i, 20, 20]) for i in range(count)]


def scores_of(problem: Problem, plans: list[Plan]) -> list[float]:
    return [scored.score for scored in problem.score_many(plans)]


def falling(problem: Problem, at: Plan, folder: Path, *, times: int) -> Problem:
    """Every evaluation leaves a line with its plan and process; the first of one plan end their process."""
    evaluate, digest, calls = problem.evaluate, at.digest, folder / "calls"

    def noted(plan: Plan) -> float:
        with calls.open("a") as file:
            file.write(f"{plan.digest} {os.getpid()}\n")
        if plan.digest == digest and calls.read_text().count(digest) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(plan)

    return replace(problem, evaluate=noted)


def test_a_killed_worker_costs_one_evaluation_and_nothing_else(tmp_path):
    problem, plans = small(), plans_of(small(), 6)
    with evaluated_by(falling(problem, plans[2], tmp_path, times=1), Workers(2)) as shared:
        assert scores_of(shared, plans) == scores_of(problem, plans)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(digest for digest, _ in calls) == sorted(p.digest for p in [*plans, plans[2]])
    assert str(os.getpid()) not in {process for _, process in calls}


def test_faults_come_in_the_turn_of_their_plan_and_the_workers_go_on(tmp_path):
    problem, plans = small(), plans_of(small(), 4)
    bad = plans[1].digest

    def evaluate(plan: Plan) -> float:
        if plan.digest == bad:
            raise RecipeError(["no such plan"])
        return 0.5

    with evaluated_by(replace(problem, evaluate=evaluate), Workers(2)) as shared:
        found = shared.score_many(plans)
        assert next(found).score == 0.5
        with pytest.raises(RecipeError, match="no such plan"):
            next(found)
        assert scores_of(shared, plans[2:]) == [0.5, 0.5]


@pytest.mark.parametrize("name", ["random", "cma_es", "evolution", "greedy"])
def test_the_number_of_workers_does_not_change_a_search(name, tmp_path):
    # The workers of the two-process case are stood in for by a batch evaluator that notes what it is asked.
    problem, batches = small(), []

    def many(plans):
        batches.append(len(plans))
        return [problem.score(plan) for plan in plans]

    one = make_search(name, {})(problem, num_plans=20, seed=0)
    two = make_search(name, {})(replace(problem, evaluate_many=many), num_plans=20, seed=0)
    assert [(t.plan, t.score) for t in one.trials] == [(t.plan, t.score) for t in two.trials]
    assert max(batches) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "cma_es", "evolution", "greedy", "milp"])
def test_searches_with_three_processes_equal_searches_with_one(name):
    from autocompress.testing import bits_problem

    problem = bits_problem(0, num_layers=3)[0] if name == "milp" else small()
    with evaluated_by(problem, Workers(3)) as shared:
        one, three = (make_search(name, {})(given, num_plans=30, seed=0) for given in (problem, shared))
    assert [(t.plan, t.score) for t in one.trials] == [(t.plan, t.score) for t in three.trials]


@pytest.mark.slow
def test_a_plan_that_no_worker_survives_is_given_up_with_its_name(tmp_path):
    problem, plans = small(), plans_of(small(), 3)
    with (
        evaluated_by(falling(problem, plans[1], tmp_path, times=99), Workers(2)) as shared,
        pytest.raises(WorkerError, match=f"plan {plans[1].digest} brought down 3 workers .*SIGKILL"),
    ):
        scores_of(shared, plans)


def test_what_cannot_be_sent_is_refused_before_a_worker_starts():
    connection = Ledger(":memory:")
    unsendable = replace(small(), evaluate=lambda plan: float(len(connection.entries())))
    with (
        pytest.raises(WorkerError, match="cannot be sent to worker processes"),
        evaluated_by(unsendable, Workers(2)),
    ):
        pass


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(WorkerError, match="must be >= 1, got 0"):
        Workers(0)


def test_one_worker_is_this_process():
    problem = small()
    with evaluated_by(problem, Workers(1)) as same:
        assert same is problem


def test_a_ledger_in_front_of_workers_pays_for_each_plan_once():
    problem, asked = small(), []

    def many(plans):
        asked.extend(plans)
        return [problem.score(plan) for plan in plans]

    plans = plans_of(problem, 4)
    with Ledger(":memory:") as ledger:
        recorded = ledger.in_front_of(replace(problem, evaluate_many=many))
        recorded.assess([20, 20, 20], index=0)
        found = scores_of(recorded, [plans[0], plans[1], plans[1], plans[2]])
        assert found == [problem.evaluate(plans[i]) for i in (0, 1, 1, 2)]
        assert asked == plans[1:3]
        assert scores_of(recorded, plans) == [problem.evaluate(plan) for plan in plans]
    assert asked == plans[1:]


def test_what_was_scored_before_an_interrupt_is_in_the_ledger():
    problem, plans = small(), plans_of(small(), 5)
    with Ledger(":memory:") as ledger:
        found = ledger.in_front_of(
            replace(problem, evaluate_many=lambda plans: map(problem.score, plans))
        ).score_many(plans)
        next(found), next(found)
        assert [entry.plan for entry in ledger.entries()] == sorted(plans[:2], key=lambda plan: plan.digest)
