"""Searches without learning: what a learned one has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress.agents.scaling import scaled_to_budget, uniform_assignments
from autocompress.core import Cost, Problem, SearchResult, Trial, TrialCallback, Value

Proposal = tuple[str, list[Value]]
"""Where a plan comes from, and its assignment."""
_RANDOM_BATCH = 64


@dataclass(frozen=True)
class Uniform:
    """All knobs alike, at most as large as every budget allows.

    Channels: one plan, all knobs at one common fraction. Bits: the widest equal bits for weights and
    activations, then, as far as the number of plans allows, the pairs of one width for all weights and
    another for all activations in which neither can be wider.
    """

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess the uniform plans; see :class:`autocompress.core.Search`. ``seed`` changes nothing.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below 1.
        """
        require_plans(self, num_plans, problem)
        plans = uniform_assignments(problem)[:num_plans]
        trials = problem.assess_many(plans, index=0, source="uniform")
        return SearchResult(tuple(recorded(trial, callbacks) for trial in trials))


@dataclass(frozen=True)
class RandomSearch:
    """Independent uniform fractions per knob, moved together to spend the budget.

    A stronger baseline than clipping random wishes in order, which starves the knobs decided last and
    leaves budget unspent.
    """

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess ``num_plans`` random plans; see :class:`autocompress.core.Search`.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below 1.
        """
        require_plans(self, num_plans, problem)
        rng = np.random.default_rng(seed)
        trials: list[Trial] = []
        while len(trials) < num_plans:
            drawn = [
                scaled_to_budget(problem, rng.uniform(size=len(problem.knobs)).tolist())
                for _ in range(min(_RANDOM_BATCH, num_plans - len(trials)))
            ]
            found = problem.assess_many(drawn, index=len(trials), source="random")
            trials += [recorded(trial, callbacks) for trial in found]
        return SearchResult(tuple(trials))


@dataclass(frozen=True)
class Greedy:
    """Removes cost in equal rounds, each from the knob where it hurts the score least.

    Starts unchanged. A round evaluates, for every knob, the highest choice that removes this round's
    share of the excess cost, and keeps the one with the best score. The number of rounds is as large as
    ``num_plans`` allows. Evaluations of plans still over budget count towards ``num_plans`` but are no
    trials.

    Source: Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications",
    ECCV 2018, algorithm 1. Differs from the paper in scoring without short-term fine-tuning, in dividing
    the loss of score by the cost removed (choices are discrete, so proposals remove unequal amounts),
    and in ending with one plan scaled to the budget if the evaluations run out.
    """

    def least_plans(self, num_knobs: int) -> int:
        """The unchanged network, one round over the knobs, and the last plan."""
        return num_knobs + 2

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess at most ``num_plans`` plans; see :class:`autocompress.core.Search`. ``seed`` is not used.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            ValueError: ``num_plans`` is below the number of knobs plus 2.
        """
        num_knobs = len(problem.knobs)
        require_plans(self, num_plans, problem)
        problem.reachable()
        descent = _Descent(problem, callbacks)
        num_rounds = (num_plans - 2) // num_knobs
        step = (descent.pressure - 1) / num_rounds
        while not descent.trials:
            if descent.num_evaluated + num_knobs >= num_plans or not descent.lower_one_knob(step):
                descent.finish()
        return SearchResult(tuple(descent.trials))


