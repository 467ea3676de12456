from __future__ import annotations

import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from bit_problems import (
    BITS,
    FEATURES,
    bit_knobs,
    haq_sweep,
    pinned,
    random_losses,
    random_tables,
    table_problem,
)
from gymnasium.utils.env_checker import check_env as check_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3

from autocompress.core import Bits, Budget, Cost, Problem
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.envs import MixedPrecisionEnv, swept
from autocompress.testing import bits_problem, check_env, waterfilling_problem

MODES = ("clip", "sweep")
SIZES = {"a": (1.0, 2.0), "b": (3.0, 4.0)}


def small_problem(limit: float = 40.0) -> Problem:
    """Two layers; a bit of a's weights, a's activations, b's weights, b's activations costs 1, 2, 3, 4."""

    def price(plan):
        bits = plan.bits
        return Cost({"latency_ms": sum(w * bits[n].weight + a * bits[n].act for n, (w, a) in SIZES.items())})

    def evaluate(plan):
        return sum(b.weight + b.act for b in plan.bits.values()) / 32

    budget = Budget("latency_ms", limit, relative=False)
    return Problem(bit_knobs("ab"), (budget,), price, evaluate, "small")


def random_problem(seed: int, num_layers: int = 4, num_metrics: int = 2, share: float = 0.5) -> Problem:
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, num_metrics, num_layers)
    return table_problem(tables, [share] * num_metrics, random_losses(rng, num_layers))


def play(env, actions):
    env.reset(seed=0)
    return [env.step(np.array([a], np.float32)) for a in actions]


@pytest.mark.parametrize("enforce", MODES)
def test_both_checkers_pass_without_a_warning(enforce):
    problem = bits_problem(0, num_layers=3)[0]
    env = gymnasium.make("autocompress/MixedPrecision-v0", problem=problem, enforce=enforce).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gymnasium(env, skip_render_check=True)
        check_sb3(env)
    check_env(env)


