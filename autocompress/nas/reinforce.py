"""A policy per knob, learnt from the scores of sampled plans: ProxylessNAS' REINFORCE for any problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Problem, SearchResult, Trial, TrialCallback
from autocompress.core.errors import RecipeError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReinforceSearch:
    """One softmax per knob, moved towards choices whose plans score above the running mean.

    Cai, Zhu, Han, arXiv 1812.00332, section 3.3.2. Differs from the paper in budgets that hold instead of a
    reward that trades them, in rewards divided by the standard deviation of those seen, and in plans scored
    one at a time with an update after each batch.

    Args:
        lr: step of the logits per unit of reward.
        batch: plans per update.
        decay: memory of the rewards' running mean, over updates.

    Raises:
        RecipeError: a number is out of range, all at once.
    """

    lr: float = 0.3
    batch: int = 5
    decay: float = 0.9

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.lr < float("inf"):
            faults.append(f"lr must be > 0 and finite, got {self.lr}")
        if self.batch < 1:
            faults.append(f"batch must be >= 1, got {self.batch}")
        if not 0 <= self.decay < 1:
            faults.append(f"decay must be in [0, 1), got {self.decay}")
        if faults:
            raise RecipeError(faults)

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess ``num_plans`` plans; see :class:`autocompress.core.Search`.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below 1.
        """
        if num_plans < 1:
            raise ValueError(f"ReinforceSearch needs num_plans >= 1, got {num_plans}")
        problem.reachable()
        rng = np.random.default_rng(seed)
        logits = [np.zeros(len(knob.choices)) for knob in problem.knobs]
        trials: list[Trial] = []
        batch: list[tuple[list[int], float]] = []
        baseline: float | None = None
        for index in range(num_plans):
            wanted = [
                knob.choices[int(rng.choice(len(x), p=_softmax(x)))]
                for knob, x in zip(problem.knobs, logits, strict=True)
            ]
            values = problem.bounded(wanted)
            trials.append(problem.assess(values, index=index, source="policy"))
            for callback in callbacks:
                callback(trials[-1])
            chosen = [k.choices.index(v) for k, v in zip(problem.knobs, values, strict=True)]
            batch.append((chosen, trials[-1].score))
            if len(batch) == self.batch:
                mean = float(np.mean([score for _, score in batch]))
                baseline = mean if baseline is None else self.decay * baseline + (1 - self.decay) * mean
                spread = float(np.std([trial.score for trial in trials])) or 1.0
                logits = self._moved(logits, [(c, (score - baseline) / spread) for c, score in batch])
                batch = []
        return SearchResult(tuple(trials))

    def _moved(self, logits: list[Floats], batch: list[tuple[list[int], float]]) -> list[Floats]:
        """The logits after one step along the mean of ``advantage * grad log p(choices)``."""
        gradients = [np.zeros_like(x) for x in logits]
        for chosen, advantage in batch:
            for gradient, x, choice in zip(gradients, logits, chosen, strict=True):
                np.add(gradient, -advantage * _softmax(x), out=gradient)
                gradient[choice] += advantage
        return [x + self.lr / len(batch) * g for x, g in zip(logits, gradients, strict=True)]


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())
