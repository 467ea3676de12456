from __future__ import annotations

from dataclasses import replace

import pytest

from autocompress.core import Bits, Budget, Cost, Knob, Plan, Problem
from autocompress.core.errors import InfeasibleBudgetError

LAYERS = ("stem", "left", "right")


def bits_of(plan: Plan) -> Cost:
    """Latency is the sum of all bits, with the share of every layer."""
    shares = {name: {"latency_ms": float(b.weight + b.act)} for name, b in plan.bits.items()}
    return Cost({"latency_ms": sum(s["latency_ms"] for s in shares.values())}, shares)  # type: ignore[arg-type]


def tied(limit: float = 100.0) -> Problem:
    """The stem is pinned to 8 bits; both branches share their weights' bits and read at bits of their own."""
    knobs = (
        Knob("weight_bits", "left", (2, 4, 8), layers=("left", "right")),
        Knob("act_bits", "left", (2, 4, 8)),
        Knob("act_bits", "right", (2, 4, 8)),
    )
    base = Plan(channels={"g": 3}, bits={"stem": Bits(8, 8)})
    budget = Budget("latency_ms", limit, relative=False)
    return Problem(knobs, (budget,), bits_of, lambda plan: 0.5, base=base)


def test_a_plan_holds_the_base_and_sets_every_layer_of_a_tied_knob() -> None:
    plan = tied().plan([4, 2, 8])
    assert plan == Plan(channels={"g": 3}, bits={"stem": Bits(8, 8), "left": Bits(4, 2), "right": Bits(4, 8)})


def test_undecided_knobs_stand_at_their_last_choices() -> None:
    assert tied().plan([2]) == tied().plan([2, 8, 8])


def test_a_side_without_knob_keeps_the_bits_of_the_base() -> None:
    problem = replace(tied(), knobs=tied().knobs[:1], base=Plan(bits={"left": Bits(8, 5)}))
    assert problem.plan([4]).bits == {"left": Bits(4, 5), "right": Bits(4, 32)}


def test_the_base_takes_part_in_budgets() -> None:
    # 16 of the stem and 12 at the branches' fewest.
    assert tied(28.0).smallest["latency_ms"] == 24
    with pytest.raises(InfeasibleBudgetError, match=r"is 24 .*held up by stem \(67%\), left \(17%\), right"):
        tied(23.0).reachable()


def test_an_impossible_budget_on_bits_names_the_remedy_for_bits() -> None:
    with pytest.raises(InfeasibleBudgetError, match="allow fewer bits or unpin layers"):
        tied(23.0).reachable()


def test_two_knobs_for_one_decision_are_refused() -> None:
    with pytest.raises(ValueError, match="several set weight_bits of 'right'"):
        replace(tied(), knobs=(*tied().knobs, Knob("weight_bits", "right", (2, 8))))


def test_ties_and_base_tell_problems_apart_and_sensitivities_do_not() -> None:
    problem = tied()
    loose = (replace(problem.knobs[0], layers=()), *problem.knobs[1:])
    others = [replace(problem, knobs=loose), replace(problem, base=Plan()), replace(problem, identity="x")]
    assert len({problem.digest, *(other.digest for other in others)}) == 4
    assert replace(problem, sensitivities=lambda: []).digest == problem.digest


def test_more_values_than_knobs_are_refused() -> None:
    with pytest.raises(ValueError, match="3 knobs take at most as many values, got 4"):
        tied().plan([2, 2, 2, 2])
