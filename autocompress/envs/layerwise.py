"""One knob of a problem per step: what all environments share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from numpy.typing import NDArray

from autocompress.core import Knob, Problem, Trial, Value

Vector = NDArray[np.float32]


class LayerwiseEnv(gymnasium.Env[Vector, Vector], ABC):
    """Steps through the knobs of a problem; every finished episode meets every budget.

    A subclass says what the agent sees and what it earns: it sets ``observation_space`` and implements
    :meth:`observe` and :meth:`reward_of`. Actions, bounds and ending are here; see
    :class:`ChannelPruningEnv` for the contract.

    Args:
        problem: knobs, budgets, price and score.

    Raises:
        InfeasibleBudgetError: no plan of the problem meets its budgets.
    """

    def __init__(self, problem: Problem) -> None:
        problem.reachable()
        self.problem = problem
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self._values: list[Value] = []
        self._num_episodes = 0

    @abstractmethod
    def observe(self) -> Vector:
        """What the agent sees before it decides the next knob (the last one, once all are decided)."""

    @abstractmethod
    def reward_of(self, trial: Trial) -> float:
        """The reward of the last step."""

    @property
    def last_choice(self) -> float:
        """The previous choice as a number in [0, 1]: its index over the last index; 1 at the start."""
        if not self._values:
            return 1.0
        choices = self.problem.knobs[len(self._values) - 1].choices
        return choices.index(self._values[-1]) / max(len(choices) - 1, 1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        """Forget all decisions. The environment draws nothing at random, so ``seed`` changes nothing."""
        super().reset(seed=seed, options=options)
        self._values = []
        return self.observe(), {}

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Decide the next knob.

        Args:
            action: shape (1,), in [-1, 1]; values outside are clamped.

        Raises:
            ValueError: the action is NaN.
            ResetNeeded: the episode is over.
        """
        knobs = self.problem.knobs
        if len(self._values) == len(knobs):
            raise ResetNeeded("the episode is over: call reset() before step()")
        knob = knobs[len(self._values)]
        wanted = float(np.asarray(action).reshape(1)[0])
        if math.isnan(wanted):
            raise ValueError(f"the action for knob {knob.name!r} must be a number in [-1, 1], got NaN")
        value = self._bounded(knob.at((wanted + 1) / 2))
        self._values.append(value)
        info: dict[str, Any] = {"value": value, "bounded_action": _action(knob, value)}
        if len(self._values) < len(knobs):
            return self.observe(), 0.0, False, False, info
        self._values = self._repaired()
        trial = self.problem.assess(self._values, index=self._num_episodes, source="episode")
        self._num_episodes += 1
        actions = [_action(k, v) for k, v in zip(knobs, self._values, strict=True)]
        info |= {
            "trial": trial,
            "is_success": self.problem.meets_budgets(trial.cost),
            "values": tuple(self._values),
            "bounded_actions": np.array(actions, np.float32),
        }
        return self.observe(), self.reward_of(trial), True, False, info

    def _bounded(self, wanted: Value) -> Value:
        """The choice to take when the agent wants this one of the next knob."""
        return self.problem.clip(self._values, wanted)

    def _repaired(self) -> list[Value]:
        """The choices to assess once all are taken; within every budget."""
        return self._values


def _action(knob: Knob, value: Value) -> float:
    """The action in [-1, 1] that asks for exactly this choice."""
    return 2 * knob.fraction_of(value) - 1
