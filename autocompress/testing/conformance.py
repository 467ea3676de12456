"""Conformance checks for cost models, searches and environments."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from numpy.typing import NDArray

from autocompress.core import (
    Bits,
    CostModel,
    LayerGraph,
    Metric,
    Plan,
    Problem,
    Search,
    SearchResult,
    Trial,
)
from autocompress.testing.closed_forms import bits_problem, waterfilling_problem

_ADDITIVE: tuple[Metric, ...] = ("macs", "bitops")


class ConformanceError(AssertionError):
    """A part breaks its contract.

    Args:
        faults: every fault found, one line each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


def check_cost_model(model: CostModel, graph: LayerGraph) -> None:
    """Check a cost model on a network: repeatable, complete, monotone, and equal however it is asked.

    Fewer channels in any group, or 4 instead of 8 bits in any layer, must never raise a metric;
    ``price_many`` must agree with single calls to 1e-9; where a breakdown gives MACs or bit operations,
    the layers must sum to the total.

    Args:
        model: the cost model.
        graph: a network it can price, best with several prunable groups.

    Raises:
        ConformanceError: names every law broken.
    """
    eight = graph.with_bits({layer.name: Bits(8, 8) for layer in graph.layers})
    smaller = [(f"halving {g.name!r}", graph, _halved(graph, g.name)) for g in graph.prunable if g.size > 1]
    smaller += [
        (f"4 for 8 bits in {layer.name!r}", eight, eight.with_bits({layer.name: Bits(4, 4)}))
        for layer in graph.layers
    ]
    faults = _faults_of_cost(model, graph)
    for what, before, after in smaller:
        high, low = model(before), model(after)
        faults += [
            f"{model.name}: {what} raises {metric} from {high[metric]:.6g} to {low[metric]:.6g}"
            for metric in model.metrics
            if low[metric] > high[metric] * (1 + 1e-9)
        ]
    graphs = [graph, eight, *(after for _, _, after in smaller)]
    many = model.price_many(graphs)
    for metric in model.metrics:
        single = [model(g)[metric] for g in graphs]
        if metric not in many or not np.allclose(many[metric], single, rtol=1e-9, atol=0):
            faults.append(f"{model.name}: price_many differs from single calls in {metric}")
    _raise_if(faults)


