from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from bit_problems import bit_knobs, random_losses, random_tables, table_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.agents import MilpSearch, Uniform, make_search
from autocompress.agents.additive import Allocator, adds_up, cost_tables
from autocompress.agents.loss_belief import LossBelief
from autocompress.agents.milp import BitPlanner
from autocompress.agents.scaling import scaled_to_budget, uniform_assignments
from autocompress.core import Bits, Budget, Cost, Knob, Plan, Problem
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.testing import bits_problem, check_search, waterfilling_problem


def random_problem(seed: int, num_layers: int = 4, num_metrics: int = 2, share: float = 0.5) -> Problem:
    """Random tables; the score falls with the losses as an accuracy does."""
    rng = np.random.default_rng(seed)
    losses = random_losses(rng, num_layers)
    problem = table_problem(random_tables(rng, num_metrics, num_layers), [share] * num_metrics, losses)
    score = problem.evaluate
    return replace(problem, evaluate=lambda plan: math.exp(score(plan)), sensitivities=lambda: list(losses))


def slowest_stage(share: float = 0.4, num_layers: int = 5) -> Problem:
    """A pipeline as slow as its slowest layer, whose time is the product of its bits; costs do not add up."""
    times = np.arange(1, num_layers + 1)
    names = [f"l{i}" for i in range(num_layers)]
    losses = np.random.default_rng(0).lognormal(0, 1, 2 * num_layers)

    def price(plan):
        parts = [t * plan.bits[n].weight * plan.bits[n].act for t, n in zip(times, names, strict=True)]
        return Cost({"latency_ms": float(max(parts))})

    def evaluate(plan):
        bits = np.array([(plan.bits[n].weight, plan.bits[n].act) for n in names]).ravel()
        return math.exp(-float(losses @ 4.0**-bits))

    budget = Budget("latency_ms", share * 64.0 * num_layers, relative=False)
    bits = np.arange(2, 9)
    told = [c * (4.0**-bits - 4.0**-8.0) for c in losses]
    return Problem(bit_knobs(names), (budget,), price, evaluate, "pipe", sensitivities=lambda: told)


def test_the_search_conforms_on_tables_ties_and_pipelines():
    check_search(MilpSearch(), random_problem(0))
    check_search(MilpSearch(), replace(random_problem(1), sensitivities=None))
    check_search(MilpSearch(), slowest_stage())
    check_search(MilpSearch(), tied_problem(3.5))


@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1.0))
@settings(max_examples=25, deadline=None)
def test_the_first_plan_is_the_best_of_all_when_the_losses_are_told(seed, share):
    problem = random_problem(seed, num_layers=2, share=share)
    if not problem.meets_budgets(problem.smallest):
        with pytest.raises(InfeasibleBudgetError):
            MilpSearch()(problem, num_plans=1, seed=0)
        return
    (first,) = MilpSearch()(problem, num_plans=1, seed=0).trials
    choices = [knob.choices for knob in problem.knobs]
    fitting = [
        plan
        for values in np.stack(np.meshgrid(*choices), axis=-1).reshape(-1, 4).tolist()
        if problem.meets_budgets(problem.price(plan := problem.plan(values)))
    ]
    assert first.score == pytest.approx(max(map(problem.evaluate, fitting)), rel=1e-6)
    assert first.source == "milp"


def tied_problem(limit: float) -> Problem:
    """Three weights, of which a and b share their bits; a bit of a costs 1, of b 2, of c 4, in eighths."""
    sizes = {"a": 1.0, "b": 2.0, "c": 4.0}
    knobs = (
        Knob("weight_bits", "a", (2, 4, 8), (0.5,) * 9, layers=("a", "b")),
        Knob("act_bits", "b", (2, 4, 8), (0.5,) * 9),
        Knob("weight_bits", "c", (2, 4, 8), (0.5,) * 9),
    )

    def price(plan):
        return Cost(
            {
                "weight_bytes": sum(s * plan.bits[n].weight / 8 for n, s in sizes.items())
                + plan.bits["b"].act * plan.bits["b"].weight / 64
            }
        )

    def evaluate(plan):
        return 1 - sum(4.0 ** -plan.bits[n].weight for n in sizes) - 4.0 ** -plan.bits["b"].act

    base = Plan(bits={n: Bits(8, 8) for n in sizes})
    budget = Budget("weight_bytes", limit, relative=False)
    return Problem(knobs, (budget,), price, evaluate, "tied", base)


