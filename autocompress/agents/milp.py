"""Bits by integer programming, with sensitivities that are told, measured, or learnt from the plans tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.agents.additive import Allocator
from autocompress.agents.baselines import Evaluations, Proposal, require_plans
from autocompress.agents.loss_belief import LossBelief
from autocompress.agents.scaling import uniform_assignments
from autocompress.core import Problem, SearchResult, TrialCallback, Value

Floats = NDArray[np.float64]

_TOLD_SPREAD, _DEFAULT_SPREAD = 1.0, 2.0  # how far sensitivities may be off, relative to themselves
_LEAST_TOLD = (
    0.01  # of what a knob would add by default: what is told to be harmless may still be learnt about
)
_PLANS_PER_PROBE = 1.5
_DOUBTS = (
    0.0,
    0.0,
    0.3,
    0.6,
    1.2,
    1.2,
    2.4,
    2.4,
)  # of a belief from which only plans already tried are drawn


@dataclass(frozen=True)
class MilpSearch:
    """Solves for the bits that lose least by what is known, and learns from the score of every plan.

    Each knob is taken to add ``factor * profile(bits)`` to the loss ``-ln(score)``. The profile is what
    ``problem.sensitivities`` tells, else ``4**-bits``, as of the squared error of rounding. The factors are
    learnt by Bayesian linear regression. Plans in order: the best by what is known beforehand; the uniform
    ones; then, in turn, the best for the expected factors, and the best for factors drawn from what is
    believed of them (Thompson sampling), which tries what is uncertain. Trials are marked ``milp``,
    ``uniform`` and ``draw``.

    From 1.5 plans per knob on, every knob is also measured alone, with few bits and all others unchanged,
    after the uniform plans. These evaluations count towards ``num_plans``; those over budget are no trials,
    the others are marked ``probe``.

    Ends early when it has nothing new to try.

    Source: the integer program is that of Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML
    2021. Differs from the paper in learning from the plans tried; on HAQ's latency table that is worth more
    than anything else (benchmarks/search_bits.py, docs/decisions/0007).
    """

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess at most ``num_plans`` plans; see :class:`autocompress.core.Search`.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            RecipeError: knobs that do not decide bits, or costs that do not add up over layers.
            ValueError: ``num_plans`` is below 1, or sensitivities that do not fit the knobs.
        """
        require_plans(self, num_plans, problem)
        planner = BitPlanner(problem, seed)
        seen = Evaluations(problem, callbacks)
        opening = planner.opening(probe=num_plans >= _PLANS_PER_PROBE * len(problem.knobs))[:num_plans]
        for (_, values), score in zip(opening, seen.scores_of(opening), strict=True):
            planner.observe(values, score)
        plans = planner.proposals()
        while seen.num_evaluated < num_plans and (proposal := next(plans, None)):
            source, values = proposal
            planner.observe(values, seen.score_of(values, source))
        return SearchResult(tuple(seen.trials))


class BitPlanner:
    """Proposes plans by what is believed of their losses, and learns from their scores.

    Args:
        problem: whose knobs decide bits.
        seed: of the plans drawn from the belief.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        RecipeError: knobs that do not decide bits, or costs that do not add up over layers.
        ValueError: sensitivities that do not fit the knobs.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._allocate = Allocator(problem)
        self._rng = np.random.default_rng([seed, 2])
        self._tried: set[tuple[Value, ...]] = set()
        told = problem.sensitivities is not None
        self._belief = LossBelief(_profiles(problem), _TOLD_SPREAD if told else _DEFAULT_SPREAD)

    def observe(self, values: Sequence[Value], score: float) -> None:
        """Learn from the score of an assignment."""
        indices = [knob.choices.index(value) for knob, value in zip(self._problem.knobs, values, strict=True)]
        self._belief.observe(indices, score)
        self._tried.add(tuple(values))

    def opening(self, *, probe: bool) -> list[Proposal]:
        """The first plans, which no score changes, so that they can be scored together; to be observed.

        Args:
            probe: whether to measure every knob alone, with plans that are over budget as a rule.
        """
        plans: list[Proposal] = [("milp", self._allocate(self._belief.expected(), gap=1e-6))]
        plans += [("uniform", values) for values in uniform_assignments(self._problem)]
        if probe:
            plans += [("probe", values) for values in self._probes()]
        first: dict[tuple[Value, ...], Proposal] = {}
        for proposal in plans:
            first.setdefault(tuple(proposal[1]), proposal)
        return list(first.values())

    def proposals(self) -> Iterator[Proposal]:
        """Plans after the opening, new ones only; each is to be observed before the next is asked for."""
        while True:
            before = len(self._tried)
            best = self._allocate(self._belief.expected())
            if tuple(best) not in self._tried:
                yield "milp", best
            for doubt in _DOUBTS:
                drawn = self._allocate(self._doubted(self._belief.drawn(self._rng), doubt))
                if tuple(drawn) not in self._tried:
                    yield "draw", drawn
                    break
            if len(self._tried) == before:
                return

    def _doubted(self, losses: Sequence[Floats], doubt: float) -> list[Floats]:
        """Losses of which every knob's may be wrong by a factor, log-normal with deviation ``doubt``."""
        factors = np.exp(doubt * self._rng.standard_normal(len(losses)))
        return [factor * array for factor, array in zip(factors, losses, strict=True)]

    def _probes(self) -> list[list[Value]]:
        """Every knob in turn at a quarter of its choices, all others unchanged."""
        unchanged = [knob.choices[-1] for knob in self._problem.knobs]
        return [
            [*unchanged[:k], knob.choices[len(knob.choices) // 4], *unchanged[k + 1 :]]
            for k, knob in enumerate(self._problem.knobs)
        ]


def _profiles(problem: Problem) -> list[Floats]:
    """How the loss of every knob falls over its choices; 0 at the last.

    Raises:
        ValueError: sensitivities that are not one finite array per knob with one value per choice.
    """
    bits = [np.array(knob.choices, np.float64) for knob in problem.knobs]
    default = [4.0**-b - 4.0 ** -b[-1] for b in bits]
    if problem.sensitivities is None:
        return default
    told = [np.asarray(array, np.float64) for array in problem.sensitivities()]
    wrong = [knob.name for knob, b, t in zip(problem.knobs, bits, told, strict=False) if b.shape != t.shape]
    wrong += [knob.name for knob, t in zip(problem.knobs, told, strict=False) if not np.isfinite(t).all()]
    if wrong or len(told) != len(bits):
        raise ValueError(
            f"sensitivities must be one finite array per knob with one number per choice; got {len(told)} "
            f"for {len(bits)} knobs" + (f", wrong for {', '.join(wrong)}" if wrong else "")
        )
    falling = [np.maximum.accumulate((t - t[-1])[::-1])[::-1] for t in told]
    level = sum(float(t.sum()) for t in falling) / max(sum(float(d.sum()) for d in default), 1e-300)
    if level <= 0:
        return default
    return [np.maximum(t, _LEAST_TOLD * level * d) for t, d in zip(falling, default, strict=True)]