def _halved(graph: LayerGraph, group: str) -> LayerGraph:
    return graph.with_channels({group: graph.group(group).size // 2})


def _faults_of_cost(model: CostModel, graph: LayerGraph) -> list[str]:
    cost, again = model(graph), model(graph)
    faults = []
    if dict(cost.totals) != dict(again.totals):
        faults.append(f"{model.name}: two calls on one graph give {cost.totals} and {again.totals}")
    if set(cost.totals) != set(model.metrics):
        faults.append(f"{model.name}: announces {sorted(model.metrics)}, gives {sorted(cost.totals)}")
    faults += [
        f"{model.name}: {metric} must be finite and >= 0, got {value}"
        for metric, value in cost.totals.items()
        if not (math.isfinite(value) and value >= 0)
    ]
    if unknown := sorted(set(cost.layers) - {layer.name for layer in graph.layers}):
        faults.append(f"{model.name}: breakdown names layers the network lacks: {unknown}")
    for metric in _ADDITIVE:
        parts = [layer[metric] for layer in cost.layers.values() if metric in layer]
        if parts and metric in cost.totals and not math.isclose(sum(parts), cost[metric], rel_tol=1e-9):
            faults.append(f"{model.name}: layers sum to {sum(parts):.6g} {metric}, total {cost[metric]:.6g}")
    return faults


def check_search(search: Search, problem: Problem | None = None, *, num_plans: int = 12) -> None:
    """Check a search: budgets, number of plans, callbacks, true scores, and equal seeds.

    Args:
        search: the search.
        problem: what to run it on; by default a water-filling problem of four knobs and, after it, a
            bit-width problem of four.
        num_plans: evaluations it may use.

    Raises:
        ConformanceError: names every law broken.
    """
    if problem is None:
        problems = [waterfilling_problem(0, num_layers=4)[0], bits_problem(0, num_layers=2)[0]]
    else:
        problems = [problem]
    _raise_if([fault for given in problems for fault in _faults_of_search(search, given, num_plans)])


def _faults_of_search(search: Search, problem: Problem, num_plans: int) -> list[str]:
    calls: list[Plan] = []
    seen: list[Trial] = []

    def counted(plan: Plan) -> float:
        calls.append(plan)
        return problem.evaluate(plan)

    before = _global_random_state()
    result = search(replace(problem, evaluate=counted), num_plans=num_plans, seed=1, callbacks=[seen.append])
    untouched = _global_random_state() == before
    again = search(problem, num_plans=num_plans, seed=1)
    rules = [
        (len(calls) <= num_plans, f"evaluated {len(calls)} plans, was allowed {num_plans}"),
        (seen == list(result.trials), "callbacks must see every trial once, in order"),
        (_outcome(result) == _outcome(again), "two runs with equal seeds must try equal plans"),
        (untouched, "the global random state must not change; use a generator made from the seed"),
    ]
    return [*_faults_of_trials(problem, result), *(fault for holds, fault in rules if not holds)]


def _global_random_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), state[1].tobytes(), state[2:]


def _outcome(result: SearchResult) -> tuple[list[tuple[Plan, float]], Plan | None]:
    return [(trial.plan, trial.score) for trial in result.trials], result.policy


def _faults_of_trials(problem: Problem, result: SearchResult) -> list[str]:
    if not result.trials:
        return ["a search returns at least one trial"]
    faults = []
    for position, trial in enumerate(result.trials):
        if trial.index != position:
            faults.append(f"trial {position} has index {trial.index}")
        cost = problem.price(trial.plan)
        if not problem.meets_budgets(cost):
            faults.append(f"trial {position} is over budget: {dict(cost.totals)}")
        if trial.score != problem.evaluate(trial.plan):
            faults.append(f"trial {position} reports score {trial.score}, not that of its plan")
    if result.policy is not None and result.policy not in [trial.plan for trial in result.trials]:
        faults.append("the policy's plan must be one of the trials")
    return faults


def check_env(env: gymnasium.Env[Any, Any], *, num_episodes: int = 10) -> None:
    """Check a layer-wise environment: Gymnasium's own checker without a warning, and the budget laws.

    Args:
        env: with the attribute ``problem``; wrappers are taken off.
        num_episodes: random episodes to play, besides the two extreme ones.

    Raises:
        ConformanceError: names every law broken.
    """
    bare = env.unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            check_gymnasium_env(bare, skip_render_check=True)
        except (AssertionError, Warning) as fault:
            raise ConformanceError([f"Gymnasium's checker: {fault}"]) from fault
    problem: Problem = bare.problem  # type: ignore[attr-defined]
    rng, num_knobs = np.random.default_rng(0), len(problem.knobs)
    wishes = [np.full(num_knobs, -1.0), np.full(num_knobs, 1.0)]
    wishes += [rng.uniform(-1, 1, num_knobs) for _ in range(num_episodes)]
    faults = [fault for wish in wishes for fault in _faults_of_episode(bare, problem, wish)]
    bare.reset()
    try:
        bare.step(np.array([math.nan], np.float32))
        faults.append("a NaN action must raise ValueError")
    except ValueError:
        pass
    _raise_if(faults)


def _faults_of_episode(
    env: gymnasium.Env[Any, Any], problem: Problem, wish: NDArray[np.float64]
) -> list[str]:
    steps, info = _played(env, wish)
    if steps != len(problem.knobs):
        return [f"an episode has one step per knob ({len(problem.knobs)}), got {steps}"]
    if missing := [key for key in ("values", "bounded_actions") if key not in info]:
        return [f"the last step's info must hold {' and '.join(missing)}"]
    plan, bounded = problem.plan(info["values"]), info["bounded_actions"]
    faults = []
    if not problem.meets_budgets(problem.price(plan)):
        faults.append(f"actions {wish.tolist()} end over budget")
    if "trial" not in info or info["trial"].plan != plan:
        faults.append("the last step's info must hold the trial of the plan played")
    if _played(env, bounded)[1].get("values") != info["values"]:
        faults.append(f"replaying the bounded actions {bounded.tolist()} must give the same plan")
    return faults


def _played(
    env: gymnasium.Env[Any, Any], wish: Sequence[float] | NDArray[np.float64]
) -> tuple[int, dict[str, Any]]:
    """Number of steps and last info of one episode."""
    env.reset()
    info: dict[str, Any] = {}
    for step, action in enumerate(wish, start=1):
        _, _, ended, _, info = env.step(np.array([action], np.float32))
        if ended:
            return step, info
    return len(wish), info


def _raise_if(faults: Sequence[str]) -> None:
    if faults:
        raise ConformanceError(faults)