@pytest.mark.parametrize("limit", [2.5, 3.5, 5.0, 8.0])
def test_tied_layers_share_their_bits_and_the_best_of_all_is_found(limit):
    problem = tied_problem(limit)
    result = MilpSearch()(problem, num_plans=27, seed=0)
    assert all(t.plan.bits["a"].weight == t.plan.bits["b"].weight for t in result.trials)
    fitting = [
        plan
        for w in (2, 4, 8)
        for a in (2, 4, 8)
        for c in (2, 4, 8)
        if problem.meets_budgets(problem.price(plan := problem.plan([w, a, c])))
    ]
    assert result.best.score == max(map(problem.evaluate, fitting))


@given(seed=st.integers(0, 10**6), values=st.lists(st.integers(2, 8), min_size=8, max_size=8))
@settings(max_examples=30, deadline=None)
def test_tables_made_from_single_layers_price_every_plan_of_an_additive_problem(seed, values):
    problem = random_problem(seed)
    assert adds_up(problem)
    tables = cost_tables(problem)
    for metric in tables.tables:
        parts = zip(tables.items, tables.tables[metric], strict=True)
        total = tables.constants[metric] + sum(t[tuple(values[k] - 2 for k in knobs)] for knobs, t in parts)
        assert total == pytest.approx(problem.price(problem.plan(values))[metric])


def test_tables_of_tied_layers_price_every_plan():
    problem = tied_problem(5.0)
    tables = cost_tables(problem)
    assert tables.items == ((0, 1), (2,))
    for w, a, c in np.ndindex(3, 3, 3):
        total = tables.constants["weight_bytes"] + tables.tables["weight_bytes"][0][w, a]
        total += tables.tables["weight_bytes"][1][c]
        values = [k.choices[i] for k, i in zip(problem.knobs, (w, a, c), strict=True)]
        assert total == pytest.approx(problem.price(problem.plan(values))["weight_bytes"])


def test_a_pipeline_is_seen_not_to_add_up_and_its_plans_are_searched_with_true_prices():
    problem = slowest_stage()
    assert not adds_up(problem)
    allocate = Allocator(problem)
    assert not allocate.exact
    best = problem.evaluate(problem.plan(allocate(problem.sensitivities())))
    # Stages are independent, so the best is known: each takes its own best pair within the limit.
    losses, limit = problem.sensitivities(), problem.budgets[0].limit
    exact = 0.0
    for stage in range(5):
        pairs = [
            losses[2 * stage][w - 2] + losses[2 * stage + 1][a - 2]
            for w in range(2, 9)
            for a in range(2, 9)
            if (stage + 1) * w * a <= limit
        ]
        exact += min(pairs)
    eight = problem.evaluate(problem.plan([]))
    assert best == pytest.approx(eight * math.exp(-exact), rel=1e-9)


def test_a_new_budget_is_solved_without_evaluating():
    def never(plan):
        raise AssertionError("evaluated")

    problem = replace(random_problem(0), evaluate=never)
    for share in (0.3, 0.5, 0.7):
        budgets = tuple(replace(b, limit=b.limit * share / 0.5) for b in problem.budgets)
        values = Allocator(replace(problem, budgets=budgets))(problem.sensitivities())
        assert replace(problem, budgets=budgets).feasible(values)


