from __future__ import annotations

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from scipy.optimize import minimize

from autocompress.core import Bits, Cost, LayerGraph, LayerSpec, SearchResult, Width
from autocompress.core.graph import ChannelGroup
from autocompress.envs import ChannelPruningEnv
from autocompress.testing import (
    ConformanceError,
    bits_problem,
    check_cost_model,
    check_env,
    check_search,
    waterfilling_problem,
)


def chain() -> LayerGraph:
    """Two 3x3 convolutions; the eight channels between them can shrink."""
    group = ChannelGroup("a", 8, ("a",), ("b",))
    inner = Width(0, (("a", 1),))
    first = LayerSpec("a", "conv", 3, 8, (3, 3), out_hw=(4, 4), in_width=Width(3), out_width=inner)
    second = LayerSpec("b", "conv", 8, 4, (3, 3), out_hw=(4, 4), in_width=inner, out_width=Width(4))
    return LayerGraph((first, second), (group,), input_shape=(3, 4, 4))


class Counter:
    """A correct cost model; ``bend`` alters its totals."""

    name = "counter"
    metrics = ("macs", "bitops")

    def __init__(self, bend=lambda graph, totals: totals):
        self.bend = bend

    def __call__(self, graph):
        totals = {
            metric: float(sum(getattr(layer, metric) for layer in graph.layers)) for metric in self.metrics
        }
        layers = {layer.name: {m: float(getattr(layer, m)) for m in self.metrics} for layer in graph.layers}
        return Cost(self.bend(graph, totals), layers)

    def price_many(self, graphs):
        costs = [self(graph) for graph in graphs]
        return {metric: np.array([cost[metric] for cost in costs]) for metric in self.metrics}


def test_a_correct_cost_model_passes():
    check_cost_model(Counter(), chain())


class Forgetful(Counter):
    def price_many(self, graphs):
        return {metric: values + 1 for metric, values in super().price_many(graphs).items()}


def drifting():
    calls = iter(range(10**6))
    return Counter(lambda graph, totals: totals | {"macs": totals["macs"] + next(calls)})


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (Counter(lambda g, t: t | {"macs": 1e6 - t["macs"]}), "halving 'a' raises macs"),
        (Counter(lambda g, t: t | {"bitops": 1e9 - t["bitops"]}), "4 for 8 bits in 'b' raises bitops"),
        (Counter(lambda g, t: t | {"macs": 2 * t["macs"]}), "layers sum to"),
        (Counter(lambda g, t: t | {"macs": math.inf}), "must be finite"),
        (Counter(lambda g, t: t | {"params": 1.0}), "announces"),
        (Forgetful(), "price_many differs"),
        (drifting(), "two calls on one graph"),
    ],
)
def test_a_wrong_cost_model_is_told_what_is_wrong(model, fault):
    with pytest.raises(ConformanceError, match=fault):
        check_cost_model(model, chain())


def full_price(problem, *, num_plans, seed, callbacks=()):
    """A search that ignores the budget and its callbacks."""
    knobs = problem.knobs
    trial = replace(problem, budgets=()).assess([knob.choices[-1] for knob in knobs], index=0)
    return SearchResult((trial,))


def greedy_for_plans(problem, *, num_plans, seed, callbacks=()):
    """A search that evaluates one plan too many, unseeded, and misreports its score."""
    trials = []
    for index in range(num_plans + 1):
        wanted = [knob.at(np.random.rand()) for knob in problem.knobs]  # noqa: NPY002
        trial = problem.assess(problem.bounded(wanted), index=index)
        trials.append(replace(trial, score=trial.score + 1))
        for callback in callbacks:
            callback(trials[-1])
    return SearchResult(tuple(trials))


def test_a_search_over_budget_or_deaf_to_callbacks_is_caught():
    with pytest.raises(ConformanceError) as caught:
        check_search(full_price)
    assert any("over budget" in fault for fault in caught.value.faults)
    assert any("callbacks" in fault for fault in caught.value.faults)


def test_a_search_that_is_unseeded_greedy_and_untruthful_is_told_all_of_it():
    with pytest.raises(ConformanceError) as caught:
        check_search(greedy_for_plans)
    text = str(caught.value)
    assert "evaluated 13 plans, was allowed 12" in text
    assert "equal seeds" in text
    assert "global random state" in text
    assert "not that of its plan" in text


