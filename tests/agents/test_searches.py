from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hawq_problem import hawq_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.agents import (
    HAQ_SETTINGS,
    SEARCHES,
    Greedy,
    MilpSearch,
    RandomSearch,
    Uniform,
    make_search,
    sb3,
)
from autocompress.agents.scaling import scaled_to_budget, uniform_assignments
from autocompress.core import Budget, Cost, Knob, Ledger, Problem
from autocompress.core.errors import DivergenceError, InfeasibleBudgetError, RecipeError
from autocompress.envs import ChannelPruningEnv
from autocompress.testing import bits_problem, check_search, waterfilling_problem

LEARNED = ["ddpg", "td3", "sac"]


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_conforms(name):
    only_bits = bits_problem(0, num_layers=2)[0] if name == "milp" else None
    check_search(make_search(name, {}), only_bits)


@given(seed=st.integers(0, 1000), budget=st.floats(0.21, 0.95), num_layers=st.integers(2, 8))
@settings(max_examples=15, deadline=None)
def test_every_trial_meets_the_budget_and_none_beats_the_optimum(seed, budget, num_layers):
    problem, best, _ = waterfilling_problem(seed, num_layers, budget)
    for name in ("uniform", "random", "greedy", "ddpg"):
        result = make_search(name, {})(problem, num_plans=num_layers + 3, seed=seed)
        assert all(problem.meets_budgets(problem.price(trial.plan)) for trial in result.trials)
        assert result.best.score <= best + 1e-12


@given(seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=30, deadline=None)
def test_scaling_spends_the_budget_as_far_as_one_factor_can(seed, data):
    problem, *_ = waterfilling_problem(seed, num_layers=5)
    fractions = data.draw(st.lists(st.floats(0.05, 1), min_size=5, max_size=5))
    spent = problem.price(problem.plan(scaled_to_budget(problem, fractions)))["macs"]
    # One percent more of every layer must be over budget, unless layers sit at a bound.
    assert problem.meets_budgets(Cost({"macs": spent}))
    assert spent >= problem.budgets[0].limit - 0.01 * problem.largest["macs"]


def test_the_uniform_plan_is_half_of_every_layer_at_half_the_macs():
    problem, _, uniform_score = waterfilling_problem(3)
    (trial,) = Uniform()(problem, num_plans=5, seed=0).trials
    assert set(trial.plan.channels.values()) == {50}
    assert trial.score == pytest.approx(uniform_score)


def test_random_plans_are_not_all_alike():
    problem, *_ = waterfilling_problem(0)
    trials = RandomSearch()(problem, num_plans=20, seed=0).trials
    assert len({trial.plan for trial in trials}) == 20


def two_layers(evaluate) -> Problem:
    """Two knobs of 1 to 10 channels, one MAC each, at most 12 of 20."""
    knobs = tuple(Knob("channels", name, tuple(range(1, 11)), (0.5,) * 8) for name in "ab")

    def price(plan):
        return Cost({"macs": float(sum(plan.channels.get(name, 10) for name in "ab"))})

    return Problem(knobs, (Budget("macs", 12, relative=False),), price, evaluate, "two layers")


def test_greedy_takes_everything_from_the_layer_that_does_not_matter():
    result = Greedy()(two_layers(lambda plan: plan.channels["b"] / 10), num_plans=12, seed=0)
    assert dict(result.best.plan.channels) == {"a": 2, "b": 10}


def test_greedy_counts_plans_over_budget_as_evaluations():
    calls = []
    result = Greedy()(two_layers(lambda plan: calls.append(plan) or 0.5), num_plans=4, seed=0)
    assert len(calls) <= 4
    assert len(result.trials) < len(calls)


def test_greedy_keeps_a_network_that_is_within_budget():
    problem = replace(two_layers(lambda plan: 0.5), budgets=())
    (trial,) = Greedy()(problem, num_plans=4, seed=0).trials
    assert dict(trial.plan.channels) == {"a": 10, "b": 10}


@pytest.mark.parametrize(("name", "least"), [("uniform", 1), ("random", 1), ("greedy", 16), ("ddpg", 2)])
def test_too_few_plans_are_refused_and_the_least_number_works(name, least):
    problem, *_ = waterfilling_problem(0)
    with pytest.raises(ValueError, match=f"num_plans >= {least}"):
        make_search(name, {})(problem, num_plans=least - 1, seed=0)
    assert len(make_search(name, {})(problem, num_plans=least, seed=0).trials) >= 1


