"""Joint episodes: every budget holds on every target, and observations are those of the table."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from joint_problems import few_knobs, made_up_problem, wishes
from stable_baselines3.common.env_checker import check_env as check_sb3

from autocompress.core import Budget, Cost, Knob, Problem
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.core.fitting import fitted
from autocompress.envs import JointEnv
from autocompress.nas import JointProblem
from autocompress.testing import check_env

MODES = ("scale", "clip")
BUDGETS = (Budget("latency_ms", 0.35), Budget("weight_bytes", 0.6))
PARTS = (1.0, 2.0, 4.0)


def sums(limit: float | None = None, choices: int = 4) -> Problem:
    """Three knobs of four choices, of three kinds; a choice's number costs 1, 2 and 4."""

    def price(plan: Any) -> Cost:
        numbers = (int(plan.arch["a"][1:]), plan.channels["c"] - 1, plan.bits["b"].weight - 2)
        return Cost({"latency_ms": sum(p * n for p, n in zip(PARTS, numbers, strict=True))})

    knobs = (
        Knob("arch", "a", tuple(f"o{i}" for i in range(choices)), (0.1, 0.2)),
        Knob("channels", "c", tuple(range(1, choices + 1)), (0.3, 0.4)),
        Knob("weight_bits", "b", tuple(range(2, choices + 2)), (0.5, 0.6)),
    )
    budgets = () if limit is None else (Budget("latency_ms", limit, relative=False),)
    return Problem(knobs, budgets, price, lambda plan: 0.5)


def play(env: JointEnv, actions: Any) -> list[Any]:
    env.reset(seed=0)
    return [env.step(np.array([action], np.float32)) for action in actions]


@pytest.mark.parametrize("enforce", MODES)
def test_both_checkers_pass_without_a_warning(enforce: str) -> None:
    problem = few_knobs(made_up_problem("bitfusion", *BUDGETS))
    env = gymnasium.make("autocompress/Joint-v0", problem=problem, enforce=enforce).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gymnasium(env, skip_render_check=True)
        check_sb3(env)
    check_env(env, num_episodes=2)


@pytest.mark.parametrize("enforce", MODES)
@pytest.mark.parametrize("target", ["bitfusion", "eyeriss", "bismo-zynq7020", "finn-zynq7020"])
def test_every_episode_keeps_every_budget_on_every_target(target: str, enforce: Any) -> None:
    pipeline = target.startswith("finn")
    problem = made_up_problem(target, Budget("latency_ms", 0.5 if pipeline else 0.35), BUDGETS[1])
    problem = few_knobs(problem) if pipeline else problem
    env, rng = JointEnv(problem, enforce=enforce), np.random.default_rng(0)
    for wish in (np.ones(len(problem.knobs)), rng.uniform(-1, 1, len(problem.knobs))):
        *_, info = play(env, wish)[-1]
        cost = problem.price(info["trial"].plan)
        assert all(cost[b.metric] <= b.limit * (1 + 1e-9) for b in problem.budgets)
        assert problem.plan(info["values"]) == info["trial"].plan


def test_scaling_lowers_all_choices_alike_and_then_spends_what_is_left() -> None:
    # At 3/4 of the choices (2, 2, 2) cost 14; of 17 that leaves 3, enough for a and for c.
    assert fitted(sums(14.0), ["o3", 4, 5]) == ["o2", 3, 4]
    assert fitted(sums(15.0), ["o3", 4, 5]) == ["o3", 3, 4]
    assert fitted(sums(17.0), ["o3", 4, 5]) == ["o3", 4, 4]
    assert fitted(sums(0.0001), ["o3", 4, 5]) == ["o0", 1, 2]
    assert fitted(sums(7.0), ["o3", 1, 3]) == ["o3", 1, 3]  # within the budget: as wished
    with pytest.raises(InfeasibleBudgetError):
        fitted(
            replace(
                sums(),
                budgets=(Budget("latency_ms", 1e-9, relative=False),),
                price=lambda p: Cost({"latency_ms": 1.0}),
            ),
            ["o3", 4, 5],
        )


def test_scaled_assignments_are_feasible_stay_so_and_never_exceed_the_wish() -> None:
    problem: JointProblem = few_knobs(made_up_problem("bitfusion", *BUDGETS))
    for wanted in wishes(problem, 4, seed=4):
        found = fitted(problem, wanted)
        assert problem.feasible(found)
        assert fitted(problem, found) == found
        pairs = zip(problem.knobs, found, wanted, strict=True)
        assert all(knob.choices.index(v) <= knob.choices.index(w) for knob, v, w in pairs)


def test_observations_are_those_of_the_table() -> None:
    env = JointEnv(sums(10.5))  # everything costs 21
    start, _ = env.reset()
    # kind, features; nothing reduced; a moves 3 of 21, later knobs 18; nothing used up; at the start 1.
    assert start == pytest.approx([1, 0, 0, 0, 0.1, 0.2, 0, 3 / 21, 18 / 21, 1, 1])
    second, *_ = env.step(np.array([0.0], np.float32))  # u = 0.5: the third of four, 2 of 3
    assert second == pytest.approx([0, 1, 0, 0, 0.3, 0.4, 1 / 21, 6 / 21, 12 / 21, 1 - 2 / 10.5, 2 / 3])
    third, *_ = env.step(np.array([-1.0], np.float32))
    assert third == pytest.approx([0, 0, 1, 0, 0.5, 0.6, 7 / 21, 12 / 21, 0, 1 - 2 / 10.5, 0])
    free, _ = JointEnv(sums()).reset()
    assert free[9] == 1.0  # no budget, nothing to use up


def test_a_knob_of_a_skipped_block_has_nothing_at_stake() -> None:
    problem = made_up_problem("bitfusion", *BUDGETS)
    first = next(i for i, knob in enumerate(problem.knobs) if knob.kind == "arch")
    for action, effect in ((-1.0, False), (1.0, True)):
        state = play(JointEnv(problem), [1.0] * first + [action])[-1][0]
        assert (state[-4] > 0) == effect


def test_the_reward_is_the_score_and_comes_at_the_end() -> None:
    steps = play(JointEnv(sums()), [0.0] * 3)
    assert [step[1] for step in steps] == [0.0, 0.0, 0.5]
    assert steps[-1][4]["trial"].score == 0.5


def test_knobs_with_unequal_features_and_an_unknown_rule_are_refused() -> None:
    problem = sums()
    bare = replace(problem, knobs=(*problem.knobs[:2], replace(problem.knobs[2], features=(0.5,))))
    with pytest.raises(ValueError, match="'b' has 1"):
        JointEnv(bare)
    with pytest.raises(ValueError, match="one of scale, clip"):
        JointEnv(problem, enforce="sweep")  # type: ignore[arg-type]
