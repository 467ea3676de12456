"""Problems whose best score is known in closed form."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Budget, Cost, Knob, Plan, Problem
from autocompress.core.problem import KnobKind

_LOWEST_PERCENT = 20
_BITS = (2, 3, 4, 5, 6, 7, 8)


def waterfilling_problem(
    seed: int, num_layers: int = 14, budget: float = 0.5
) -> tuple[Problem, float, float]:
    """A channel problem whose best score is known in closed form.

    Layer ``l`` keeps the share ``a`` of its channels, costs ``f_l * a`` MACs and adds ``k_l * (1/a - 1)``
    to a loss; the score is ``exp(-loss / U)``. By the Karush-Kuhn-Tucker conditions the best shares are
    ``clip(sqrt(k_l / (lambda * f_l)), 0.2, 1)`` with lambda such that the budget is spent. ``U`` makes the
    uniform plan score ``1/e``. The knobs offer whole percents from 20 to 100.

    The knobs' eight features are the facts of a made-up network of 3x3 and 5x5 convolutions, from which
    ``f_l`` follows. The sensitivities ``k_l`` are drawn independently: no feature tells them, so an agent
    must learn them from scores.

    Args:
        seed: draws the layers; equal seeds give equal problems.
        num_layers: number of knobs.
        budget: share of all MACs that may remain, above 0.2 and below 1.

    Returns:
        The problem, the best score over real-valued shares (no plan scores higher), and the score of the
        uniform plan at the real-valued share ``budget``, which is 1/e.

    Raises:
        ValueError: fewer than two layers, or a budget out of range.
    """
    if num_layers < 2 or not _LOWEST_PERCENT / 100 < budget < 1:
        raise ValueError(
            f"need num_layers >= 2 and a budget between {_LOWEST_PERCENT / 100} and 1, "
            f"got {num_layers} and {budget}"
        )
    rng = np.random.default_rng(seed)
    features, macs = _made_up_layers(rng, num_layers)
    sensitivity = rng.lognormal(0.0, 0.9, num_layers)
    unit = float(sensitivity.sum()) * (1 / budget - 1)
    names = [f"conv{i}" for i in range(num_layers)]

    def kept(plan: Plan) -> NDArray[np.float64]:
        return np.array([plan.channels.get(name, 100) for name in names]) / 100

    def price(plan: Plan) -> Cost:
        return Cost({"macs": float(macs @ kept(plan))})

    def evaluate(plan: Plan) -> float:
        return math.exp(-float(sensitivity @ (1 / kept(plan) - 1)) / unit)

    knobs = tuple(
        Knob("channels", name, tuple(range(_LOWEST_PERCENT, 101)), tuple(row))
        for name, row in zip(names, features.tolist(), strict=True)
    )
    limit = Budget("macs", budget * float(macs.sum()), relative=False)
    problem = Problem(knobs, (limit,), price, evaluate, f"water-filling {seed} {num_layers} {budget}")
    best = _waterfilling_shares(sensitivity, macs, limit.limit)
    return problem, math.exp(-float(sensitivity @ (1 / best - 1)) / unit), math.exp(-1)


def _made_up_layers(
    rng: np.random.Generator, num_layers: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features (num_layers, 8) in [0, 1] and MACs (num_layers,) of four stages of convolutions."""
    index = np.arange(num_layers)
    stage = 4 * index // num_layers
    size = 32 / 2.0**stage
    out = np.round(32 * 2.0**stage * rng.lognormal(0.0, 0.25, num_layers))
    inputs = np.concatenate([[16.0], out[:-1]])
    stride = np.concatenate([[1.0], 1.0 + np.diff(stage)])
    kernel = rng.choice([3.0, 5.0], num_layers)
    macs = inputs * out * kernel**2 * size**2
    columns = np.stack([index, out, inputs, size * stride, size * stride, stride, kernel, macs], axis=1)
    return columns / columns.max(axis=0), macs


def _waterfilling_shares(
    sensitivity: NDArray[np.float64], macs: NDArray[np.float64], limit: float
) -> NDArray[np.float64]:
    """The optimal shares, by bisection of the multiplier on a logarithmic scale."""
    ratio = np.sqrt(sensitivity / macs)
    low, high = float(ratio.min()), float(ratio.max()) / (_LOWEST_PERCENT / 100)
    for _ in range(200):
        root = math.sqrt(low * high)  # square root of lambda: the larger, the fewer channels are kept
        shares = np.clip(ratio / root, _LOWEST_PERCENT / 100, 1.0)
        low, high = (root, high) if float(macs @ shares) > limit else (low, root)
    return np.clip(ratio / high, _LOWEST_PERCENT / 100, 1.0)


