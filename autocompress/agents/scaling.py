"""Bringing an assignment to the budget without a favourite layer."""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.core import Knob, Problem, Value

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


def uniform_assignments(problem: Problem) -> list[list[Value]]:
    """The uniform assignments within every budget that no other one exceeds, the plainest first.

    Unless all knobs decide bits there is one: all at the largest common fraction. Else all weights have one
    width and all activations another (a knob that lacks the width takes the next narrower it has): first the
    widest common to both, then the pairs in which neither can be wider, the most equal first. Costs prices,
    not scores.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
    """
    problem.reachable()
    if not all(knob.is_bits for knob in problem.knobs):
        return [scaled_to_budget(problem, [1.0] * len(problem.knobs))]
    widths = sorted({int(c) for knob in problem.knobs for c in knob.choices if knob.is_bits})
    widest = {
        w: max((a for a in widths if problem.feasible(_at_bits(problem, w, a))), default=0) for w in widths
    }
    equal = max((w for w in widths if widest[w] >= w), default=widths[0])
    pairs = [(w, a) for w, a in widest.items() if a and all(widest[v] < a for v in widths if v > w)]
    pairs.sort(key=lambda pair: (abs(pair[0] - pair[1]), -pair[0]))
    found = [_at_bits(problem, *pair) for pair in [(equal, equal), *pairs]]
    return [values for i, values in enumerate(found) if values not in found[:i]]


def _at_bits(problem: Problem, weight: int, act: int) -> list[Value]:
    """Every knob at its widest choice up to the given width, or its first."""
    wanted = {"weight_bits": weight, "act_bits": act}

    def at(knob: Knob) -> Value:
        return max((c for c in knob.choices if int(c) <= wanted[knob.kind]), default=knob.choices[0])

    return [at(knob) for knob in problem.knobs]