class Overspending(ChannelPruningEnv):
    """Forgets the budget and the trial."""

    def step(self, action):
        self.problem, kept = replace(self.problem, budgets=()), self.problem
        state, reward, ended, cut, info = super().step(action)
        self.problem = kept
        info.pop("trial", None)
        return state, reward, ended, cut, info


def test_an_environment_that_overspends_is_caught():
    problem, *_ = waterfilling_problem(0, num_layers=3)
    with pytest.raises(ConformanceError) as caught:
        check_env(Overspending(problem))
    assert any("end over budget" in fault for fault in caught.value.faults)
    assert any("must hold the trial" in fault for fault in caught.value.faults)


def test_a_wrong_observation_space_is_caught():
    problem, *_ = waterfilling_problem(0, num_layers=3)
    env = ChannelPruningEnv(problem)
    env.observation_space = gymnasium.spaces.Box(0, 1, (10,), np.float32)
    with pytest.raises(ConformanceError, match="Gymnasium's checker"):
        check_env(env)


@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_optimum_agrees_with_a_numerical_solver(seed):
    problem, best, uniform = waterfilling_problem(seed, num_layers=6)
    base, units = problem.price(problem.plan([])), []
    for knob in problem.knobs:  # the score of one layer at 50 %, others whole: exp(-k / U)
        units.append(-math.log(problem.evaluate(replace(problem, knobs=(knob,)).plan([50]))))
    macs = [
        base["macs"] - problem.price(replace(problem, knobs=(k,)).plan([50]))["macs"] for k in problem.knobs
    ]
    found = minimize(
        lambda share: np.dot(units, 1 / share - 1),
        np.full(6, 0.4),
        bounds=[(0.2, 1.0)] * 6,
        constraints={
            "type": "ineq",
            "fun": lambda share: 1 - 2 * np.dot(macs, share) / problem.budgets[0].limit,
        },
        tol=1e-12,
    )
    assert math.exp(-found.fun) == pytest.approx(best, abs=1e-6)
    assert uniform == pytest.approx(math.exp(-sum(units)))


def test_the_uniform_share_scores_one_over_e_at_any_budget():
    problem, _, uniform = waterfilling_problem(5, budget=0.3)
    assert problem.evaluate(problem.plan([30] * 14)) == pytest.approx(uniform) == pytest.approx(1 / math.e)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="budget between"):
        waterfilling_problem(0, budget=0.2)


def test_the_chain_of_these_tests_counts_as_by_hand():
    halved = chain().with_channels({"a": 4}).with_bits({"a": Bits(8, 8), "b": Bits(8, 8)})
    assert Counter()(halved)["macs"] == 16 * 9 * (3 * 4 + 4 * 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_bits_agree_with_a_numerical_solver(seed):
    problem, best, uniform = bits_problem(seed, num_layers=3, told=True)
    price = lambda bits: problem.price(problem.plan(bits))["latency_ms"]  # noqa: E731
    ones = [price([3 if i == j else 2 for j in range(6)]) - price([2] * 6) for i in range(6)]
    # A told sensitivity at 2 bits is c / U * (4^-2 - 4^-8).
    loss = np.array([array[0] / (4.0**-2 - 4.0**-8) for array in problem.sensitivities()])
    found = minimize(
        lambda bits: loss @ 4.0**-bits,
        np.full(6, 3.0),
        bounds=[(2, 8)] * 6,
        constraints={"type": "ineq", "fun": lambda bits: 1 - np.dot(ones, bits) / problem.budgets[0].limit},
        tol=1e-12,
    )
    assert math.exp(-found.fun) == pytest.approx(best, abs=1e-6)
    assert uniform == pytest.approx(math.exp(-(loss @ np.full(6, 4.0**-4)))) == pytest.approx(1 / math.e)


def test_told_sensitivities_are_the_losses_that_the_score_shows():
    problem, *_ = bits_problem(1, num_layers=2, told=True)
    values = [3, 5, 8, 2]
    rise = sum(
        array[knob.choices.index(value)]
        for array, knob, value in zip(problem.sensitivities(), problem.knobs, values, strict=True)
    )
    drop = math.log(problem.evaluate(problem.plan([8] * 4)) / problem.evaluate(problem.plan(values)))
    assert rise == pytest.approx(drop)


def test_impossible_settings_of_the_bit_problem_are_refused():
    with pytest.raises(ValueError, match="budget between"):
        bits_problem(0, budget=0.25)
