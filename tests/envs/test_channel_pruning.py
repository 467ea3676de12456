from __future__ import annotations

import math
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as check_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3

from autocompress.core import Budget, Cost, Knob, Problem
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.envs import ChannelPruningEnv
from autocompress.testing import check_env, waterfilling_problem

MACS = {"a": 10.0, "b": 20.0, "c": 70.0}
FEATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def small_problem(limit: float = 50.0) -> Problem:
    """Three knobs of four choices; MACs are 10, 20 and 70 per whole layer; the score is the share kept."""

    def price(plan):
        return Cost({"macs": sum(MACS[n] * plan.channels.get(n, 4) / 4 for n in MACS)})

    knobs = tuple(Knob("channels", name, (1, 2, 3, 4), FEATURES) for name in MACS)
    budgets = (Budget("macs", limit, relative=False),)
    return Problem(knobs, budgets, price, lambda plan: sum(plan.channels.values()) / 12, "small")


def play(env, actions):
    env.reset(seed=0)
    return [env.step(np.array([a], np.float32)) for a in actions]


def test_both_checkers_pass_without_a_warning():
    env = gymnasium.make("autocompress/ChannelPruning-v0", problem=small_problem()).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gymnasium(env, skip_render_check=True)
        check_sb3(env)
    check_env(env)


@given(seed=st.integers(0, 1000), budget=st.floats(0.21, 0.95), data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_episode_keeps_the_budget(seed, budget, data):
    problem, best, _ = waterfilling_problem(seed, num_layers=6, budget=budget)
    actions = data.draw(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
    *_, info = play(ChannelPruningEnv(problem), actions)[-1]
    assert problem.meets_budgets(problem.price(info["trial"].plan))
    assert info["is_success"]
    assert info["trial"].score <= best + 1e-12


def test_the_wall_takes_the_largest_choice_that_later_layers_can_still_make_up_for():
    # Full, full leaves 50 - 30 = 20 for c, whose first choice costs 17.5 and whose second costs 35.
    steps = play(ChannelPruningEnv(small_problem()), [1, 1, 1])
    assert [info["value"] for *_, info in steps] == [4, 4, 1]


def test_observations_are_the_eleven_of_the_table():
    env = ChannelPruningEnv(small_problem())
    start, _ = env.reset()
    # Later knobs b and c can lose three quarters of 90; a, b, c cost 100.
    assert start == pytest.approx([*FEATURES, 0.0, 0.675, 1.0])
    second, *_ = env.step(np.array([-1], np.float32))
    assert second == pytest.approx([*FEATURES, 0.075, 0.525, 0.0])
    third, *_ = env.step(np.array([0.1], np.float32))  # u = 0.55: third of four choices
    assert third == pytest.approx([*FEATURES, 0.075 + 0.05, 0.0, 2 / 3])


def test_replaying_the_bounded_actions_gives_the_same_plan():
    env = ChannelPruningEnv(small_problem())
    steps = play(env, [0.9, 0.4, 0.9])
    again = play(env, [info["bounded_action"] for *_, info in steps])
    assert [info["value"] for *_, info in again] == [info["value"] for *_, info in steps]
    assert all(-1 <= info["bounded_action"] <= 1 for *_, info in steps)


def test_resource_reward_is_minus_the_error_and_comes_only_at_the_end():
    steps = play(ChannelPruningEnv(small_problem()), [1, 1, 1])
    assert [step[1] for step in steps[:-1]] == [0.0, 0.0]
    assert steps[-1][1] == pytest.approx(9 / 12 - 1)
    assert [step[2] for step in steps] == [False, False, True]


def test_halving_macs_at_equal_error_changes_the_accuracy_guaranteed_reward_by_error_ln_2():
    def reward(actions):
        problem = replace(small_problem(100.0), evaluate=lambda plan: 0.7)
        return play(ChannelPruningEnv(problem, reward="accuracy_guaranteed"), actions)[-1][1]

    full, half = [1, 1, 1], [-0.25, -0.25, -0.25]  # u = 0.375: the second of four choices
    assert reward(half) - reward(full) == pytest.approx(0.3 * math.log(2))


def test_an_unreachable_budget_is_refused_before_any_episode():
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable macs is 25"):
        ChannelPruningEnv(small_problem(24.0))


def test_a_nan_action_is_refused():
    env = ChannelPruningEnv(small_problem())
    env.reset()
    with pytest.raises(ValueError, match="'a' must be a number in \\[-1, 1\\], got NaN"):
        env.step(np.array([np.nan], np.float32))


def test_a_step_after_the_end_is_refused():
    env = ChannelPruningEnv(small_problem())
    play(env, [0, 0, 0])
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(1, np.float32))


def test_knobs_without_the_eight_features_are_named():
    problem = small_problem()
    bare = replace(problem, knobs=(*problem.knobs[:2], replace(problem.knobs[2], features=(0.5,))))
    with pytest.raises(ValueError, match="'c' has 1"):
        ChannelPruningEnv(bare)


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match="resource, accuracy_guaranteed"):
        ChannelPruningEnv(small_problem(), reward="speed")


def test_a_guaranteed_accuracy_needs_a_price_in_macs():
    problem = replace(
        small_problem(),
        price=lambda plan: Cost({"params": 1.0}),
        budgets=(Budget("params", 2, relative=False),),
    )
    with pytest.raises(ValueError, match="does not give 'macs'"):
        ChannelPruningEnv(problem, reward="accuracy_guaranteed")
