"""Plans scored on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress.agents import Workers, evaluated_by, make_search
from autocompress.core import Plan, Problem
from autocompress.core.errors import WorkerError
from autocompress.testing import waterfilling_problem

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Any:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def noting(problem: Problem, file: Path, *, fatal: str = "") -> Problem:
    """Every evaluation leaves its plan and node; the first one of the fatal plan ends its process."""
    evaluate = problem.evaluate

    def noted(plan: Plan) -> float:
        import ray

        with file.open("a") as lines:
            lines.write(f"{plan.digest} {ray.get_runtime_context().get_node_id()}\n")
        if plan.digest == fatal and file.read_text().count(fatal) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(plan)

    return replace(problem, evaluate=noted)


def test_two_nodes_find_what_one_process_finds(cluster: Any, tmp_path: Path) -> None:
    problem = waterfilling_problem(0, num_layers=3)[0]
    alone = make_search("cma_es", {})(problem, num_plans=20, seed=0)
    there = noting(problem, tmp_path / "calls")
    with evaluated_by(there, Workers(ray_address=cluster.address)) as shared:
        found = make_search("cma_es", {})(shared, num_plans=20, seed=0)
    assert [(t.plan, t.score) for t in found.trials] == [(t.plan, t.score) for t in alone.trials]
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(digest for digest, _ in calls) == sorted(trial.plan.digest for trial in alone.trials)
    assert len({node for _, node in calls}) == 2


def test_a_worker_that_dies_on_a_node_costs_one_evaluation(cluster: Any, tmp_path: Path) -> None:
    problem = waterfilling_problem(0, num_layers=3)[0]
    plans = [problem.plan([20 + i, 20, 20]) for i in range(6)]
    there = noting(problem, tmp_path / "calls", fatal=plans[1].digest)
    with evaluated_by(there, Workers(2, cluster.address)) as shared:
        found = [scored.score for scored in shared.score_many(plans)]
    assert found == [problem.evaluate(plan) for plan in plans]
    assert len((tmp_path / "calls").read_text().splitlines()) == len(plans) + 1


def test_a_fault_in_a_worker_is_raised_as_it_was(cluster: Any) -> None:
    problem = waterfilling_problem(0, num_layers=3)[0]

    def evaluate(plan: Plan) -> float:
        raise WorkerError("no score today")

    with (
        evaluated_by(replace(problem, evaluate=evaluate), Workers(2, cluster.address)) as shared,
        pytest.raises(WorkerError, match="no score today"),
    ):
        list(shared.score_many([problem.plan([20, 20, 20])]))


def test_a_cluster_that_is_not_there_is_named() -> None:
    problem = waterfilling_problem(0, num_layers=3)[0]
    with (
        pytest.raises(WorkerError, match=r"no Ray cluster at '127\.0\.0\.1:1'"),
        evaluated_by(problem, Workers(ray_address="127.0.0.1:1")),
    ):
        pass
