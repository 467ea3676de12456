"""Bit-width problems for tests: additive tables, tied layers, pinned sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Bits, Budget, Cost, Knob, Metric, Plan, Problem

BITS = (2, 3, 4, 5, 6, 7, 8)
FEATURES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
METRICS: tuple[Metric, ...] = ("latency_ms", "energy_mj")


def bit_knobs(layers: Sequence[str], choices: tuple[int, ...] = BITS) -> tuple[Knob, ...]:
    """Weights, then activations of every layer."""
    return tuple(
        Knob(kind, layer, choices, (*FEATURES, flag))
        for layer in layers
        for kind, flag in (("weight_bits", 1.0), ("act_bits", 0.0))
    )


def table_problem(
    tables: NDArray[np.float64], limits: Sequence[float], losses: NDArray[np.float64]
) -> Problem:
    """Costs add up over layers; the score is minus the sum of the losses.

    Args:
        tables: shape (metrics, layers, 7, 7), by weight bits and activation bits from 2; rising in both.
        limits: shares of the cost at 8 bits, one per metric.
        losses: shape (2 layers, 7), of the choices of every knob.
    """
    layers = [f"l{i}" for i in range(tables.shape[1])]
    index = np.arange(len(layers))

    def places(plan: Plan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        bits = [plan.bits[layer] for layer in layers]
        return np.array([b.weight - 2 for b in bits]), np.array([b.act - 2 for b in bits])

    def price(plan: Plan) -> Cost:
        w, a = places(plan)
        return Cost({m: float(t[index, w, a].sum()) for m, t in zip(METRICS, tables, strict=False)})

    def evaluate(plan: Plan) -> float:
        w, a = places(plan)
        return -float(losses[::2][index, w].sum() + losses[1::2][index, a].sum())

    budgets = tuple(
        Budget(m, share * float(t[:, -1, -1].sum()), relative=False)
        for m, share, t in zip(METRICS, limits, tables, strict=False)
    )
    return Problem(bit_knobs(layers), budgets, price, evaluate, "tables")


def random_tables(rng: np.random.Generator, num_metrics: int, num_layers: int) -> NDArray[np.float64]:
    """Costs that rise with either bit-width, by random amounts."""
    steps = rng.exponential(1.0, (num_metrics, num_layers, 7, 7)) * rng.lognormal(0, 1, (1, num_layers, 1, 1))
    return steps.cumsum(axis=2).cumsum(axis=3)


def random_losses(rng: np.random.Generator, num_layers: int) -> NDArray[np.float64]:
    """Losses that fall with the bits by random amounts; 0 at 8 bits."""
    steps = rng.exponential(1.0, (2 * num_layers, 6)) * 0.5 ** np.arange(6)
    return np.concatenate([steps[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((2 * num_layers, 1))], axis=1)


def haq_sweep(problem: Problem, values: Sequence[int]) -> list[int]:
    """HAQ's released loop, as written there: last layer to first, activations before weights."""
    bits = list(values)
    while not problem.feasible(bits):
        for k in reversed(range(len(bits))):
            if bits[k] > problem.knobs[k].choices[0]:
                bits[k] -= 1
            if problem.feasible(bits):
                break
    return bits


def pinned(problem: Problem, layer: str, bits: Bits) -> Problem:
    """The same problem without the knobs of one layer, whose bits are fixed."""
    knobs = tuple(k for k in problem.knobs if k.name != layer)
    return Problem(knobs, problem.budgets, problem.price, problem.evaluate, base=Plan(bits={layer: bits}))