def test_without_being_told_the_search_learns_what_matters():
    problem, best, uniform = bits_problem(2, num_layers=4)
    result = MilpSearch()(problem, num_plans=30, seed=0)
    told = MilpSearch()(bits_problem(2, num_layers=4, told=True)[0], num_plans=1, seed=0).best.score
    first = result.trials[0].score
    assert uniform < first < result.best.score <= best
    assert result.best.score >= told - 0.1 * (told - first)


def test_every_knob_is_measured_alone_when_there_are_plans_enough():
    problem, *_ = bits_problem(0, num_layers=4)
    plans = []
    counted = replace(problem, evaluate=lambda plan: plans.append(plan) or problem.evaluate(plan))
    result = MilpSearch()(counted, num_plans=16, seed=0)
    alone = [
        plan
        for plan in plans
        if sorted([b for pair in plan.bits.values() for b in (pair.weight, pair.act)])[1:] == [8] * 7
    ]
    assert len(alone) == 8
    assert len(plans) == 16
    assert len(result.trials) == 8
    plans.clear()
    assert len(MilpSearch()(counted, num_plans=11, seed=0).trials) == len(plans) == 11


def test_the_search_is_never_worse_than_the_best_uniform_plan():
    for seed in range(3):
        problem, *_ = bits_problem(seed, num_layers=4)
        uniform = Uniform()(problem, num_plans=10, seed=0).best.score
        assert MilpSearch()(problem, num_plans=10, seed=0).best.score >= uniform


def test_a_search_that_has_tried_everything_ends():
    knobs = bit_knobs("a", (7, 8))
    price = lambda plan: Cost({"latency_ms": 1.0})  # noqa: E731
    problem = Problem(knobs, (), price, lambda plan: 0.5, "four plans")
    assert len(MilpSearch()(problem, num_plans=100, seed=0).trials) <= 4


def test_what_is_told_wrongly_is_put_right_by_scores():
    """One layer that matters most is told to matter ten times less."""
    problem, *_ = bits_problem(4, num_layers=3, told=True)
    right = problem.sensitivities()
    most = int(np.argmax([array[0] for array in right]))
    wrong = [array / 10 if k == most else array for k, array in enumerate(right)]
    misled = replace(problem, sensitivities=lambda: wrong)
    first = MilpSearch()(misled, num_plans=1, seed=0).best.score
    told = MilpSearch()(problem, num_plans=1, seed=0).best.score
    assert first < 0.95 * told
    assert MilpSearch()(misled, num_plans=40, seed=0).best.score >= 0.995 * told


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([np.zeros(7)] * 3, "got 3 for 4 knobs"),
        ([np.zeros(7)] * 3 + [np.zeros(6)], "wrong for conv1"),
        ([np.zeros(7)] * 3 + [np.full(7, np.nan)], "wrong for conv1"),
    ],
)
def test_sensitivities_that_do_not_fit_the_knobs_are_refused(told, message):
    problem = replace(bits_problem(0, num_layers=2)[0], sensitivities=lambda: told)
    with pytest.raises(ValueError, match=message):
        MilpSearch()(problem, num_plans=5, seed=0)


def test_channels_are_refused():
    with pytest.raises(RecipeError, match="milp decides bits, but 'conv0' decides channels"):
        MilpSearch()(waterfilling_problem(0, num_layers=2)[0], num_plans=5, seed=0)


def test_a_belief_finds_the_factors_of_a_linear_loss():
    rng = np.random.default_rng(0)
    profiles = [4.0 ** -np.arange(1.0, 5.0) - 4.0**-4 for _ in range(6)]
    factors = rng.lognormal(0, 0.5, 6)
    belief = LossBelief(profiles, 2.0)
    for _ in range(60):
        indices = rng.integers(4, size=6).tolist()
        loss = 0.1 + sum(f * p[i] for f, p, i in zip(factors, profiles, indices, strict=True))
        belief.observe(indices, math.exp(-loss))
    found = [array[0] / profile[0] for array, profile in zip(belief.expected(), profiles, strict=True)]
    assert found == pytest.approx(factors, rel=0.05)


