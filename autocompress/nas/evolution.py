"""Regularised evolution over the knobs of any problem, within its budgets."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.core import Problem, SearchResult, Trial, TrialCallback, Value
from autocompress.core.errors import RecipeError

_TRIES = 200


@dataclass(frozen=True)
class RegularizedEvolution:
    """A population in which the oldest dies: the best of a few drawn members gets a mutated child.

    Real et al., arXiv 1802.01548, algorithm 1. Differs from the paper in budgets: a random assignment or a
    mutation over budget is drawn again, and cut down knob by knob if none fits; and in never assessing an
    assignment twice while new ones can be found.

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
        if num_plans < 1:
            raise ValueError(f"RegularizedEvolution needs num_plans >= 1, got {num_plans}")
        problem.reachable()
        run = _Evolution(self, problem, np.random.default_rng(seed))
        trials: list[Trial] = []
        for index in range(num_plans):
            values, source = run.propose()
            trials.append(problem.assess(values, index=index, source=source))
            run.accept(values, trials[-1].score)
            for callback in callbacks:
                callback(trials[-1])
        return SearchResult(tuple(trials))


class _Evolution:
    def __init__(self, settings: RegularizedEvolution, problem: Problem, rng: np.random.Generator) -> None:
        self.settings, self.problem, self.rng = settings, problem, rng
        self.alive: deque[tuple[tuple[Value, ...], float]] = deque(maxlen=settings.population)
        self.seen: set[tuple[Value, ...]] = set()

    def propose(self) -> tuple[tuple[Value, ...], str]:
        """The next assignment, within every budget, and how it came about."""
        source = "mutation" if len(self.alive) >= self.settings.population else "random"
        draw = self._mutated if source == "mutation" else self._random
        values = draw()
        for _ in range(_TRIES):
            if values not in self.seen and self.problem.feasible(values):
                return values, source
            values = draw()
        return tuple(self.problem.bounded(values)), source

    def accept(self, values: tuple[Value, ...], score: float) -> None:
        """Take a scored assignment into the population; the oldest leaves a full one."""
        self.seen.add(values)
        self.alive.append((values, score))

    def _random(self) -> tuple[Value, ...]:
        return tuple(k.choices[int(self.rng.integers(len(k.choices)))] for k in self.problem.knobs)

    def _mutated(self) -> tuple[Value, ...]:
        drawn = self.rng.choice(len(self.alive), min(self.settings.sample, len(self.alive)), replace=False)
        values = list(max((self.alive[int(i)] for i in drawn), key=lambda member: member[1])[0])
        free = [i for i, knob in enumerate(self.problem.knobs) if len(knob.choices) > 1]
        for count in range(self.settings.num_mutations):
            if count and self.rng.random() < 0.5:
                continue
            index = int(self.rng.choice(free)) if free else 0
            others = [c for c in self.problem.knobs[index].choices if c != values[index]]
            if others:
                values[index] = others[int(self.rng.integers(len(others)))]
        return tuple(values)
