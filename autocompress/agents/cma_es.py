"""CMA-ES over the fractions of the knobs' choices; the package ``cma`` is loaded when it runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress.agents.ask_tell import Assessed, ask_and_tell, best_of, bounded_fractions, fractions_of
from autocompress.agents.scaling import scaled_to_budget
from autocompress.agents.settings import check_settings, is_count, is_share
from autocompress.core import Problem, SearchResult, TrialCallback, Value


@dataclass(frozen=True)
class CmaEs:
    """Samples plans around a mean that follows the best ones, with a step size learnt for every knob.

    Starts at the best uniform plan. What is sampled is one fraction of the choices per knob; all are moved
    together to spend the budget, as in the other searches. Each generation is one batch. When a generation
    ends the search by the package's own tests, a new one starts from the best plan so far. Trials are marked
    ``uniform`` and ``sample``.

    Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, in the package ``cma``. The
    covariance is diagonal (Ros and Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space
    Complexity", PPSN 2008): a full one does not pay within some hundred plans of tens of knobs
    (docs/which-search.md).

    Args:
        sigma: first standard deviation, in fractions of the choices.
        population: plans per generation; None for the package's ``4 + 3 ln(knobs)``.

    Raises:
        RecipeError: a setting is out of range; names all of them.
    """

    sigma: float = 0.1
    population: int | None = None

    def __post_init__(self) -> None:
        size = self.population
        check_settings(
            "cma_es",
            [
                ("sigma must be in (0, 1]", self.sigma, is_share(self.sigma)),
                ("population must be a whole number >= 3, or null", size, size is None or is_count(size, 3)),
            ],
        )

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess at most ``num_plans`` plans; see :class:`autocompress.core.Search`.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below 1.
        """
        return ask_and_tell(
            self,
            problem,
            lambda uniform: _Strategy(self, problem, uniform, seed=seed),
            num_plans=num_plans,
            callbacks=callbacks,
        )


class _Strategy:
    source = "sample"

    def __init__(self, settings: CmaEs, problem: Problem, uniform: Sequence[Assessed], *, seed: int) -> None:
        self._settings, self._problem = settings, problem
        self._rng = np.random.default_rng([seed, 3])
        self._best = best_of(uniform)
        self._strategy = self._started()
        self._points: list[Any] = []

    def _started(self) -> Any:
        with warnings.catch_warnings():  # of its options, which it evaluates as text
            warnings.simplefilter("ignore")
            import cma

            options: dict[str, Any] = {
                "bounds": [0.0, 1.0],
                "randn": lambda *shape: self._rng.standard_normal(shape),
                "CMA_diagonal": True,
                "verbose": -9,
            }
            if self._settings.population is not None:
                options["popsize"] = self._settings.population
            start = fractions_of(self._problem, self._best[0])
            return cma.CMAEvolutionStrategy(_at_least_two(start), self._settings.sigma, options)

    def ask(self) -> list[list[Value]]:
        self._points = self._strategy.ask()
        num_knobs = len(self._problem.knobs)
        return [
            scaled_to_budget(self._problem, bounded_fractions(np.asarray(point)[:num_knobs]))
            for point in self._points
        ]

    def tell(self, assessed: Sequence[Assessed]) -> None:
        self._strategy.tell(self._points, [-trial.score for _, trial in assessed])
        self._best = best_of([self._best, *assessed])
        if self._strategy.stop():
            self._strategy = self._started()


def _at_least_two(point: Any) -> Any:
    """The package refuses to work in one dimension; a second one without effect helps."""
    return point if len(point) > 1 else np.append(point, 0.5)
