"""What came of comparing searches: standings, and who won by how much."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from autocompress.core import Budget, Trial

NEARLY = 0.99
"""A search has arrived when it is this close to the best score that any of them found."""


@dataclass(frozen=True)
class Attempt:
    """One search with one seed.

    Args:
        search, seed: which.
        trials: the plans within the budgets, in order; at least one.
        scored_at: for every trial, how many plans the search had scored by then, those over budget included.
        thinking: seconds that the search itself took.
        scoring: seconds that its different plans took to score, whoever scored them first.
    """

    search: str
    seed: int
    trials: tuple[Trial, ...]
    scored_at: tuple[int, ...]
    thinking: float
    scoring: float

    @property
    def best(self) -> float:
        """The highest score."""
        return max(trial.score for trial in self.trials)

    def best_so_far(self) -> list[tuple[int, float]]:
        """(plans scored, highest score by then) after every trial."""
        best = accumulate((trial.score for trial in self.trials), max)
        return list(zip(self.scored_at, best, strict=True))

    def plans_to(self, score: float) -> int | None:
        """How many plans it scored until one of them was that good; None when none was."""
        return next((count for count, best in self.best_so_far() if best >= score), None)


@dataclass(frozen=True)
class Standing:
    """One search over all seeds.

    Args:
        search: its name.
        best: the highest score of every seed.
        arrived: of the seeds that came within :data:`NEARLY` of the best of all, plans until then.
        wins: seeds with which no search found more; ties count for each.
        seconds: mean over seeds of what it takes alone, one plan after the other.
    """

    search: str
    best: tuple[float, ...]
    arrived: tuple[int, ...]
    wins: int
    seconds: float

    @property
    def mean(self) -> float:
        """Mean of the best scores."""
        return statistics.fmean(self.best)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the best scores; None of a single one."""
        return statistics.stdev(self.best) if len(self.best) > 1 else None


@dataclass(frozen=True)
class Outcome:
    """A finished contest.

    Args:
        name: of the recipe.
        stage: whose problem it was.
        num_plans: of each search and seed.
        budgets: of the problem.
        attempts: every search with every seed.
        folder: where its files are.
    """

    name: str
    stage: str
    num_plans: int
    budgets: tuple[Budget, ...]
    attempts: Sequence[Attempt]
    folder: Path

    @property
    def searches(self) -> list[str]:
        """Their names, in the order given."""
        return list(dict.fromkeys(attempt.search for attempt in self.attempts))

    def of(self, search: str) -> list[Attempt]:
        """All seeds of a search."""
        return [attempt for attempt in self.attempts if attempt.search == search]

    @property
    def goal(self) -> float:
        """The score from which a search has arrived."""
        best = max(attempt.best for attempt in self.attempts)
        return best - (1 - NEARLY) * abs(best)

    def standings(self) -> list[Standing]:
        """The searches, the one with the highest mean first; of equals, the one that takes less time."""
        highest: dict[int, float] = {}
        for attempt in self.attempts:
            highest[attempt.seed] = max(attempt.best, highest.get(attempt.seed, attempt.best))
        found = []
        for name in self.searches:
            own = self.of(name)
            arrived = (attempt.plans_to(self.goal) for attempt in own)
            found.append(
                Standing(
                    name,
                    tuple(attempt.best for attempt in own),
                    tuple(count for count in arrived if count is not None),
                    sum(attempt.best == highest[attempt.seed] for attempt in own),
                    statistics.fmean(attempt.thinking + attempt.scoring for attempt in own),
                )
            )
        return sorted(found, key=lambda one: (-one.mean, one.seconds))

    def verdict(self) -> str:
        """One or two sentences: who won, and whether that stands out of the chance of the seeds."""
        first, *others = self.standings()
        told = f"{first.search} found the best plans: {said(first)} in the mean of {_seeds(len(first.best))}"
        if not others:
            return told + ", with nothing to compare it with."
        if first.deviation is None:
            return (
                told + f"; next is {others[0].search}, {said(others[0])}. One seed tells nothing of chance."
            )
        level = [one.search for one in others if first.mean - one.mean <= 2 * _standard_error(first, one)]
        told += f"; next is {others[0].search}, {said(others[0])}."
        if level:
            return told + f" Within two standard errors of the seeds it is level with {', '.join(level)}."
        return told + " The lead over each other search is more than two standard errors of the seeds."


def said(standing: Standing) -> str:
    """Mean and deviation as text."""
    spread = standing.deviation
    return f"{standing.mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Headings, and one row of texts per search, the best first."""
    headings = [
        "search",
        "best score, mean ± sd",
        "lowest",
        f"plans to {NEARLY:.0%} of the best",
        "time alone",
        "seeds won",
    ]
    rows = []
    for one in outcome.standings():
        count, of = len(one.arrived), len(one.best)
        plans = f"{statistics.median(one.arrived):.0f}" if one.arrived else "never"
        rows.append(
            [
                one.search,
                said(one),
                f"{min(one.best):.4f}",
                plans + (f" ({count} of {of} seeds)" if 0 < count < of else ""),
                f"{one.seconds:.1f} s",
                f"{one.wins} of {of}",
            ]
        )
    return headings, rows


def as_csv(outcome: Outcome) -> str:
    """One row per trial."""
    metrics = list(outcome.attempts[0].trials[0].cost.totals)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["search", "seed", "plans_scored", "score", "best", "source", "plan", *metrics])
    for attempt in outcome.attempts:
        for trial, (count, best) in zip(attempt.trials, attempt.best_so_far(), strict=True):
            costs = [repr(float(trial.cost[metric])) for metric in metrics]
            known = [attempt.search, attempt.seed, count, repr(trial.score), repr(best)]
            writer.writerow([*known, trial.source, trial.plan.digest, *costs])
    return text.getvalue()


def _standard_error(one: Standing, other: Standing) -> float:
    """Standard error of the difference of two means."""
    variances = [(each.deviation or 0.0) ** 2 / len(each.best) for each in (one, other)]
    return float(sum(variances) ** 0.5)


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"
