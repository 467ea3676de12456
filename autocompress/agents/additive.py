"""What plans cost, as sums of tables over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.agents.allocate import allocate_bits
from autocompress.core import Metric, Problem, Value
from autocompress.core.errors import RecipeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUM_CHECKED = 12
_TOLERANCE = 1e-6


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

    def total(self, metric: Metric, indices: Sequence[int]) -> float:
        """The cost when knob ``k`` takes its choice ``indices[k]``."""
        parts = zip(self.items, self.tables[metric], strict=True)
        return self.constants[metric] + sum(
            float(table[tuple(indices[k] for k in knobs)]) for knobs, table in parts
        )


def cost_tables(problem: Problem, around: Sequence[Value] | None = None) -> CostTables:
    """Tables for every metric of the budgets, from prices of plans that differ in one layer.

    Exact for every plan when the costs add up over layers (see :func:`additive_error`), else for plans that
    differ from ``around`` in one layer.

    Args:
        problem: its price is asked once per pair of bits of every layer.
        around: the choices of the other knobs; their last by default.
    """
    metrics = list(dict.fromkeys(budget.metric for budget in problem.budgets))
    choices = [knob.choices for knob in problem.knobs]
    start = list(around) if around is not None else [options[-1] for options in choices]

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


def additive_error(problem: Problem, tables: CostTables) -> float:
    """The largest relative error of the tables on a few plans: the cheapest, and random ones."""
    rng = np.random.default_rng(0)
    sizes = [len(knob.choices) for knob in problem.knobs]
    worst = 0.0
    for indices in [[0] * len(sizes), *(rng.integers(sizes).tolist() for _ in range(_NUM_CHECKED))]:
        cost = problem.price(
            problem.plan([k.choices[i] for k, i in zip(problem.knobs, indices, strict=True)])
        )
        for metric in tables.tables:
            error = abs(tables.total(metric, indices) - cost[metric])
            worst = max(worst, error / max(abs(cost[metric]), 1e-300))
    return worst


class Allocator:
    """The bits that lose least within the budgets of a problem, for losses that add up over knobs.

    Args:
        problem: whose knobs decide bits.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        RecipeError: knobs that do not decide bits, or costs that do not add up over layers.
    """

    def __init__(self, problem: Problem) -> None:
        problem.reachable()
        if other := [f"{knob.name!r} decides {knob.kind}" for knob in problem.knobs if not knob.is_bits]:
            raise RecipeError(f"milp decides bits, but {', '.join(other)}; use another search")
        self._problem = problem
        self._tables = cost_tables(problem)
        error = additive_error(problem, self._tables)
        if error > _TOLERANCE:
            metrics = ", ".join(self._tables.tables)
            raise RecipeError(
                f"milp needs costs that add up over layers; such sums miss {metrics} by up to {error:.1%} on "
                "this target. Budget what does (of a pipeline: luts and brams at a given frames_per_s), or "
                "use another search"
            )
        self._limits = {
            metric: min(b.limit for b in problem.budgets if b.metric == metric) - constant
            for metric, constant in self._tables.constants.items()
        }

    def __call__(self, losses: Sequence[Floats], *, gap: float = 1e-2) -> list[Value]:
        """One choice per knob.

        Args:
            losses: per knob, the loss of each choice, shape (choices,).
            gap: relative distance to the least loss at which the solver may stop.
        """
        items, problem = self._tables.items, self._problem
        counted = set[int]()
        totals: list[Floats] = []
        for knobs in items:
            parts = [losses[k] if k not in counted else np.zeros_like(losses[k]) for k in knobs]
            counted |= set(knobs)
            totals.append(parts[0] if len(parts) == 1 else np.add.outer(*parts))
        chosen = allocate_bits(totals, self._tables.tables, self._limits, decisions=items, gap=gap)
        index = {
            k: i
            for knobs, places in zip(items, chosen, strict=True)
            for k, i in zip(knobs, places, strict=True)
        }
        values = [knob.choices[index[k]] for k, knob in enumerate(problem.knobs)]
        return values if problem.feasible(values) else problem.bounded(values)


def _items(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Every two knobs that decide one layer, and every knob that decides alone."""
    deciders: dict[str, list[int]] = {}
    for index, knob in enumerate(problem.knobs):
        for layer in knob.bit_layers:
            deciders.setdefault(layer, []).append(index)
    pairs = dict.fromkeys(tuple(knobs) for knobs in deciders.values() if len(knobs) == 2)
    paired = {knob for pair in pairs for knob in pair}
    alone = [(index,) for index in range(len(problem.knobs)) if index not in paired]
    return (*pairs, *alone)
