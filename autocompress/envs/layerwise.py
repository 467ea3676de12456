"""One knob of a problem per step: what all environments share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from numpy.typing import NDArray

from autocompress.core import Metric, Problem, Trial, Value

Reward = Literal["resource", "accuracy_guaranteed"]
Vector = NDArray[np.float32]


class LayerwiseEnv(gymnasium.Env[Vector, Vector], ABC):
    """Steps through the knobs of a problem; every finished episode meets every budget.

    A subclass says what the agent sees: it sets ``observation_space`` and implements :meth:`observe`.
    Actions, bounds, ending and rewards are here; see :class:`ChannelPruningEnv` for the contract.

    Args:
        problem: knobs, budgets, price and score.
        reward: ``resource`` or ``accuracy_guaranteed``.

    Raises:
        InfeasibleBudgetError: no plan of the problem meets its budgets.
        ValueError: unknown reward, or ``accuracy_guaranteed`` on a problem whose price lacks ``macs``.
    """

    def __init__(self, problem: Problem, *, reward: Reward = "resource") -> None:
        if reward not in get_args(Reward):
            raise ValueError(f"reward must be one of {', '.join(get_args(Reward))}, got {reward!r}")
        _, largest = problem.reachable()
        if reward == "accuracy_guaranteed":
            largest["macs"]  # raises with the metrics there are
        self.problem = problem
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self._reward: Reward = reward
        self._metric: Metric = problem.budgets[0].metric if problem.budgets else "macs"
        self._values: list[Value] = []
        self._num_episodes = 0

    @abstractmethod
    def observe(self) -> Vector:
        """What the agent sees before it decides the next knob (the last one, once all are decided)."""

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
        value = self.problem.clip(self._values, knob.at((wanted + 1) / 2))
        self._values.append(value)
        info: dict[str, Any] = {"value": value, "bounded_action": 2 * knob.fraction_of(value) - 1}
        if len(self._values) < len(knobs):
            return self.observe(), 0.0, False, False, info
        trial = self.problem.assess(self._values, index=self._num_episodes, source="episode")
        self._num_episodes += 1
        info |= {"trial": trial, "is_success": self.problem.meets_budgets(trial.cost)}
        return self.observe(), self._reward_of(trial), True, False, info

    def _reward_of(self, trial: Trial) -> float:
        error = 1 - trial.score
        return -error if self._reward == "resource" else -error * math.log(trial.cost["macs"])