class Evaluations:
    """Scores of plans within and over budget, and the trials among them.

    Args:
        problem: what is searched.
        callbacks: called after every trial.

    Attributes:
        trials: the plans within budget, in order.
        num_evaluated: all plans scored.
    """

    def __init__(self, problem: Problem, callbacks: Sequence[TrialCallback]) -> None:
        self.problem, self._callbacks = problem, callbacks
        self.trials: list[Trial] = []
        self.num_evaluated = 0

    def scores_of(self, proposals: Sequence[Proposal]) -> list[float]:
        """The scores of plans, together where that is possible; those within budget become trials.

        Raises:
            ValueError: a score is not finite.
        """
        plans = [self.problem.plan(values) for _, values in proposals]
        costs = [self.problem.price(plan) for plan in plans]
        scores = []
        found = zip(proposals, plans, costs, self.problem.score_many(plans), strict=True)
        for (source, _), plan, cost, (score, seconds) in found:
            self.num_evaluated += 1
            scores.append(score)
            if self.problem.meets_budgets(cost):
                trial = Trial(plan, score, cost, len(self.trials), seconds, source)
                self.trials.append(recorded(trial, self._callbacks))
        return scores

    def score_of(self, values: Sequence[Value], source: str) -> float:
        """The score of one plan; see :meth:`scores_of`."""
        return self.scores_of([(source, list(values))])[0]


class _Descent(Evaluations):
    """State of one greedy search: the present choices and their score."""

    def __init__(self, problem: Problem, callbacks: Sequence[TrialCallback]) -> None:
        super().__init__(problem, callbacks)
        self.values: list[Value] = [knob.choices[-1] for knob in problem.knobs]
        self.pressure = self._pressure_of(problem.largest)
        self.score = self.score_of(self.values, "greedy")

    def _pressure_of(self, cost: Cost) -> float:
        """How far over budget: the largest ratio of cost to limit; at most 1 when all budgets are met."""
        return max((cost[b.metric] / b.limit for b in self.problem.budgets), default=0.0)

    def lower_one_knob(self, step: float) -> bool:
        """One round: take the proposal that loses the least score per cost; False if none removes cost."""
        goal = max(self.pressure - step, 1.0)
        lowered = [self._lowered(index, goal) for index in range(len(self.values))]
        removed = [self.pressure - self._pressure(values) for values in lowered]
        tried = [index for index, share in enumerate(removed) if share > 0]
        if not tried:
            return False
        scores = self.scores_of([("greedy", lowered[index]) for index in tried])
        losses = [
            ((self.score - score) / removed[index], -removed[index], index, score)
            for index, score in zip(tried, scores, strict=True)
        ]
        *_, chosen, self.score = min(losses)
        self.values = lowered[chosen]
        self.pressure -= removed[chosen]
        return True

    def finish(self) -> None:
        """Assess the present choices, scaled to the budget."""
        fractions = [k.fraction_of(v) for k, v in zip(self.problem.knobs, self.values, strict=True)]
        self.score_of(scaled_to_budget(self.problem, fractions), "greedy")

    def _pressure(self, values: Sequence[Value]) -> float:
        return self._pressure_of(self.problem.price(self.problem.plan(values)))

    def _lowered(self, index: int, goal: float) -> list[Value]:
        """The present choices, one knob at its highest lower choice that reaches the goal, else its first."""
        choices = self.problem.knobs[index].choices

        def at(choice: int) -> list[Value]:
            return [*self.values[:index], choices[choice], *self.values[index + 1 :]]

        low, high = 0, choices.index(self.values[index])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._pressure(at(middle)) <= goal else (low, middle)
        return at(low)


def least_plans(search: Any, num_knobs: int) -> int:
    """The fewest plans a search can work with; 1 unless the search has a method of that name."""
    known = getattr(search, "least_plans", None)
    return int(known(num_knobs)) if known else 1


def require_plans(search: Any, num_plans: int, problem: Problem) -> None:
    """Raise if a search is given fewer plans than it can work with."""
    least = least_plans(search, len(problem.knobs))
    if num_plans < least:
        name = type(search).__name__
        raise ValueError(f"{name} needs num_plans >= {least} on this problem, got {num_plans}")


def recorded(trial: Trial, callbacks: Sequence[TrialCallback]) -> Trial:
    """The trial, after every callback has seen it."""
    for callback in callbacks:
        callback(trial)
    return trial
