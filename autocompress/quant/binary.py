"""Arithmetic of binary networks: dot products by counting bits, BatchNorm and sign as one integer comparison.

A network whose layers read signs (a signed grid of one bit) needs no multiplier. With +1 written as True
and -1 as False, a dot product of K signs is ``2 * popcount(XNOR(w, a)) - K``. What follows, BatchNorm and
the next sign, compares that integer with a constant.

:class:`~autocompress.quant.skeleton.Skeleton` folds BatchNorm into the layer in front, so that a negative
factor turns the signs of that channel's weights: its comparisons are all "at least", max-pooling commutes
with them, and FINN's thresholding units, which know no other, take them as they are.
:func:`sign_thresholds` also folds BatchNorm that stands behind a layer, where a negative factor turns the
comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class SignThresholds:
    """One comparison with an integer per channel.

    Args:
        limits: shape (C,).
        flipped: whether a channel is +1 up to its limit instead of from it on, shape (C,).
    """

    limits: NDArray[np.int64]
    flipped: NDArray[np.bool_]

    def positive(self, values: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where the sign is +1, for integers of shape (..., C)."""
        at_least: NDArray[np.bool_] = values >= self.limits
        return np.where(self.flipped, values <= self.limits, at_least)

    def on_popcounts(self, fan_in: int) -> SignThresholds:
        """The same comparisons on numbers of agreeing bits instead of dot products of signs.

        Args:
            fan_in: K, the length of the dot products. All must have it: a convolution that pads with zeros,
                which are no signs, has shorter ones at its borders.
        """
        doubled = self.limits + fan_in
        halves = np.where(self.flipped, doubled // 2, -(-doubled // 2))
        return SignThresholds(np.clip(halves, -1, fan_in + 1), self.flipped)


def popcount_dot(weights: NDArray[np.bool_], inputs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Dot products of signs by counting equal bits.

    Args:
        weights: True for +1, shape (C, K).
        inputs: True for +1, shape (..., K).

    Returns:
        Shape (..., C).
    """
    agreeing = (inputs[..., None, :] == weights).sum(axis=-1, dtype=np.int64)
    dots: NDArray[np.int64] = 2 * agreeing - weights.shape[-1]
    return dots


def sign_thresholds(gamma: ArrayLike, beta: ArrayLike, mean: ArrayLike, std: ArrayLike) -> SignThresholds:
    """The integers ``d`` for which ``gamma * (d - mean) / std + beta >= 0``, as comparisons.

    Exact: computed with fractions, so that no float rounding moves a limit. A layer with folded BatchNorm,
    ``step * d + bias``, is the case ``gamma = step, beta = bias, mean = 0, std = 1``.

    Args:
        gamma, beta, mean, std: broadcast to shape (C,); ``std`` is the square root of the variance and
            BatchNorm's epsilon.

    Raises:
        ValueError: a value is not finite, or a ``std`` is not > 0.

    Source: Umuroglu et al., FINN, arXiv 1612.07119, section 4.2.2; Li et al., arXiv 1702.06392.
    """
    columns = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(v, np.float64)) for v in (gamma, beta, mean, std))
    )
    if not all(np.isfinite(column).all() for column in columns) or (columns[3] <= 0).any():
        raise ValueError("BatchNorm's values must be finite and std > 0; the network has diverged")
    pairs = [_threshold(*map(Fraction, row)) for row in zip(*(c.tolist() for c in columns), strict=True)]
    return SignThresholds(np.array([p[0] for p in pairs], np.int64), np.array([p[1] for p in pairs]))


_NEVER = 2**53  # beyond every accumulator


def _threshold(gamma: Fraction, beta: Fraction, mean: Fraction, std: Fraction) -> tuple[int, bool]:
    if gamma == 0:  # a constant
        return (-_NEVER if beta >= 0 else _NEVER), False
    limit = mean - beta * std / gamma
    whole = math.floor(limit) if gamma < 0 else math.ceil(limit)
    return max(-_NEVER, min(whole, _NEVER)), gamma < 0
