"""What searches share that propose plans in batches and learn from their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autocompress.agents.baselines import recorded, require_plans
from autocompress.agents.scaling import uniform_assignments
from autocompress.core import Problem, SearchResult, Trial, TrialCallback, Value

Floats = NDArray[np.float64]
Assessed = tuple[list[Value], Trial]
"""An assignment and its trial."""

SMALLEST_FRACTION = 0.01
"""Of the choices of a knob: keeps common factors finite."""
_PATIENCE = 30  # batches without a new plan after which a search has nothing more to try


class Proposer(Protocol):
    """Proposes batches of assignments within budget, and learns from their trials."""

    source: str

    def ask(self) -> list[list[Value]]:
        """The next batch; assignments may repeat, and may have been tried before."""
        ...

    def tell(self, assessed: Sequence[Assessed]) -> None:
        """The batch asked for last with its trials, in order."""
        ...


class Tried:
    """The assignments a search has tried, each paid for once.

    Args:
        problem: what is searched.
        num_plans: how many may be assessed in all.
        callbacks: called after every trial.

    Attributes:
        trials: in the order of their assessment.
    """

    def __init__(self, problem: Problem, num_plans: int, callbacks: Sequence[TrialCallback]) -> None:
        self._problem, self._num_plans, self._callbacks = problem, num_plans, callbacks
        self._known: dict[tuple[Value, ...], Trial] = {}

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, in order."""
        return tuple(self._known.values())

    @property
    def num_left(self) -> int:
        """Plans that may still be assessed."""
        return self._num_plans - len(self._known)

    def assess(self, assignments: Sequence[list[Value]], source: str) -> list[Assessed]:
        """Assignments with their trials; the new ones are assessed, together where that is possible.

        Stops before the first new assignment that there is no plan left for.
        """
        keys = [tuple(values) for values in assignments]
        new = [key for key in dict.fromkeys(keys) if key not in self._known][: self.num_left]
        for key, trial in zip(
            new, self._problem.assess_many(new, index=len(self._known), source=source), strict=True
        ):
            self._known[key] = recorded(trial, self._callbacks)
        unpaid = next((place for place, key in enumerate(keys) if key not in self._known), len(keys))
        return [(values, self._known[key]) for values, key in zip(assignments[:unpaid], keys, strict=False)]


def ask_and_tell(
    search: Any,
    problem: Problem,
    start: Callable[[Sequence[Assessed]], Proposer],
    *,
    num_plans: int,
    callbacks: Sequence[TrialCallback],
) -> SearchResult:
    """Assess the uniform plans, then what a proposer asks for, until the plans are spent.

    Ends early when :data:`_PATIENCE` batches in a row hold nothing new.

    Args:
        search: on whose behalf; named in messages.
        problem: what is searched.
        start: makes the proposer from the uniform assignments.
        num_plans: how many may be assessed.
        callbacks: called after every trial.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        ValueError: ``num_plans`` is below 1.
    """
    require_plans(search, num_plans, problem)
    tried = Tried(problem, num_plans, callbacks)
    proposer = start(tried.assess(uniform_assignments(problem), "uniform"))
    stalled = 0
    while tried.num_left and stalled < _PATIENCE:
        left = tried.num_left
        asked = proposer.ask()
        told = tried.assess(asked, proposer.source)
        if len(told) < len(asked):
            break
        proposer.tell(told)
        stalled = stalled + 1 if tried.num_left == left else 0
    return SearchResult(tried.trials)


def best_of(assessed: Sequence[Assessed]) -> Assessed:
    """The one with the highest score; the first of equals."""
    return max(assessed, key=lambda one: one[1].score)


def fractions_of(problem: Problem, values: Sequence[Value]) -> Floats:
    """The fractions in the middle of an assignment's choices, shape (knobs,)."""
    return np.array([knob.fraction_of(value) for knob, value in zip(problem.knobs, values, strict=True)])


def bounded_fractions(fractions: Floats) -> list[float]:
    """Fractions in the range that scaling to a budget takes."""
    within: list[float] = np.clip(fractions, SMALLEST_FRACTION, 1.0).tolist()
    return within
