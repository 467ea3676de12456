"""Bringing an assignment to the budget without a favourite layer."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.core import Problem, Value

_NUM_HALVINGS = 24


def scaled_to_budget(problem: Problem, fractions: Sequence[float]) -> list[Value]:
    """The choices at ``s * fractions`` for the largest common factor s that meets every budget.

    Clipping knob by knob starves the knobs decided last; one factor treats all alike. The factor may
    exceed 1, and fractions saturate at 1, so the plan spends the budget. Costs prices, not scores.

    Args:
        problem: with reachable budgets.
        fractions: one number in (0, 1] per knob.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
    """
    problem.reachable()
    low, high = 0.0, 1 / max(min(fractions), 1e-6)

    def at(factor: float) -> list[Value]:
        return [knob.at(factor * f) for knob, f in zip(problem.knobs, fractions, strict=True)]

    if problem.feasible(at(high)):
        return at(high)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.feasible(at(middle)) else (low, middle)
    return at(low)
