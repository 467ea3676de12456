"""The plans that a learned search starts with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from autocompress.agents.baselines import Proposal
from autocompress.agents.milp import BitPlanner
from autocompress.agents.scaling import scaled_to_budget, uniform_assignments
from autocompress.core import Problem, Value

SMALLEST_FRACTION = 0.01
"""Of the choices of a knob: keeps common factors finite."""
_JITTER = 0.2  # standard deviation of jittered channels, relative to the uniform fraction


class WarmUp:
    """The plans to learn from before the actor is worth following.

    Args:
        problem: what is searched.
        rng: draws jittered and random plans.
        seed: of the planner.
        planned: whether plans of nothing but bits come from :class:`~autocompress.agents.milp.BitPlanner`, as
            long as it has new ones. Else the uniform plans come first, then jittered and random ones in turn.

    Attributes:
        is_planned: whether plans come from a planner.
        num_fixed: plans that every search starts with.
    """

    def __init__(self, problem: Problem, rng: np.random.Generator, *, seed: int, planned: bool) -> None:
        self._problem, self._rng = problem, rng
        self._uniform = uniform_assignments(problem)
        self._num_proposed = 0
        self._planner = None
        self._only_bits = all(knob.is_bits for knob in problem.knobs)
        if planned and self._only_bits:
            self._planner = BitPlanner(problem, seed)
            self._plans = chain(self._planner.opening(probe=False), self._planner.proposals())
        self.is_planned = self._planner is not None
        self.num_fixed = len(self._uniform) + self.is_planned

    def propose(self) -> Proposal:
        """Source and assignment of the next plan."""
        index = self._num_proposed
        self._num_proposed += 1
        if self._planner and (planned := next(self._plans, None)):
            return planned
        if index < len(self._uniform):
            return "uniform", self._uniform[index]
        num_knobs = len(self._problem.knobs)
        if (index - len(self._uniform)) % 2:
            source, fractions = "warm-up", self._rng.uniform(SMALLEST_FRACTION, 1, num_knobs)
        else:
            source, fractions = "jitter", self._jittered()
        return source, scaled_to_budget(self._problem, fractions.tolist())

    def observe(self, values: Sequence[Value], score: float) -> None:
        """Learn from the score of the plan proposed last."""
        if self._planner:
            self._planner.observe(values, score)

    def _jittered(self) -> NDArray[np.float64]:
        """A share off the common fraction; where all knobs are bits, one bit off the uniform plan."""
        noise = self._rng.standard_normal(len(self._problem.knobs))
        knobs = zip(self._problem.knobs, self._uniform[0], noise, strict=True)
        jittered = [
            knob.fraction_of(value) + one / len(knob.choices) if self._only_bits else 1 + _JITTER * one
            for knob, value, one in knobs
        ]
        return np.maximum(jittered, SMALLEST_FRACTION)
