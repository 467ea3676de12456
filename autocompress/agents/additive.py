"""The bits that lose least within a budget, when losses add up over knobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.agents.allocate import allocate_bits
from autocompress.agents.scaling import uniform_assignments
from autocompress.core import Metric, Problem, Value
from autocompress.core.errors import RecipeError

Floats = NDArray[np.float64]

_NUM_CHECKED = 6
_NUM_MOVES = 1500  # of the local search; each costs up to one price
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class CostTables:
    """Costs as a constant and one table per item; an item is a knob, or two knobs that decide one layer.

    Args:
        items: the knobs (by position) along the axes of each table. A knob may be in several items.
        constants: metric -> what no choice changes.
        tables: metric -> per item, the cost of its choices.
    """

    items: tuple[tuple[int, ...], ...]
    constants: dict[Metric, float]
    tables: dict[Metric, tuple[Floats, ...]]


def cost_tables(problem: Problem) -> CostTables:
    """Tables for every metric of the budgets, from prices of plans in which one layer is changed.

    Args:
        problem: with costs that add up over layers. Its price is asked once per pair of bits of every layer.
    """
    metrics = list(dict.fromkeys(budget.metric for budget in problem.budgets))
    choices = [knob.choices for knob in problem.knobs]
    start = [options[-1] for options in choices]

    def price(changes: dict[int, Value]) -> Floats:
        values = [changes.get(k, value) for k, value in enumerate(start)]
        cost = problem.price(problem.plan(values))
        return np.array([cost[metric] for metric in metrics], np.float64)

    base = price({})
    single = [np.array([price({k: c}) - base for c in options]) for k, options in enumerate(choices)]
    items = _items(problem)
    tables, counted = [], set[int]()
    for knobs in items:
        if len(knobs) == 1:
            table = single[knobs[0]]
        else:
            j, k = knobs
            both = [[price({j: a, k: b}) - base for b in choices[k]] for a in choices[j]]
            table = np.array(both) - sum(
                np.expand_dims(single[knob], axis=1 - axis)
                for axis, knob in enumerate(knobs)
                if knob in counted
            )
        counted |= set(knobs)
        tables.append(table)
    return CostTables(
        items,
        {metric: float(base[m]) for m, metric in enumerate(metrics)},
        {metric: tuple(table[..., m] for table in tables) for m, metric in enumerate(metrics)},
    )


def adds_up(problem: Problem) -> bool:
    """Whether the budgets' costs add up over layers, as far as a few random plans can tell.

    Changing two halves of the layers at once must cost as much as changing each alone, summed.
    """
    rng = np.random.default_rng(0)
    metrics = [budget.metric for budget in problem.budgets]
    last = [knob.choices[-1] for knob in problem.knobs]
    parts = np.array(_parts(problem))

    def price(values: Sequence[Value]) -> Floats:
        cost = problem.price(problem.plan(values))
        return np.array([cost[metric] for metric in metrics], np.float64)

    base = price(last)
    for _ in range(_NUM_CHECKED):
        drawn = [knob.at(float(rng.uniform())) for knob in problem.knobs]
        half = rng.permutation(parts.max() + 1)[parts] % 2 == 0
        one = price([new if here else old for new, old, here in zip(drawn, last, half, strict=True)])
        other = price([old if here else new for new, old, here in zip(drawn, last, half, strict=True)])
        if not np.allclose(one + other, price(drawn) + base, rtol=_TOLERANCE, atol=0.0):
            return False
    return True


class Allocator:
    """The bits that lose least within the budgets of a problem, for losses that add up over knobs.

    Exact where costs add up over layers (:func:`.allocate_bits`). Elsewhere, as in a pipeline that is as slow
    as its slowest stage, a local search: from the uniform plan, one knob gains a bit and another loses one as
    long as less is lost and the real price fits. On FINN's pipeline this beat integer programs on fitted or
    linearised prices (docs/decisions/0007).

    Args:
        problem: whose knobs decide bits.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        RecipeError: knobs that do not decide bits.
    """

    def __init__(self, problem: Problem) -> None:
        problem.reachable()
        if other := [f"{knob.name!r} decides {knob.kind}" for knob in problem.knobs if not knob.is_bits]:
            raise RecipeError(f"milp decides bits, but {', '.join(other)}; use another search")
        self._problem = problem
        self._tables = cost_tables(problem) if adds_up(problem) else None
        self._rng = np.random.default_rng(0)
        self._starts: list[list[int]] = []

    def __call__(self, losses: Sequence[Floats], *, gap: float = 1e-2) -> list[Value]:
        """One choice per knob.

        Args:
            losses: per knob, the loss of each choice, shape (choices,).
            gap: relative distance to the least loss at which an exact solver may stop.
        """
        found = self._solved(self._tables, losses, gap) if self._tables else self._exchanged(losses)
        values = self._values(found)
        return values if self._problem.feasible(values) else self._problem.bounded(values)

    def _values(self, indices: Sequence[int]) -> list[Value]:
        return [knob.choices[i] for knob, i in zip(self._problem.knobs, indices, strict=True)]

    @property
    def exact(self) -> bool:
        """Whether costs add up, so that plans are optimal up to the gap."""
        return self._tables is not None

    def _solved(self, costs: CostTables, losses: Sequence[Floats], gap: float) -> list[int]:
        items = costs.items
        counted = set[int]()
        totals: list[Floats] = []
        for knobs in items:
            parts = [losses[k] if k not in counted else np.zeros_like(losses[k]) for k in knobs]
            counted |= set(knobs)
            totals.append(parts[0] if len(parts) == 1 else np.add.outer(*parts))
        limits = {
            metric: min(b.limit for b in self._problem.budgets if b.metric == metric) - constant
            for metric, constant in costs.constants.items()
        }
        chosen = allocate_bits(totals, costs.tables, limits, decisions=items, gap=gap)
        index = {
            k: i
            for knobs, places in zip(items, chosen, strict=True)
            for k, i in zip(knobs, places, strict=True)
        }
        return [index[k] for k in range(len(losses))]

    def _exchanged(self, losses: Sequence[Floats]) -> list[int]:
        """The local search, from the best of the uniform plans and the last result."""

        def loss_of(indices: Sequence[int]) -> float:
            return sum(float(array[i]) for array, i in zip(losses, indices, strict=True))

        first = not self._starts
        if first:
            knobs = self._problem.knobs
            self._starts = [
                [k.choices.index(v) for k, v in zip(knobs, values, strict=True)]
                for values in uniform_assignments(self._problem)
            ]
        best = min(self._starts, key=loss_of)
        for _ in range(_NUM_MOVES):
            up, down = self._rng.integers(len(best), size=2)
            moved = list(best)
            moved[up] = min(moved[up] + 1, len(losses[up]) - 1)
            if up != down:
                moved[down] = max(moved[down] - 1, 0)
            if loss_of(moved) < loss_of(best) and self._problem.feasible(self._values(moved)):
                best = moved
        self._starts = [*(self._starts if first else self._starts[:-1]), best]
        return best


def _items(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Every two knobs that decide one layer, and every knob that decides alone."""
    pairs = dict.fromkeys(tuple(knobs) for knobs in _deciders(problem) if len(knobs) == 2)
    paired = {knob for pair in pairs for knob in pair}
    alone = [(index,) for index in range(len(problem.knobs)) if index not in paired]
    return (*pairs, *alone)


def _parts(problem: Problem) -> list[int]:
    """For every knob the number of its part; knobs of different parts decide no layer together."""
    part = list(range(len(problem.knobs)))
    for knobs in _deciders(problem):
        joined = {part[k] for k in knobs}
        part = [min(joined) if p in joined else p for p in part]
    return [sorted(set(part)).index(p) for p in part]


def _deciders(problem: Problem) -> list[list[int]]:
    """The knobs that decide each layer."""
    deciders: dict[str, list[int]] = {}
    for index, knob in enumerate(problem.knobs):
        for layer in knob.bit_layers:
            deciders.setdefault(layer, []).append(index)
    return list(deciders.values())
