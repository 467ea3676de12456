"""AMC's environment: how many channels each layer keeps."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from gymnasium.spaces import Box

from autocompress.core import Metric, Problem, Trial
from autocompress.envs.layerwise import LayerwiseEnv, Vector

Reward = Literal["resource", "accuracy_guaranteed"]
_NUM_STATIC = 8


class ChannelPruningEnv(LayerwiseEnv):
    """Decides the size of one channel group per step, as AMC's agent does.

    ## Action space
    ``Box(-1, 1, (1,), float32)``. Action ``a`` asks for the choice of the current knob at the fraction
    ``u = (a + 1) / 2`` of its choices: -1 is the first (fewest channels), 1 the last (all channels). The
    environment then takes the largest choice, at most the one asked for, from which every budget can
    still be met by the later knobs at their first choices. ``info["bounded_action"]`` is the action that
    asks for exactly the choice taken.

    ## Observation space
    ``Box(0, 1, (11,), float32)``, about the knob to decide next (once all are decided: the last knob).

    | num | name | meaning | range |
    |-----|------|---------|-------|
    | 0 | t | index of the layer | 0 to 1 |
    | 1 | n | output channels | 0 to 1 |
    | 2 | c | input channels | 0 to 1 |
    | 3 | h | height of the input | 0 to 1 |
    | 4 | w | width of the input | 0 to 1 |
    | 5 | stride | stride | 0 to 1 |
    | 6 | k | kernel size | 0 to 1 |
    | 7 | macs | MACs of the layer | 0 to 1 |
    | 8 | reduced | share of the original cost removed by the decisions so far | 0 to 1 |
    | 9 | rest | share of the original cost that the later knobs can remove | 0 to 1 |
    | 10 | a(t-1) | previous choice: its index over the last index; 1 at the start | 0 to 1 |

    Rows 0 to 7 are the ``features`` of the knob, scaled by whoever made the problem. Cost is the metric
    of the first budget, ``macs`` when there is none.

    ## Rewards
    0 before the last step. At the last step, with ``error = 1 - score``:

    * ``resource``: ``-error``
    * ``accuracy_guaranteed``: ``-error * ln(macs of the plan)``

    ## Starting state
    No knob decided. Nothing is random: equal actions give equal episodes.

    ## Episode end
    Terminates when every knob is decided, after ``len(problem.knobs)`` steps. Never truncates.

    ## Information
    Every step: ``value`` (the choice taken) and ``bounded_action`` (float in [-1, 1]). The last step adds
    ``trial`` (plan, score, cost), ``is_success`` (the plan meets every budget: always true), and, for all
    knobs, ``values`` (tuple) and ``bounded_actions`` (float array).

    ## Arguments
    Args:
        problem: its knobs carry the eight features above.
        reward: ``resource`` (best score within the budgets) or ``accuracy_guaranteed`` (trades score
            against MACs).

    Raises:
        InfeasibleBudgetError: no plan of the problem meets its budgets.
        ValueError: knobs without eight features, unknown reward, or ``accuracy_guaranteed`` on a problem
            whose price lacks ``macs``.

    Example:
        >>> import gymnasium
        >>> import autocompress.envs
        >>> from autocompress.testing import waterfilling_problem
        >>> problem, _, _ = waterfilling_problem(0)
        >>> env = gymnasium.make("autocompress/ChannelPruning-v0", problem=problem)
        >>> env.reset(seed=0)[0].shape
        (11,)

    Source: He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018,
    sections 3.1 to 3.3. Differs from the paper in the action (one choice per channel group, so layers
    joined by a residual add decide once), in the bound (binary search on the real price after rounding,
    for any metric), and in ``rest`` (what later knobs can remove, not the MACs of later layers).
    """

    def __init__(self, problem: Problem, *, reward: Reward = "resource") -> None:
        if reward not in get_args(Reward):
            raise ValueError(f"reward must be one of {', '.join(get_args(Reward))}, got {reward!r}")
        super().__init__(problem)
        if reward == "accuracy_guaranteed":
            problem.largest["macs"]  # raises with the metrics there are
        wrong = [f"{k.name!r} has {len(k.features)}" for k in problem.knobs if len(k.features) != _NUM_STATIC]
        if wrong:
            raise ValueError(
                f"every knob needs the {_NUM_STATIC} features t, n, c, h, w, stride, k, macs; "
                + ", ".join(wrong)
            )
        self.observation_space = Box(0.0, 1.0, (_NUM_STATIC + 3,), np.float32)
        self._reward: Reward = reward
        self._metric: Metric = problem.budgets[0].metric if problem.budgets else "macs"
        self._original = problem.largest[self._metric]
        self._rest = [self._removable_after(t) for t in range(len(problem.knobs))]

    def observe(self) -> Vector:
        """The eleven numbers of the class's table, shape (11,)."""
        problem, values = self.problem, self._values
        t = min(len(values), len(problem.knobs) - 1)
        reduced = self._removed_by(values)
        state = np.array([*problem.knobs[t].features, reduced, self._rest[t], self.last_choice], np.float32)
        return np.clip(state, 0.0, 1.0)  # the shares can miss [0, 1] by a rounding error

    def reward_of(self, trial: Trial) -> float:
        """As in the class's table."""
        error = 1 - trial.score
        return -error if self._reward == "resource" else -error * math.log(trial.cost["macs"])

    def _removed_by(self, values: list[int | str]) -> float:
        if not values:
            return 0.0
        return 1 - self.problem.price(self.problem.plan(values))[self._metric] / self._original

    def _removable_after(self, t: int) -> float:
        knobs = self.problem.knobs
        return self._removed_by(
            [*(k.choices[-1] for k in knobs[: t + 1]), *(k.choices[0] for k in knobs[t + 1 :])]
        )
