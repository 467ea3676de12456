"""What every search is given: knobs, budgets, a price and a score."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autocompress.core.budget import Budget
from autocompress.core.cost import Cost, Metric
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.core.result import Trial

KnobKind = Literal["arch", "channels", "weight_bits", "act_bits"]
Value = int | str
_NUM_NAMED = 3


class Scored(NamedTuple):
    """A plan's score, and the seconds it took to find out; near 0 when it was known."""

    score: float
    seconds: float


EvaluateMany = Callable[[Sequence[Plan]], Iterable[Scored]]
"""Scores of plans, in their order; each may be taken as soon as it is known."""


@dataclass(frozen=True)
class Knob:
    """One decision of a search.

    Args:
        kind: what the decision sets.
        name: channel group, layer or architecture choice it belongs to.
        choices: the possible values, cheapest first; the last one leaves the network unchanged.
        features: what an agent may know about the knob before deciding, each in [0, 1].
        layers: for bits, the layers that share this decision; by default the one of the knob's name.

    Raises:
        ValueError: no choices, numeric choices that do not ascend, or a feature outside [0, 1].
    """

    kind: KnobKind
    name: str
    choices: tuple[Value, ...]
    features: tuple[float, ...] = ()
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError(f"knob {self.name!r} has no choices")
        numbers = [c for c in self.choices if isinstance(c, int)]
        if any(b <= a for a, b in pairwise(numbers)):
            raise ValueError(f"choices of knob {self.name!r} must ascend, got {self.choices}")
        if any(not 0 <= f <= 1 for f in self.features):
            raise ValueError(f"features of knob {self.name!r} must lie in [0, 1], got {self.features}")

    @property
    def is_bits(self) -> bool:
        """Whether the knob sets bit-widths."""
        return self.kind in ("weight_bits", "act_bits")

    @property
    def bit_layers(self) -> tuple[str, ...]:
        """The layers whose bits the knob sets."""
        return self.layers or (self.name,) if self.is_bits else ()

    def at(self, fraction: float) -> Value:
        """The choice at a fraction in [0, 1]: equal-width bins from the first choice to the last.

        Values outside [0, 1] are clamped.
        """
        index = int(min(max(fraction, 0.0), 1.0) * len(self.choices))
        return self.choices[min(index, len(self.choices) - 1)]

    def fraction_of(self, value: Value) -> float:
        """The middle of the bin of a choice, so that ``at(fraction_of(v)) == v``."""
        return (self.choices.index(value) + 0.5) / len(self.choices)


