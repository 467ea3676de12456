"""Bringing an assignment to the budget without a favourite layer."""

from __future__ import annotations

from autocompress.core import Knob, Problem, Value
from autocompress.core.fitting import scaled_to_budget

__all__ = ["scaled_to_budget", "uniform_assignments"]


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
