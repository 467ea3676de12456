"""Evolution over the knobs of any problem, within its budgets: the oldest die, or the worst."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.core import Plan, Problem, SearchResult, Trial, TrialCallback, Value
from autocompress.core.errors import RecipeError
from autocompress.core.fitting import fitted, scaled_to_budget

_TRIES = 200
_MOVED_TRIES = 20

Values = tuple[Value, ...]
Member = tuple[Values, float]


@dataclass(frozen=True)
class RegularizedEvolution:
    """A population in which the oldest dies: the best of a few drawn members gets a mutated child.

    Real et al., arXiv 1802.01548, algorithm 1. Differs from the paper in budgets: a random assignment or a
    mutation over budget is drawn again, and moved into the budgets if none fits; and in never assessing a
    plan twice while new ones can be found.

    Args:
        population: members alive; the first ones are random.
        sample: how many are drawn to find a parent.
        num_mutations: knobs that change at most per child; one more with a chance of one half each.

    Raises:
        RecipeError: a number is out of range, all at once.
    """

    population: int = 50
    sample: int = 10
    num_mutations: int = 2

    def __post_init__(self) -> None:
        faults = []
        if self.population < 2:
            faults.append(f"population must be >= 2, got {self.population}")
        if not 1 <= self.sample <= self.population:
            faults.append(f"sample must be in [1, population], got {self.sample}")
        if self.num_mutations < 1:
            faults.append(f"num_mutations must be >= 1, got {self.num_mutations}")
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
        run = _Regularized(self, problem, np.random.default_rng(seed))
        return _searched(problem, run, num_plans=num_plans, callbacks=callbacks)


@dataclass(frozen=True)
class ElitistEvolution:
    """Generations of children of the best: APQ's and Once-for-all's search, for any problem.

    The first generation is random and spends the budgets. Then the best ``parent_share`` of all alive stay
    and have as many children as the population has members: a part are mutants of one parent, each knob drawn
    anew with some probability, the others take every knob from one of two parents. What is over budget is
    drawn again.

    Wang et al., "APQ", CVPR 2020, section 3.4, and its released code, there for 500 generations over a
    predictor. Differs from the released code in what becomes of crossovers: there, only the first half of the
    children joins the population, which are the mutants, so every crossover is scored and thrown away (as is
    half of the first generation); here all join. Differs from both in a first generation that is moved to the
    budgets, where random plans within tight ones are few, in knobs that mutate one by one instead of block by
    block, and in never assessing a plan twice while new ones can be found.

    Args:
        population: children per generation, and random plans at the start.
        parent_share: of the population, who become parents.
        mutation_probability: of each knob of a mutant.
        mutant_share: of the children; the others are crossovers.

    Raises:
        RecipeError: a number is out of range, all at once.
    """

    population: int = 100
    parent_share: float = 0.25
    mutation_probability: float = 0.1
    mutant_share: float = 0.5

    def __post_init__(self) -> None:
        faults = []
        if self.population < 2:
            faults.append(f"population must be >= 2, got {self.population}")
        for name in ("parent_share", "mutation_probability"):
            if not 0 < getattr(self, name) <= 1:
                faults.append(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.mutant_share <= 1:
            faults.append(f"mutant_share must be in [0, 1], got {self.mutant_share}")
        if faults:
            raise RecipeError(faults)

    @property
    def num_parents(self) -> int:
        """At least two, for crossovers."""
        return max(2, round(self.parent_share * self.population))

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess ``num_plans`` plans; see :class:`autocompress.core.Search`.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below 1.
        """
        run = _Elitist(self, problem, np.random.default_rng(seed))
        return _searched(problem, run, num_plans=num_plans, callbacks=callbacks)


def _searched(
    problem: Problem, run: _Run, *, num_plans: int, callbacks: Sequence[TrialCallback]
) -> SearchResult:
    if num_plans < 1:
        raise ValueError(f"evolution needs num_plans >= 1, got {num_plans}")
    problem.reachable()
    trials: list[Trial] = []
    while len(trials) < num_plans:
        batch, source = run.propose(num_plans - len(trials))
        assessed = problem.assess_many(batch, index=len(trials), source=source)
        for values, trial in zip(batch, assessed, strict=True):
            trials.append(trial)
            run.accept(values, trial.score)
            for callback in callbacks:
                callback(trial)
    return SearchResult(tuple(trials))