def bits_problem(
    seed: int, num_layers: int = 8, budget: float = 0.5, *, told: bool = False
) -> tuple[Problem, float, float]:
    """A bit-width problem whose best score is known in closed form.

    Weights and activations have 2 to 8 bits. Side ``i`` of the 2 ``num_layers`` at ``b`` bits takes
    ``n_i * b`` of latency, as in a layer that waits for memory, and adds ``c_i / 4**b`` to a loss, as the
    squared error of rounding does; the score is ``exp(-loss / U)``. By the Karush-Kuhn-Tucker conditions the
    best bits are ``clip(log2(c_i / n_i) / 2 + level, 2, 8)`` with the level at which the budget is spent.
    ``U`` makes the uniform plan score ``1/e``.

    The nine features are the facts of a made-up network, from which ``n_i`` follows; no feature tells the
    sensitivities ``c_i``.

    Args:
        seed: draws the layers; equal seeds give equal problems.
        num_layers: layers, each with two knobs.
        budget: share of the latency at 8 bits that may remain, above a quarter and below 1.
        told: whether the problem's ``sensitivities`` are the true ones instead of none.

    Returns:
        The problem, the best score over real-valued bits (no plan scores higher), and the score of the
        uniform plan at ``8 * budget`` bits (real-valued), which is 1/e.

    Raises:
        ValueError: fewer than two layers, or a budget out of range.
    """
    if num_layers < 2 or not _BITS[0] / _BITS[-1] < budget < 1:
        raise ValueError(
            f"need num_layers >= 2 and a budget between {_BITS[0] / _BITS[-1]} and 1, "
            f"got {num_layers} and {budget}"
        )
    rng = np.random.default_rng(seed)
    features, sizes = _made_up_sides(rng, num_layers)
    loss = rng.lognormal(0.0, 1.0, 2 * num_layers)
    unit = float(loss.sum()) * 4.0 ** -(_BITS[-1] * budget)
    names = [f"conv{i}" for i in range(num_layers)]

    def bits_of(plan: Plan) -> NDArray[np.float64]:
        return np.array([(plan.bits[n].weight, plan.bits[n].act) for n in names], np.float64).ravel()

    def price(plan: Plan) -> Cost:
        return Cost({"latency_ms": float(sizes @ bits_of(plan))})

    def evaluate(plan: Plan) -> float:
        return math.exp(-float(loss @ 4.0 ** -bits_of(plan)) / unit)

    def sensitivities() -> list[NDArray[np.float64]]:
        bits = np.array(_BITS, np.float64)
        return [c * (4.0**-bits - 4.0 ** -bits[-1]) / unit for c in loss]

    sides: tuple[KnobKind, KnobKind] = ("weight_bits", "act_bits")
    knobs = tuple(
        Knob(sides[i % 2], names[i // 2], _BITS, tuple(row)) for i, row in enumerate(features.tolist())
    )
    limit = Budget("latency_ms", budget * _BITS[-1] * float(sizes.sum()), relative=False)
    identity = f"reverse water-filling {seed} {num_layers} {budget}"
    problem = Problem(
        knobs, (limit,), price, evaluate, identity, sensitivities=sensitivities if told else None
    )
    best = _waterfilling_bits(loss, sizes, limit.limit)
    return problem, math.exp(-float(loss @ 4.0**-best) / unit), math.exp(-1)


def _made_up_sides(
    rng: np.random.Generator, num_layers: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features (2 num_layers, 9) in [0, 1] and sizes (2 num_layers,) of weights and activations."""
    index = np.arange(num_layers)
    stage = 4 * index // num_layers
    area = (32 / 2.0**stage) ** 2
    depthwise = (index % 2).astype(np.float64)
    inputs = np.round(16 * 2.0**stage * rng.lognormal(0.0, 0.25, num_layers))
    out = np.where(depthwise == 1, inputs, np.round(inputs * rng.uniform(1, 2, num_layers)))
    stride = np.concatenate([[1.0], 1.0 + np.diff(stage)])
    kernel = np.where(depthwise == 1, 3.0, 1.0)
    params = np.where(depthwise == 1, 1, inputs) * out * kernel**2
    columns = np.stack([depthwise, inputs, out, stride, kernel, params, area, index], axis=1)
    scaled = np.repeat(columns / columns.max(axis=0), 2, axis=0)
    weight = np.tile([1.0, 0.0], num_layers)
    sizes = np.stack([params, 4 * inputs * area], axis=1).ravel()
    return np.concatenate([scaled, weight[:, None]], axis=1), sizes / sizes.sum()


def _waterfilling_bits(
    loss: NDArray[np.float64], sizes: NDArray[np.float64], limit: float
) -> NDArray[np.float64]:
    """The optimal real-valued bits, by bisection of the level."""
    ideal = 0.5 * np.log2(loss / sizes)
    low, high = _BITS[0] - float(ideal.max()), _BITS[-1] - float(ideal.min())
    for _ in range(200):
        level = (low + high) / 2
        spent = float(sizes @ np.clip(ideal + level, _BITS[0], _BITS[-1]))
        low, high = (low, level) if spent > limit else (level, high)
    return np.clip(ideal + low, _BITS[0], _BITS[-1])