def test_a_belief_drawn_from_scatters_less_the_more_has_been_seen():
    rng = np.random.default_rng(0)
    profiles = [4.0 ** -np.arange(1.0, 5.0) - 4.0**-4 for _ in range(6)]
    belief = LossBelief(profiles, 2.0)
    spreads = []
    for count in range(1, 41):
        indices = rng.integers(4, size=6).tolist()
        belief.observe(indices, math.exp(-sum(p[i] for p, i in zip(profiles, indices, strict=True))))
        if count in (2, 40):
            drawn = [[array[0] for array in belief.drawn(rng)] for _ in range(50)]
            spreads.append(float(np.std(drawn, axis=0).mean()))
    assert spreads[1] < spreads[0] / 3


def test_scores_that_are_not_positive_are_taken_as_losses():
    belief = LossBelief([np.array([1.0, 0.0])] * 2, 2.0)
    for indices, score in (([1, 1], -1.0), ([0, 1], -4.0), ([1, 0], -2.0), ([0, 0], -5.0)):
        belief.observe(indices, score)
    assert [array[0] for array in belief.expected()] == pytest.approx([3.0, 1.0], rel=0.05)


def test_uniform_pairs_start_with_equal_bits_and_leave_no_room():
    problem, *_ = bits_problem(0, num_layers=4, budget=0.6)
    pairs = [(values[0], values[1]) for values in uniform_assignments(problem)]
    assert all(
        values == list(pair) * 4 for values, pair in zip(uniform_assignments(problem), pairs, strict=True)
    )
    equal = pairs[0][0]
    assert pairs[0] == (equal, equal)

    def fits(weight, act):
        return problem.feasible([weight, act] * 4)

    assert fits(equal, equal)
    assert not fits(equal + 1, equal + 1)
    maximal = {
        (w, a)
        for w in range(2, 9)
        for a in range(2, 9)
        if fits(w, a) and not (w < 8 and fits(w + 1, a)) and not (a < 8 and fits(w, a + 1))
    }
    assert maximal == set(pairs) - ({pairs[0]} - maximal)
    trials = Uniform()(problem, num_plans=50, seed=0).trials
    assert len(trials) == len(pairs)
    assert len(Uniform()(problem, num_plans=1, seed=0).trials) == 1


@given(seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=30, deadline=None)
def test_bits_move_together_by_equal_steps(seed, data):
    """Bits that end off their bounds are as far apart as was asked for, up to rounding to whole bits."""
    problem, *_ = bits_problem(seed, num_layers=4)
    fractions = data.draw(st.lists(st.floats(0.05, 1), min_size=8, max_size=8))
    values = scaled_to_budget(problem, fractions)
    assert problem.feasible(values)
    moved = [v - 7 * f for v, f in zip(values, fractions, strict=True) if 2 < v < 8]
    if moved:
        assert max(moved) - min(moved) < 1 + 1e-6


def test_a_planner_proposes_only_what_is_new():
    problem, *_ = bits_problem(1, num_layers=3)
    planner, seen = BitPlanner(problem, 0), []
    plans = chain(planner.opening(probe=True), planner.proposals())
    for _, (_, values) in zip(range(25), plans, strict=False):
        seen.append(tuple(values))
        planner.observe(values, problem.evaluate(problem.plan(values)))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", ["uniform", "random", "greedy", "milp"])
def test_searches_on_bits_meet_every_budget_and_none_beats_the_optimum(name):
    for seed in range(4):
        problem, best, _ = bits_problem(seed, num_layers=4, budget=0.4)
        result = make_search(name, {})(problem, num_plans=20, seed=seed)
        assert all(problem.meets_budgets(problem.price(trial.plan)) for trial in result.trials)
        assert result.best.score <= best + 1e-12