class _Run:
    """Draws assignments within every budget whose plans were not proposed yet."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem, self.rng = problem, rng
        self._proposed: set[Plan] = set()
        self._known: set[Values] = set()  # proposed, over budget, or of a plan that was proposed

    def propose(self, most: int) -> tuple[list[Values], str]:
        """The next assignments, whose scores none of them needs, and how they came about."""
        raise NotImplementedError

    def accept(self, values: Values, score: float) -> None:
        """Take note of a scored assignment."""
        raise NotImplementedError

    def new(self, draw: Callable[[], Values]) -> Values:
        """A drawn assignment, new and within the budgets; after many tries a random one, in the end moved in.

        Where nothing new is left, one that is not new.
        """
        values: Values = ()
        for draws, again in ((_TRIES, draw), (_TRIES, self.random), (_MOVED_TRIES, self._moved)):
            for _ in range(draws):
                values = again()
                if self._is_new(values):
                    return values
        return values

    def _moved(self) -> Values:
        return tuple(fitted(self.problem, self.random()))

    def _is_new(self, values: Values) -> bool:
        if values in self._known:
            return False
        self._known.add(values)
        plan = self.problem.plan(values)
        if plan in self._proposed or not self.problem.meets_budgets(self.problem.price(plan)):
            return False
        self._proposed.add(plan)
        return True

    def random(self) -> Values:
        """Every knob drawn uniformly."""
        return tuple(k.choices[int(self.rng.integers(len(k.choices)))] for k in self.problem.knobs)


class _Regularized(_Run):
    def __init__(self, settings: RegularizedEvolution, problem: Problem, rng: np.random.Generator) -> None:
        super().__init__(problem, rng)
        self._settings = settings
        self._alive: deque[Member] = deque(maxlen=settings.population)

    def propose(self, most: int) -> tuple[list[Values], str]:
        if not self._alive:
            return [self.new(self.random) for _ in range(min(self._settings.population, most))], "random"
        return [self.new(self._mutated)], "mutation"

    def accept(self, values: Values, score: float) -> None:
        """The oldest leaves a full population."""
        self._alive.append((values, score))

    def _mutated(self) -> Values:
        drawn = self.rng.choice(len(self._alive), min(self._settings.sample, len(self._alive)), replace=False)
        values = list(max((self._alive[int(i)] for i in drawn), key=lambda member: member[1])[0])
        free = [i for i, knob in enumerate(self.problem.knobs) if len(knob.choices) > 1]
        for count in range(self._settings.num_mutations):
            if count and self.rng.random() < 0.5:
                continue
            index = int(self.rng.choice(free)) if free else 0
            others = [c for c in self.problem.knobs[index].choices if c != values[index]]
            if others:
                values[index] = others[int(self.rng.integers(len(others)))]
        return tuple(values)


class _Elitist(_Run):
    def __init__(self, settings: ElitistEvolution, problem: Problem, rng: np.random.Generator) -> None:
        super().__init__(problem, rng)
        self._settings = settings
        self._parents: list[Member] = []
        self._children: list[Member] = []

    def propose(self, most: int) -> tuple[list[Values], str]:
        settings, number = self._settings, len(self._children)
        num_mutants = round(settings.mutant_share * settings.population)
        if not self._parents:
            draw, size, source = self._spending, settings.population, "random"
        elif number < num_mutants:
            draw, size, source = self._mutated, num_mutants, "mutation"
        else:
            draw, size, source = self._crossed, settings.population, "crossover"
        return [self.new(draw) for _ in range(min(size - number, most))], source

    def accept(self, values: Values, score: float) -> None:
        """After a whole generation the best of parents and children become parents; the earlier of equals."""
        self._children.append((values, score))
        if len(self._children) == self._settings.population:
            alive = sorted([*self._parents, *self._children], key=lambda member: -member[1])
            self._parents, self._children = alive[: self._settings.num_parents], []

    def _spending(self) -> Values:
        """Every knob drawn uniformly, then all moved together until the budgets are spent."""
        return tuple(scaled_to_budget(self.problem, self.rng.uniform(size=len(self.problem.knobs)).tolist()))

    def _mutated(self) -> Values:
        values, fresh = self._parent(), self.random()
        changes = self.rng.random(len(values)) < self._settings.mutation_probability
        return tuple(new if change else old for old, new, change in zip(values, fresh, changes, strict=True))

    def _crossed(self) -> Values:
        first, second = self._parent(), self._parent()
        picks = self.rng.random(len(first)) < 0.5
        return tuple(a if pick else b for a, b, pick in zip(first, second, picks, strict=True))

    def _parent(self) -> Values:
        return self._parents[int(self.rng.integers(len(self._parents)))][0]
