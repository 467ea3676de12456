"""Bringing an assignment to the budgets with no knob paying for the others."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.core.problem import Knob, Problem, Value

_NUM_HALVINGS = 24
_MOST_CHOICES = 32  # bit-widths a knob can offer: as far as bits ever have to move


def scaled_to_budget(problem: Problem, fractions: Sequence[float]) -> list[Value]:
    """The choices at ``fractions``, moved up or down together until the budgets are spent.

    Clipping knob by knob starves the knobs decided last. Channels are multiplied by a common factor. Bits are
    moved by a common number of bits: rounding errors shrink fourfold with every bit, so when a budget grows,
    the plan that loses least gains about the same number of bits everywhere. Where a problem has both, or
    architectures, all choices are multiplied. Costs prices, not scores.

    Args:
        problem: with reachable budgets.
        fractions: one number in (0, 1] per knob.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
    """
    problem.reachable()
    low, high = 0.0, max(2.0, 1 / max(min(fractions), 1e-6))
    by_bits = all(knob.is_bits for knob in problem.knobs)

    def at(level: float) -> list[Value]:
        return [_moved(k, f, level, by_bits) for k, f in zip(problem.knobs, fractions, strict=True)]

    if problem.feasible(at(high)):
        return at(high)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.feasible(at(middle)) else (low, middle)
    return at(low)


def _moved(knob: Knob, fraction: float, level: float, by_bits: bool) -> Value:
    """The choice at ``fraction`` for level 1, the first for level 0, the last for high levels."""
    if by_bits:
        return knob.at(fraction + (level - 1) * _MOST_CHOICES / len(knob.choices))
    return knob.at(level * fraction)


def fitted(problem: Problem, wanted: Sequence[Value]) -> list[Value]:
    """The wanted choices, moved towards the first ones together until every budget is met.

    Clipping knob by knob takes everything from those decided last. Here every choice falls to the same share
    of its number, the largest share within the budgets; then, in turn, each knob rises by one choice as long
    as budgets and wishes allow. Wanted choices within the budgets stay as they are, so this is idempotent.
    Costs prices, not scores.

    Args:
        problem: whose budgets its first choices meet.
        wanted: one choice per knob.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
    """
    if problem.feasible(wanted):
        return list(wanted)
    problem.reachable()
    tops = [knob.choices.index(value) for knob, value in zip(problem.knobs, wanted, strict=True)]
    low, high = 0.0, 1.0
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        inside = problem.feasible(_at(problem, _lowered(tops, middle)))
        low, high = (middle, high) if inside else (low, middle)
    return _at(problem, _raised(problem, _lowered(tops, low), tops))


def _lowered(tops: Sequence[int], share: float) -> list[int]:
    return [min(int(share * (top + 1)), top) for top in tops]


def _raised(problem: Problem, indices: list[int], tops: Sequence[int]) -> list[int]:
    """One choice at a time for each knob in turn, until none can rise; a knob that cannot is passed over."""
    open_knobs = [k for k, top in enumerate(tops) if indices[k] < top]
    while open_knobs:
        still_open = []
        for knob in open_knobs:
            higher = [*indices[:knob], indices[knob] + 1, *indices[knob + 1 :]]
            if problem.feasible(_at(problem, higher)):
                indices = higher
                if indices[knob] < tops[knob]:
                    still_open.append(knob)
        open_knobs = still_open
    return indices


def _at(problem: Problem, indices: Sequence[int]) -> list[Value]:
    return [knob.choices[index] for knob, index in zip(problem.knobs, indices, strict=True)]