@pytest.mark.parametrize("name", SEARCHES)
def test_an_unreachable_budget_is_refused(name):
    problem = replace(two_layers(lambda plan: 0.5), budgets=(Budget("macs", 1, relative=False),))
    with pytest.raises(InfeasibleBudgetError):
        make_search(name, {})(problem, num_plans=10, seed=0)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_searches_assess_exactly_the_plans_asked_for(name):
    problem, *_ = waterfilling_problem(0, num_layers=4)
    result = make_search(name, {})(problem, num_plans=15, seed=0)
    sources = [trial.source for trial in result.trials]
    assert sources == ["uniform", "jitter", "warm-up", *["explore"] * 11, "policy"]
    assert result.policy == result.trials[-1].plan


@pytest.mark.parametrize("name", LEARNED)
def test_learned_searches_on_bits_start_from_planned_and_uniform_plans(name):
    problem, *_ = bits_problem(0, num_layers=2)
    uniform = [problem.plan(values) for values in uniform_assignments(problem)]
    result = make_search(name, {})(problem, num_plans=12, seed=0)
    assert [trial.source for trial in result.trials[:2]] == ["milp", "uniform"]
    assert result.trials[0].plan == MilpSearch()(problem, num_plans=1, seed=0).best.plan
    assert {trial.plan for trial in result.trials} >= set(uniform)
    assert [trial.source for trial in result.trials[-2:]] == ["explore", "policy"]
    assert result.policy == result.trials[-1].plan
    plain = make_search(name, {"warm_start": False})(problem, num_plans=12, seed=0)
    assert [trial.plan for trial in plain.trials[: len(uniform)]] == uniform
    assert {trial.source for trial in plain.trials} <= {"uniform", "jitter", "warm-up", "explore", "policy"}


def test_learned_searches_refuse_knobs_whose_features_differ_in_number():
    channels, bits = two_layers(lambda plan: 0.5), bits_problem(0, num_layers=2)[0]
    mixed = replace(channels, knobs=(*channels.knobs, *bits.knobs))
    with pytest.raises(ValueError, match="every knob needs as many features as the others"):
        make_search("ddpg", {})(mixed, num_plans=5, seed=0)


def test_a_resumed_search_on_bits_tries_the_same_plans():
    problem, *_ = bits_problem(3, num_layers=2)
    calls = []
    counted = replace(problem, evaluate=lambda plan: calls.append(plan) or problem.evaluate(plan))
    with Ledger(":memory:") as ledger:
        recorded = ledger.in_front_of(counted)
        for name in ("ddpg", "milp"):
            first, again = (make_search(name, {})(recorded, num_plans=14, seed=0) for _ in range(2))
            assert [t.plan for t in first.trials] == [t.plan for t in again.trials]
    assert len(calls) == len(set(calls))


@pytest.mark.slow
def test_the_trained_actor_decides_bits_better_than_random_and_uniform_plans():
    problem, best, _ = bits_problem(1, num_layers=7)
    learned = make_search("ddpg", {"warm_start": False})(problem, num_plans=200, seed=1)
    random = make_search("random", {})(problem, num_plans=200, seed=1)
    uniform = make_search("uniform", {})(problem, num_plans=200, seed=1).best.score
    scores = [trial.score for trial in random.trials]
    assert learned.trials[-1].score > (np.mean(scores) + best) / 2
    assert learned.best.score > max(uniform, *scores)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "optimum"), [("bitops", 0.215689), ("latency_ms", 0.202674)])
def test_ddpg_comes_within_5_percent_of_the_optimum_of_hawq_v3s_resnet18_in_300_episodes(metric, optimum):
    problem = hawq_problem(metric, 0.5)
    result = make_search("ddpg", {"warm_start": False})(problem, num_plans=300, seed=0)
    assert optimum - 1e-6 <= -result.best.score <= 1.05 * optimum


@pytest.mark.parametrize("name", LEARNED)
def test_another_seed_tries_other_plans(name):
    problem, *_ = waterfilling_problem(0, num_layers=4)
    plans = [
        [t.plan for t in make_search(name, {})(problem, num_plans=10, seed=seed).trials] for seed in (0, 1)
    ]
    assert plans[0] != plans[1]


def test_a_resumed_search_tries_the_same_plans_even_if_evaluating_draws_random_numbers():
    problem, *_ = waterfilling_problem(0, num_layers=4)
    calls = []

    def noisy(plan):
        calls.append(float(torch.rand(()) + np.random.rand()))  # noqa: NPY002
        return problem.evaluate(plan)

    with Ledger(":memory:") as ledger:
        recorded = ledger.in_front_of(replace(problem, evaluate=noisy))
        first, again = (make_search("ddpg", {})(recorded, num_plans=12, seed=0) for _ in range(2))
    assert [t.plan for t in first.trials] == [t.plan for t in again.trials]
    assert len(calls) == len({t.plan for t in first.trials})


