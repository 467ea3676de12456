"""What is believed of how much every knob's choice adds to the loss, after the scores seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

Floats = NDArray[np.float64]

_NOISE = 0.003  # standard deviation of an accuracy on some thousand images
_LEAST_SCORE = 1e-3
_LEAST_FACTOR = 0.02  # no knob is believed to matter less than this beside its first belief
_LEAST_SLOPE = 0.05


class LossBelief:
    """Bayesian linear regression of losses: ``loss = start + sum over knobs of factor * profile[choice]``.

    The loss of a score is ``-ln(score)``, in which what single layers spoil adds up, or ``-score`` when the
    first score is not positive. Factors are believed to be normal around one common value, which is fitted.

    Args:
        profiles: per knob, how the loss falls over its choices, on a common scale; 0 at the last.
        spread: standard deviation of a factor, relative to the common value.
    """

    def __init__(self, profiles: Sequence[Floats], spread: float) -> None:
        self._profiles, self._spread = list(profiles), spread
        self._rows: list[Floats] = []
        self._scores: list[float] = []

    def observe(self, indices: Sequence[int], score: float) -> None:
        """Take in the score of a plan.

        Args:
            indices: the choice of every knob, from 0.
            score: higher is better.
        """
        self._rows.append(np.array([p[i] for p, i in zip(self._profiles, indices, strict=True)]))
        self._scores.append(score)

    def expected(self) -> list[Floats]:
        """The expected loss of every knob's choices."""
        if not self._rows:
            return self._profiles
        mean, _, common = self._posterior()
        return self._losses(mean, common)

    def drawn(self, rng: np.random.Generator) -> list[Floats]:
        """Losses of every knob's choices, drawn from the belief."""
        if not self._rows:
            return self._profiles
        mean, factor, common = self._posterior()
        noise = solve_triangular(factor, rng.standard_normal(len(mean)), lower=True, trans="T")
        return self._losses(mean + noise, common)

    def _losses(self, parameters: Floats, common: float) -> list[Floats]:
        factors = np.maximum(parameters[1:], _LEAST_FACTOR * common)
        return [f * profile for f, profile in zip(factors, self._profiles, strict=True)]

    def _posterior(self) -> tuple[Floats, Floats, float]:
        """Mean of (start, factors), lower Cholesky factor of their precision, and the common factor."""
        rows, (losses, noise) = np.array(self._rows), self._observed()
        common = _common_factor(rows.sum(axis=1), losses, noise)
        num_factors = rows.shape[1]
        mean = np.array([float(losses.min()), *[common] * num_factors])
        precision = np.array([1.0, *[(self._spread * common) ** -2] * num_factors])
        weighted = np.column_stack([np.ones(len(rows)), rows]) / noise[:, None]
        factor = cholesky(np.diag(precision) + weighted.T @ weighted, lower=True)
        mean = cho_solve((factor, True), precision * mean + weighted.T @ (losses / noise))
        return mean, factor, common

    def _observed(self) -> tuple[Floats, Floats]:
        """Losses of the scores seen, and their standard deviations."""
        scores = np.array(self._scores)
        if self._scores[0] <= 0:
            return -scores, np.full(len(scores), _NOISE * max(float(np.abs(scores).max()), 1e-12))
        scores = np.maximum(scores, _LEAST_SCORE)
        return -np.log(scores), _NOISE / scores


def _common_factor(totals: Floats, losses: Floats, noise: Floats) -> float:
    """The factor that fits best when all knobs have the same."""
    weighted = np.stack([np.ones(len(totals)), totals], axis=1) / noise[:, None]
    slope = float(np.linalg.lstsq(weighted, losses / noise)[0][1])
    least = _LEAST_SLOPE * float(np.ptp(losses)) / max(float(totals.max()), math.ulp(0.0))
    return max(slope, least, 1e-9)
