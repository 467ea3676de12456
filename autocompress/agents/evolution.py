"""NSGA-II over the fractions of the knobs' choices; the package ``pymoo`` is loaded when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autocompress.agents.ask_tell import (
    SMALLEST_FRACTION,
    Assessed,
    Floats,
    ask_and_tell,
    best_of,
    bounded_fractions,
    fractions_of,
)
from autocompress.agents.scaling import scaled_to_budget
from autocompress.agents.settings import check_settings, is_count, is_share
from autocompress.core import Budget, Cost, Problem, SearchResult, TrialCallback, Value

_AT_FULL_BUDGET = 0.5  # share of the range of the spending gene that spends all


@dataclass(frozen=True)
class Evolution:
    """Breeds plans towards the whole front of score against the budgets' costs: NSGA-II.

    Other searches spend the budget with every plan. Here each plan has, beside one gene per knob, a gene
    that says how much of the budget it spends, from the least that is possible to all; its knobs are moved
    together to spend that much. ``SearchResult.pareto`` gives the front, ``best`` its end at the full
    budget. With equal plans that end is worse than what ``cma_es`` finds, which looks for nothing else.

    The first generation is the uniform plan's neighbourhood. Genes of the knobs are those of the plan that
    was assessed. Each generation is one batch. Trials are marked ``uniform`` and ``child``.

    Source: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE Transactions on
    Evolutionary Computation 6(2), 2002, with its crossover and mutation, in the package ``pymoo``. Differs
    from the paper in the spending gene.

    Args:
        population: plans per generation.
        jitter: standard deviation of the first generation, in fractions of the choices.

    Raises:
        RecipeError: a setting is out of range; names all of them.
    """

    population: int = 16
    jitter: float = 0.1

    def __post_init__(self) -> None:
        check_settings(
            "evolution",
            [
                ("population must be a whole number >= 4", self.population, is_count(self.population, 4)),
                ("jitter must be in (0, 1]", self.jitter, is_share(self.jitter)),
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
            lambda uniform: _Population(self, problem, uniform, seed=seed),
            num_plans=num_plans,
            callbacks=callbacks,
        )


class _Population:
    source = "child"

    def __init__(
        self, settings: Evolution, problem: Problem, uniform: Sequence[Assessed], *, seed: int
    ) -> None:
        self._problem = problem
        first = self._first_generation(settings, uniform, np.random.default_rng([seed, 3]))
        self._algorithm, self._set_objectives = _nsga2(first, len(problem.budgets), seed)
        self._infills: Any = None

    def _first_generation(
        self, settings: Evolution, uniform: Sequence[Assessed], rng: np.random.Generator
    ) -> Floats:
        """Genes around the best uniform plan, itself included; shape (population, knobs + 1)."""
        knobs = fractions_of(self._problem, best_of(uniform)[0])
        noise = settings.jitter * rng.standard_normal((settings.population, len(knobs)))
        noise[0] = 0.0
        spending = np.linspace(1.0, 0.0, settings.population)
        return np.clip(np.column_stack([knobs + noise, spending]), SMALLEST_FRACTION, 1.0)

    def ask(self) -> list[list[Value]]:
        with np.errstate(invalid="ignore"):  # of crossed genes that pymoo then leaves out
            self._infills = self._algorithm.ask()
        return [self._assignment(genes) for genes in self._infills.get("X")]

    def _assignment(self, genes: Floats) -> list[Value]:
        share = min(float(genes[-1]) / (1 - _AT_FULL_BUDGET), 1.0)
        smallest = self._problem.smallest
        budgets = tuple(_spent(budget, smallest, share) for budget in self._problem.budgets)
        return scaled_to_budget(
            replace(self._problem, budgets=budgets) if share < 1 else self._problem,
            bounded_fractions(genes[:-1]),
        )

    def tell(self, assessed: Sequence[Assessed]) -> None:
        genes = self._infills.get("X")
        knobs = [fractions_of(self._problem, values) for values, _ in assessed]
        self._infills.set("X", np.column_stack([np.array(knobs), genes[:, -1:]]))
        objectives = [self._objectives(trial.score, trial.cost) for _, trial in assessed]
        self._set_objectives(self._infills, np.array(objectives))
        self._algorithm.tell(infills=self._infills)

    def _objectives(self, score: float, cost: Cost) -> list[float]:
        return [-score, *(cost[budget.metric] / budget.limit for budget in self._problem.budgets)]


def _spent(budget: Budget, smallest: Cost, share: float) -> Budget:
    """A budget of which only a share is left, from the smallest reachable cost to all."""
    least = smallest[budget.metric]
    return replace(budget, limit=max(least + share * (budget.limit - least), 1e-12 * budget.limit))


def _nsga2(first: Floats, num_costs: int, seed: int) -> tuple[Any, Any]:
    """The algorithm, and what writes the objectives of a generation, shape (plans, 1 + costs), into it."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.problem import Problem as Space
    from pymoo.core.termination import NoTermination
    from pymoo.problems.static import StaticProblem

    space = Space(n_var=first.shape[1], n_obj=1 + num_costs, xl=SMALLEST_FRACTION, xu=1.0)
    algorithm = NSGA2(pop_size=len(first), sampling=first)
    algorithm.setup(space, termination=NoTermination(), seed=seed, verbose=False)

    def set_objectives(infills: Any, objectives: Floats) -> None:
        Evaluator().eval(StaticProblem(space, F=objectives), infills)

    return algorithm, set_objectives