@pytest.mark.parametrize("name", LEARNED)
def test_the_global_torch_state_is_left_alone(name):
    problem, *_ = waterfilling_problem(0, num_layers=3)
    before = torch.get_rng_state()
    make_search(name, {})(problem, num_plans=6, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trained_actor_beats_random_search_and_its_best_beats_uniform():
    problem, best, uniform = waterfilling_problem(1)
    learned = make_search("ddpg", {})(problem, num_plans=200, seed=1)
    random = make_search("random", {})(problem, num_plans=200, seed=1)
    scores = [trial.score for trial in random.trials]
    # The actor's own episode, not the best plan seen, must close half of the way from random to optimal.
    assert learned.trials[-1].plan == learned.policy
    assert learned.trials[-1].score > (np.mean(scores) + best) / 2
    assert learned.best.score > max(uniform, *scores)


@pytest.mark.parametrize("make_problem", [waterfilling_problem, bits_problem])
def test_ddpg_is_not_beaten_by_random_or_uniform_plans_from_50_plans_on(make_problem):
    for seed in (20, 21):
        problem = make_problem(seed)[0]
        found = make_search("ddpg", {})(problem, num_plans=50, seed=seed).best.score
        for name in ("random", "uniform"):
            assert found > make_search(name, {})(problem, num_plans=50, seed=seed).best.score


def test_every_second_explored_plan_is_around_the_best_so_far():
    problem, *_ = waterfilling_problem(5, num_layers=4)
    still = {"sigma": 1e-4, "sigma_end": 1e-4}
    trials = make_search("ddpg", still)(problem, num_plans=30, seed=0).trials
    alone = make_search("ddpg", still | {"follow_best": False})(problem, num_plans=30, seed=0).trials
    explored = [trial.index for trial in trials if trial.source == "explore"]

    def distance(first, second):  # after scaling to the budget, which may move a channel or two
        return max(abs(n - second.plan.channels[name]) for name, n in first.plan.channels.items())

    def from_best(tried, i):
        return distance(tried[i], max(tried[:i], key=lambda trial: trial.score))

    assert all(from_best(trials, i) <= 2 for i in explored[::2])
    assert from_best(alone, explored[0]) > 2


def test_haqs_settings_are_settings_of_ddpg():
    search = make_search("ddpg", HAQ_SETTINGS)
    assert {name: getattr(search, name) for name in HAQ_SETTINGS} == HAQ_SETTINGS


def test_the_final_reward_reaches_every_transition_of_an_episode():
    problem, *_ = waterfilling_problem(0, num_layers=3)
    env = ChannelPruningEnv(problem)
    learner = sb3.Learner(make_search("ddpg", {}), env, 4, 0)
    episodes = [sb3.play(env, lambda state, step, a=a: a) for a in (-1.0, -0.5)]
    for episode in episodes:
        learner.remember(episode)
    replay = learner.model.replay_buffer
    assert replay.rewards[:6, 0] == pytest.approx([e.reward for e in episodes for _ in range(3)])
    assert replay.actions[:6, 0, 0] == pytest.approx(np.concatenate([e.actions for e in episodes]))
    better = max(episodes, key=lambda e: e.reward)
    assert set(replay.sample_best(50, 3).actions[:, 0].tolist()) == set(better.actions.tolist())


def test_weights_that_are_not_finite_are_reported_as_divergence():
    problem, *_ = waterfilling_problem(0, num_layers=3)
    env = ChannelPruningEnv(problem)
    learner = sb3.Learner(make_search("ddpg", {}), env, 4, 0)
    learner.remember(sb3.play(env, learner.act))
    with torch.no_grad():
        next(learner.model.policy.parameters()).fill_(math.nan)
    with pytest.raises(DivergenceError, match="lower learning_rate"):
        learner.learn()


def test_a_reward_that_is_not_finite_is_reported_as_divergence():
    problem, *_ = waterfilling_problem(0, num_layers=3)
    env = ChannelPruningEnv(problem)
    learner = sb3.Learner(make_search("ddpg", {}), env, 4, 0)
    episode = sb3.play(env, learner.act)
    with pytest.raises(DivergenceError, match="must be finite, got nan"):
        learner.remember(replace(episode, reward=math.nan))


def test_a_stopped_search_passes_the_interrupt_through():
    problem, *_ = waterfilling_problem(0, num_layers=3)

    def stop(trial):
        if trial.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_search("ddpg", {})(problem, num_plans=10, seed=0, callbacks=[stop])


def test_wrong_settings_are_all_reported_at_once_with_a_suggestion():
    with pytest.raises(RecipeError) as caught:
        make_search("ddpg", {"sigmaa": 0.1, "sigma": 2, "hidden": [0], "learning_rate": "fast"})
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert "no setting 'sigmaa'; did you mean 'sigma'?" in text
    assert "sigma must be in (0, 1], got 2" in text


def test_an_unknown_search_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'greedy'"):
        make_search("gredy", {})


def test_importing_agents_does_not_load_stable_baselines3():
    code = "import sys, autocompress.agents; print('stable_baselines3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
