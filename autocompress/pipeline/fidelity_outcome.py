"""Quick scores beside fine-tuned accuracies: correlations with their uncertainty, files and a drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from autocompress.core import Metric, Plan
from autocompress.pipeline.charts import Figure
from autocompress.pipeline.contest_report import standalone
from autocompress.pipeline.plots import Axis, Series, percent, xy_chart
from autocompress.pipeline.run_directory import RunDirectory

FIGURES, PLOT = "fidelity.json", "fidelity.svg"
RESAMPLES = 2000
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Tuned:
    """A plan that was scored and fine-tuned.

    Args:
        plan: what it is.
        score: the quick score.
        accuracy: after fine-tuning, on the whole search split, in [0, 1].
        cost: totals by metric.
        seconds: what fine-tuning took.
    """

    plan: Plan
    score: float
    accuracy: float
    cost: Mapping[Metric, float] | Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Correlation:
    """A correlation in [-1, 1], and the interval that 95 % of resampled sets of plans give.

    All are NaN where one side has the same value for every plan.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """How well quick scores foretell what fine-tuning makes of plans.

    Args:
        name: of the recipe.
        epochs: of fine-tuning.
        tuned: the plans, worst quick score first.
        folder: of the run.
    """

    name: str
    epochs: int
    tuned: tuple[Tuned, ...]
    folder: Path

    @cached_property
    def spearman(self) -> Correlation:
        """Of ranks; equal values share the mean of their ranks."""
        return _correlation(*self._sides, lambda x, y: _pearson(rankdata(x), rankdata(y)))

    @cached_property
    def pearson(self) -> Correlation:
        """Of the values."""
        return _correlation(*self._sides, _pearson)

    @property
    def _sides(self) -> tuple[Values, Values]:
        return np.array([t.score for t in self.tuned]), np.array([t.accuracy for t in self.tuned])

    def verdict(self) -> str:
        """What that means, in a sentence or two."""
        spearman, pearson = self.spearman, self.pearson
        if np.isnan(spearman.value):
            return "No correlation can be given: all plans have the same quick score or the same accuracy."
        text = (
            f"Spearman {_shown(spearman)}, Pearson {_shown(pearson)} over {len(self.tuned)} plans "
            f"after {self.epochs} epochs (95 % by bootstrap over plans)."
        )
        if spearman.low <= 0:
            return text + " The interval holds 0: these plans do not show that the quick score ranks plans."
        return text

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and a row of text per plan, best quick score first."""
        score, accuracy = (len(self.tuned) + 1 - rankdata(side) for side in self._sides)
        rows = [
            [
                t.plan.digest,
                percent(t.score, 4),
                f"{a:g}",
                percent(t.accuracy, 4),
                f"{b:g}",
                f"{t.seconds:.1f}",
            ]
            for t, a, b in zip(self.tuned, score, accuracy, strict=True)
        ]
        return ["plan", "quick score", "rank", "fine-tuned", "rank", "seconds"], rows[::-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a correlation that is not defined is null."""
        plans = [asdict(t) | {"plan": t.plan.to_json()} for t in self.tuned]
        both = {
            name: {key: None if np.isnan(v) else float(v) for key, v in vars(correlation).items()}
            for name, correlation in (("spearman", self.spearman), ("pearson", self.pearson))
        }
        return {"name": self.name, "epochs": self.epochs, "split": "search", **both, "plans": plans}


def write_fidelity(fidelity: Fidelity, directory: RunDirectory) -> None:
    """Write ``fidelity.json`` and ``fidelity.svg``.

    Raises:
        RunDirectoryError: a file cannot be written.
    """
    directory.write_json(FIGURES, fidelity.to_dict())
    directory.write(PLOT, standalone(fidelity_figure(fidelity)))


def fidelity_figure(fidelity: Fidelity) -> Figure:
    """Accuracy after fine-tuning over the quick score, a dot per plan."""
    points = tuple((t.score, t.accuracy) for t in fidelity.tuned)
    titles = tuple(
        f"{t.plan.digest}: quick {t.score:.2%}, fine-tuned {t.accuracy:.2%}" for t in fidelity.tuned
    )
    x = Axis.over("quick score", [a for a, _ in points], share=True)
    label = f"search split, after {fidelity.epochs} epochs"
    y = Axis.over(label, [b for _, b in points], share=True)
    name = f"Spearman {fidelity.spearman.value:.2f}, {len(points)} plans"
    return Figure(xy_chart([Series(name, points, 0, "dots", titles)], x=x, y=y), (("c0", "dots", name),))


def _shown(correlation: Correlation) -> str:
    return f"{correlation.value:.2f} ({correlation.low:.2f} to {correlation.high:.2f})"


def _correlation(x: Values, y: Values, measure: Callable[[Values, Values], float]) -> Correlation:
    """With its 2.5th and 97.5th percentile over plans drawn with replacement, as far as they differ."""
    rng = np.random.default_rng(0)
    value = measure(x, y)
    if np.isnan(value):
        return Correlation(value, value, value)
    drawn = (rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES))
    low, high = np.nanpercentile([measure(x[d], y[d]) for d in drawn], [2.5, 97.5])
    return Correlation(value, float(low), float(high))


def _pearson(x: Values, y: Values) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
