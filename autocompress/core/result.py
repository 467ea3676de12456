"""What searches and runs return."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autocompress.core.cost import Cost, Metric
from autocompress.core.plan import Plan


@dataclass(frozen=True)
class Trial:
    """One evaluated plan.

    Args:
        plan, score, cost: the plan, its score (higher is better) and its cost.
        index: running number within the search, from 0.
        seconds: wall time of the evaluation, near 0 when it came from the ledger.
        source: how the search came to the plan.
    """

    plan: Plan
    score: float
    cost: Cost
    index: int
    seconds: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class SearchResult:
    """Every trial of a search, in order.

    Args:
        trials: at least one.
        policy: plan of the trained actor's own deterministic episode, for searches that learn one.
    """

    trials: tuple[Trial, ...]
    policy: Plan | None = None

    @property
    def best(self) -> Trial:
        """The trial with the highest score; the first of equals."""
        return max(self.trials, key=lambda t: t.score)

    def pareto(self, *metrics: Metric) -> tuple[Trial, ...]:
        """Trials that no other beats in score and in every cost, cheapest first; the first of equals.

        Args:
            metrics: the costs that count, at least one.
        """
        front: list[Trial] = []
        for trial in sorted(self.trials, key=lambda t: (*(t.cost[m] for m in metrics), -t.score)):
            if not any(_is_no_worse(other, trial, metrics) for other in front):
                front.append(trial)
        return tuple(front)


def _is_no_worse(one: Trial, other: Trial, metrics: Sequence[Metric]) -> bool:
    return one.score >= other.score and all(one.cost[m] <= other.cost[m] for m in metrics)


def finalists(results: Sequence[SearchResult], count: int) -> tuple[Trial, ...]:
    """The ``count`` best trials of some searches, and the best of each search; every plan once."""
    ranked = sorted((trial for result in results for trial in result.trials), key=lambda t: -t.score)
    chosen = _each_plan_once(ranked)[:count]
    return tuple(_each_plan_once([*chosen, *(result.best for result in results)]))


def _each_plan_once(trials: Sequence[Trial]) -> list[Trial]:
    first: dict[Plan, Trial] = {}
    for trial in trials:
        first.setdefault(trial.plan, trial)
    return list(first.values())


TrialCallback = Callable[[Trial], None]


class Search(Protocol):
    """One signature for every search, RL or not; deterministic given (problem, seed)."""

    def __call__(
        self, problem: Any, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess at most ``num_plans`` plans, calling every callback after each one."""
        ...


@dataclass(frozen=True)
class Result:
    """Outcome of a run, as written to ``result.json``.

    Args:
        name: of the run.
        before, after: measured figures of the original and the compressed network: ``accuracy``
            (share in [0, 1] on the test split), ``macs``, ``params``, ``file_bytes``,
            ``latency_ms`` (ONNX Runtime, batch 1, one thread).
        plan: the chosen plan.
        budgets: metric -> absolute limit.
        predicted: ``original``, ``before`` and ``after`` -> what the recipe's cost models say, by metric;
            ``original`` is what relative budgets refer to: the largest network of the space where a search
            found the one before.
        expected: accuracies the recipe is known to reach, and the ``tolerance`` of that.
        search: stage -> name of its search, number of plans, best quick score, the baselines' scores, and
            the stage's budgets.
        chain: every stage that made a network, in order: ``stage``, ``accuracy`` on the test split and what
            the cost models say by metric, at the bits that layers have by then or are assumed to get.
        alone: stage -> the same figures of a run with that stage alone within the same budgets, or
            ``refused`` and why.
        export: largest absolute difference and top-1 agreement between ONNX Runtime and PyTorch.
        files: name -> ``about`` in words, ``bytes``, and what else is known of a file for other tools.
        provenance: versions, seed, recipe digest, git revision, threads, machine.
        seconds: wall time per stage of the last start of the run.
        run_dir: the folder of the run; not part of the JSON, since folders move.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]
    plan: Plan
    budgets: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    chain: list[dict[str, Any]] = field(default_factory=list)
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    export: dict[str, float] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    run_dir: Path | None = field(default=None, compare=False)

    def to_json(self) -> str:
        """JSON with two spaces of indentation."""
        data = asdict(self) | {"plan": json.loads(self.plan.to_json())}
        del data["run_dir"]
        return json.dumps(data, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result written by :meth:`to_json`."""
        data = json.loads(text)
        data["plan"] = Plan.from_json(json.dumps(data["plan"]))
        return cls(**data)