@given(seed=st.integers(0, 10**6), share=st.floats(0.02, 1), enforce=st.sampled_from(MODES), data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_episode_keeps_every_budget_or_the_problem_is_refused(seed, share, enforce, data):
    problem = random_problem(seed, share=share)
    if not problem.meets_budgets(problem.smallest):
        with pytest.raises(InfeasibleBudgetError):
            MixedPrecisionEnv(problem, enforce=enforce)
        return
    env = MixedPrecisionEnv(problem, enforce=enforce)
    actions = data.draw(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
    *_, info = play(env, actions)[-1]
    assert problem.meets_budgets(problem.price(info["trial"].plan))
    assert problem.plan(info["values"]) == info["trial"].plan
    *_, again = play(env, info["bounded_actions"])[-1]
    assert again["values"] == info["values"]
    wanted = [k.at((a + 1) / 2) for k, a in zip(problem.knobs, actions, strict=True)]
    assert all(value <= wish for value, wish in zip(info["values"], wanted, strict=True))


@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_sweep_ends_where_the_loop_of_the_released_code_ends(seed, share, data):
    problem = random_problem(seed, share=share)
    if not problem.meets_budgets(problem.smallest):
        return
    values = data.draw(st.lists(st.sampled_from(BITS), min_size=8, max_size=8))
    repaired = swept(problem, values)
    assert repaired == haq_sweep(problem, values)
    assert swept(problem, repaired) == repaired


def test_the_sweep_takes_activations_before_weights_and_the_last_layer_before_the_first():
    # 8 bits everywhere cost 80. A whole sweep saves 10; then b's activations save 4, b's weights 3.
    assert swept(small_problem(80.0), [8, 8, 8, 8]) == [8, 8, 8, 8]
    assert swept(small_problem(77.0), [8, 8, 8, 8]) == [8, 8, 8, 7]
    assert swept(small_problem(75.0), [8, 8, 8, 8]) == [8, 8, 7, 7]
    assert swept(small_problem(63.0), [8, 8, 8, 8]) == [7, 7, 6, 6]
    assert swept(small_problem(20.0), [8, 2, 3, 8]) == [2, 2, 2, 2]


def test_the_sweep_refuses_what_no_bits_can_meet_instead_of_going_on_for_ever():
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable latency_ms is 20"):
        swept(small_problem(19.0), [8, 8, 8, 8])


def test_sweeping_stores_the_repaired_bits_as_the_actions():
    env = MixedPrecisionEnv(small_problem(75.0), enforce="sweep")
    steps = play(env, [1, 1, 1, 1])
    assert [info["value"] for *_, info in steps] == [8, 8, 8, 8]
    last = steps[-1][-1]
    assert last["values"] == (8, 8, 7, 7)
    assert last["bounded_actions"] == pytest.approx([6 / 7, 6 / 7, 4 / 7, 4 / 7])  # middles of seven bins


def test_clipping_takes_the_most_bits_that_later_knobs_can_still_make_up_for():
    # 8 + 2 * 8 + 3 * 2 + 4 * 2 = 38 leaves 3 of 41, one more bit for the weights of b.
    steps = play(MixedPrecisionEnv(small_problem(41.0)), [1, 1, 1, 1])
    assert [info["value"] for *_, info in steps] == [8, 8, 3, 2]


def test_the_ends_of_the_action_range_are_the_fewest_and_the_most_bits():
    knob = bit_knobs("a")[0]
    assert (knob.at(0.0), knob.at(1.0)) == (2, 8)
    one_to_eight = bit_knobs("a", tuple(range(1, 9)))[0]
    assert (one_to_eight.at(0.0), one_to_eight.at(1.0)) == (1, 8)


@given(lowest=st.integers(1, 8), highest=st.integers(1, 8))
def test_every_bit_width_has_an_equal_share_of_the_actions(lowest, highest):
    choices = tuple(range(min(lowest, highest), max(lowest, highest) + 1))
    knob = bit_knobs("a", choices)[0]
    grid = (np.arange(840) + 0.5) / 840  # 840 is divisible by 1 to 8
    counts = np.bincount([knob.at(u) for u in grid], minlength=9)
    assert all(counts[b] == 840 // len(choices) for b in choices)


def test_observations_are_the_ten_of_the_table_in_its_order():
    env = MixedPrecisionEnv(small_problem())
    start, _ = env.reset()
    assert start == pytest.approx([*FEATURES, 1.0, 1.0])  # last action, then the flag of weights
    second, *_ = env.step(np.array([-1], np.float32))
    assert second == pytest.approx([*FEATURES, 0.0, 0.0])
    third, *_ = env.step(np.array([0], np.float32))  # u = 0.5: 5 bits, the fourth of seven
    assert third == pytest.approx([*FEATURES, 0.5, 1.0])


def test_the_reward_is_a_tenth_of_the_points_of_percent_lost_and_comes_at_the_end():
    steps = play(MixedPrecisionEnv(small_problem(80.0), reference_score=0.72), [1, 1, 1, -1])
    assert [step[1] for step in steps[:-1]] == [0.0] * 3
    score = steps[-1][-1]["trial"].score
    assert steps[-1][1] == pytest.approx(0.1 * (100 * score - 72))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_better_score_never_earns_less(first, second, reference):
    def reward(score):
        problem = replace(small_problem(), evaluate=lambda plan: score)
        return play(MixedPrecisionEnv(problem, reference_score=reference), [0] * 4)[-1][1]

    low, high = sorted((first, second))
    assert reward(low) <= reward(high)


def test_pinned_layers_keep_their_bits_in_every_episode():
    problem = pinned(random_problem(3, share=0.6), "l0", Bits(8, 8))
    for enforce in MODES:
        *_, info = play(MixedPrecisionEnv(problem, enforce=enforce), [1.0] * 6)[-1]
        assert info["trial"].plan.bits["l0"] == Bits(8, 8)


def test_a_side_without_a_knob_has_one_step_less():
    problem = small_problem(70.0)
    first = replace(problem, knobs=problem.knobs[:1] + problem.knobs[2:], base=problem.plan([]))
    *_, info = play(MixedPrecisionEnv(first), [-1, 1, 1])[-1]
    assert info["trial"].plan.bits["a"] == Bits(2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enforce": "wish"}, "clip, sweep"),
        ({"reference_score": float("nan")}, "reference_score must be finite"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MixedPrecisionEnv(small_problem(), **change)


def test_knobs_that_are_not_bits_or_lack_features_are_named():
    with pytest.raises(ValueError, match="'conv0' decides channels"):
        MixedPrecisionEnv(waterfilling_problem(0)[0])
    problem = small_problem()
    bare = replace(problem, knobs=(*problem.knobs[:3], replace(problem.knobs[3], features=(0.5,))))
    with pytest.raises(ValueError, match="'b' has 1"):
        MixedPrecisionEnv(bare)