@dataclass(frozen=True)
class Problem:
    """Find the plan with the best score among those within every budget.

    Args:
        knobs: the decisions, in the order in which they are taken.
        budgets: absolute limits; all must hold.
        price: plan -> cost; never higher when a knob moves to an earlier choice.
        evaluate: plan -> score, higher is better, finite. Deterministic.
        identity: text that tells this problem's data and model from others; part of :attr:`digest`.
        base: what every plan holds beside the knobs' choices: bits of pinned layers, channels pruned before.
        sensitivities: predicts, without evaluating a plan, how much each choice of each knob raises the
            loss: one array of shape (choices,) per knob, 0 at the last choice. None when nothing is known.
        evaluate_many: scores several plans at once, as ``evaluate`` would one by one, which is what None
            stands for. :func:`autocompress.agents.evaluated_by` makes one of worker processes.
        evaluate_fully: scores a plan with more effort than ``evaluate`` takes, for the few best; None where
            there is none to take.

    Raises:
        ValueError: no knobs, two knobs for one decision, or a budget that is still relative.
    """

    knobs: tuple[Knob, ...]
    budgets: tuple[Budget, ...]
    price: Callable[[Plan], Cost]
    evaluate: Callable[[Plan], float]
    identity: str = ""
    base: Plan = field(default_factory=Plan)
    sensitivities: Callable[[], Sequence[NDArray[np.float64]]] | None = None
    evaluate_many: EvaluateMany | None = None
    evaluate_fully: Callable[[Plan], float] | None = None

    def __post_init__(self) -> None:
        if not self.knobs:
            raise ValueError("a problem needs at least one knob; nothing in this network can be changed")
        decided = Counter((k.kind, name) for k in self.knobs for name in (k.bit_layers or (k.name,)))
        if twice := [f"{kind} of {name!r}" for (kind, name), count in decided.items() if count > 1]:
            raise ValueError(f"one knob per decision; several set {', '.join(twice)}")
        for budget in self.budgets:
            if budget.relative:
                raise ValueError(f"budget {budget} is relative; resolve it against the original cost first")

    def plan(self, values: Sequence[Value]) -> Plan:
        """The plan that sets the first ``len(values)`` knobs and leaves the others at their last choices.

        Raises:
            ValueError: a value that its knob does not offer, or more values than knobs.
        """
        if len(values) > len(self.knobs):
            raise ValueError(f"{len(self.knobs)} knobs take at most as many values, got {len(values)}")
        arch, channels = dict(self.base.arch), dict(self.base.channels)
        weight = {layer: bits.weight for layer, bits in self.base.bits.items()}
        act = {layer: bits.act for layer, bits in self.base.bits.items()}
        unchanged = [knob.choices[-1] for knob in self.knobs[len(values) :]]
        for knob, value in zip(self.knobs, [*values, *unchanged], strict=True):
            if value not in knob.choices:
                raise ValueError(f"knob {knob.name!r} offers {knob.choices}, got {value!r}")
            if knob.kind == "arch":
                arch[knob.name] = str(value)
            elif knob.kind == "channels":
                channels[knob.name] = int(value)
            else:
                side = weight if knob.kind == "weight_bits" else act
                side.update(dict.fromkeys(knob.bit_layers, int(value)))
        layers = dict.fromkeys([*weight, *act])
        return Plan(arch, channels, {name: Bits(weight.get(name, 32), act.get(name, 32)) for name in layers})

    @cached_property
    def smallest(self) -> Cost:
        """Cost with every knob at its first choice."""
        return self.price(self.plan([knob.choices[0] for knob in self.knobs]))

    @cached_property
    def largest(self) -> Cost:
        """Cost with every knob unchanged."""
        return self.price(self.plan([knob.choices[-1] for knob in self.knobs]))

    def reachable(self) -> tuple[Cost, Cost]:
        """Smallest and largest reachable cost.

        Raises:
            InfeasibleBudgetError: the smallest plan breaks a budget; names each one broken and its floor.
        """
        broken = [b for b in self.budgets if not b.met_by(self.smallest)]
        if broken:
            faults = [
                f"budget {b} cannot be met: the smallest reachable {b.metric} is "
                f"{self.smallest[b.metric]:,.6g} ({self.smallest[b.metric] / self.largest[b.metric]:.1%} "
                f"of {self.largest[b.metric]:,.6g}){self._held_up_by(b.metric)}"
                for b in broken
            ]
            raise InfeasibleBudgetError("; ".join(faults) + f". Raise the limit, {self._remedy()}.")
        return self.smallest, self.largest

    def _held_up_by(self, metric: Metric) -> str:
        """The layers with the largest shares of the smallest cost, for the message."""
        shares = {name: layer.get(metric, 0.0) for name, layer in self.smallest.layers.items()}
        largest = sorted(shares, key=lambda name: -shares[name])[:_NUM_NAMED]
        if not largest or shares[largest[0]] <= 0:
            return ""
        named = [f"{name} ({shares[name] / self.smallest[metric]:.0%})" for name in largest]
        return f", held up by {', '.join(named)}"

    def _remedy(self) -> str:
        if any(knob.kind == "arch" for knob in self.knobs):
            return "take a space with narrower or fewer layers, or let channels and bits be decided as well"
        if any(knob.is_bits for knob in self.knobs):
            return "allow fewer bits or unpin layers"
        return "lower the minimum keep ratio or unlock layers"

    def meets_budgets(self, cost: Cost) -> bool:
        """Whether a cost is within every budget."""
        return all(budget.met_by(cost) for budget in self.budgets)

    def feasible(self, values: Sequence[Value]) -> bool:
        """Whether the first knobs at ``values`` leave a way to meet every budget."""
        rest = [knob.choices[0] for knob in self.knobs[len(values) :]]
        return self.meets_budgets(self.price(self.plan([*values, *rest])))

    def clip(self, values: Sequence[Value], wanted: Value) -> Value:
        """The largest choice, at most ``wanted``, of the next knob that can still meet every budget.

        Returns a feasible choice whenever one exists, and is idempotent. Binary search: costs never
        rise towards earlier choices.

        Args:
            values: choices of the knobs decided so far.
            wanted: a choice of knob ``len(values)``.
        """
        choices = self.knobs[len(values)].choices
        low, high = 0, choices.index(wanted)
        if self.feasible([*values, choices[high]]):
            return choices[high]
        while high - low > 1:
            middle = (low + high) // 2
            if self.feasible([*values, choices[middle]]):
                low = middle
            else:
                high = middle
        return choices[low]

    def bounded(self, wanted: Sequence[Value]) -> list[Value]:
        """Every knob's wanted choice clipped in turn: an assignment within every budget."""
        values: list[Value] = []
        for value in wanted:
            values.append(self.clip(values, value))
        return values

    def score(self, plan: Plan) -> Scored:
        """The score of a plan, found in this process.

        Raises:
            ValueError: it is not finite.
        """
        start = time.perf_counter()
        score = float(self.evaluate(plan))
        return _finite(plan, Scored(score, time.perf_counter() - start))

    def score_many(self, plans: Sequence[Plan]) -> Iterator[Scored]:
        """Scores of plans in their order, each as soon as it is known.

        Raises:
            ValueError: one is not finite.
        """
        if self.evaluate_many is None:
            return map(self.score, plans)
        return map(_finite, plans, self.evaluate_many(plans))

    def assess(self, values: Sequence[Value], *, index: int, source: str = "") -> Trial:
        """Price and score one complete assignment, in this process.

        Args:
            values: one choice per knob.
            index: running number of the plan within its search, from 0.
            source: how the plan came about, e.g. ``warm-up``; shown in reports.

        Raises:
            ValueError: the assignment is incomplete or over budget, or the score is not finite.
        """
        plan, cost = self._within_budget(values)
        scored = self.score(plan)
        return Trial(plan, scored.score, cost, index, scored.seconds, source)

    def assess_many(
        self, assignments: Sequence[Sequence[Value]], *, index: int, source: str = ""
    ) -> Iterator[Trial]:
        """Price all of some complete assignments, then score them; trials come in order, one by one.

        Args:
            assignments: one choice per knob in each.
            index: running number of the first.
            source: how they came about.

        Raises:
            ValueError: an assignment is incomplete or over budget, or a score is not finite.
        """
        priced = [self._within_budget(values) for values in assignments]
        scores = self.score_many([plan for plan, _ in priced])
        for number, ((plan, cost), scored) in enumerate(zip(priced, scores, strict=True), start=index):
            yield Trial(plan, scored.score, cost, number, scored.seconds, source)

    def _within_budget(self, values: Sequence[Value]) -> tuple[Plan, Cost]:
        if len(values) != len(self.knobs):
            raise ValueError(f"{len(self.knobs)} knobs need as many values, got {len(values)}")
        plan = self.plan(values)
        cost = self.price(plan)
        if not self.meets_budgets(cost):
            raise ValueError(f"plan {plan.digest} is over budget: {dict(cost.totals)}")
        return plan, cost

    def finals(self) -> Problem | None:
        """The same problem with every plan scored fully, or None where it is already.

        The best of many noisy scores is partly luck: what a search found best is worth another look.
        """
        if self.evaluate_fully is None:
            return None
        return replace(
            self,
            evaluate=self.evaluate_fully,
            evaluate_fully=None,
            evaluate_many=None,
            identity=f"{self.identity} fully",
        )

    @cached_property
    def digest(self) -> str:
        """Hash of everything that decides a plan's score and cost; keys the ledger."""
        knobs = [
            [k.kind, k.name, list(k.choices), *([list(k.layers)] if k.layers else [])] for k in self.knobs
        ]
        base = [] if self.base == Plan() else [self.base.to_json()]
        return hashlib.sha256(json.dumps([knobs, self.identity, *base]).encode()).hexdigest()[:16]


def _finite(plan: Plan, scored: Scored) -> Scored:
    if not math.isfinite(scored.score):
        raise ValueError(f"evaluate must return a finite score, got {scored.score} for plan {plan.digest}")
    return scored
