"""The environment of joint searches: architecture, channels and bits in one episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from gymnasium.spaces import Box

from autocompress.core import Metric, Problem, Trial, Value
from autocompress.core.fitting import fitted
from autocompress.envs.layerwise import LayerwiseEnv, Vector

JointEnforce = Literal["scale", "clip"]
_KINDS = ("arch", "channels", "weight_bits", "act_bits")
_NUM_DYNAMIC = 5


class JointEnv(LayerwiseEnv):
    """Decides knobs of any kinds, one per step: operations, channels and bits of each block in turn.

    ## Action space
    ``Box(-1, 1, (1,), float32)``. Action ``a`` asks for the choice of the current knob at the fraction
    ``u = (a + 1) / 2`` of its choices, in equal bins: -1 is the first (cheapest), 1 the last. How the budgets
    are kept is ``enforce``:

    * ``scale``: every wish is taken; after the last one, all choices are moved towards the first ones
      together until every budget is met (see :func:`autocompress.core.fitting.fitted`).
    * ``clip``: at every step the environment takes the largest choice, at most the one asked for, from which
      every budget can still be met by the later knobs at their first choices.

    ``info["bounded_actions"]`` of the last step are the actions that ask for exactly the choices assessed.

    ## Observation space
    ``Box(0, 1, (9 + F,), float32)`` for knobs of F features, about the knob to decide next (once all are
    decided: the last knob, before it was). Costs are of the metric of the first budget, as shares of the
    largest plan's; without budgets, of ``macs`` or else the first metric there is.

    | num | name | meaning | range |
    |-----|------|---------|-------|
    | 0 to 3 | kind | 1 for the knob's own of architecture, channels, weight bits, activation bits | 0 to 1 |
    | 4 to 3 + F | features | of the knob, such as :data:`autocompress.nas.joint.FEATURES` | 0 to 1 |
    | 4 + F | reduced | removed by the decisions so far, if the later knobs stay unchanged | 0 to 1 |
    | 5 + F | stake | what this knob's last choice costs above its first, after those decisions | 0 to 1 |
    | 6 + F | rest | what the later knobs can remove, if this one stays unchanged | 0 to 1 |
    | 7 + F | left | of the tightest budget, the share that those decisions have not yet used up | 0 to 1 |
    | 8 + F | last action | previous choice: its index over the last index; 1 at the start | 0 to 1 |

    A knob without effect, such as the channels of a block that is skipped, has the stake 0; for others the
    stake tells what the block's kernel and channels have become.

    ## Rewards
    0 before the last step; then the score.

    ## Starting state
    No knob decided. Nothing is random: equal actions give equal episodes.

    ## Episode end
    Terminates when every knob is decided, after ``len(problem.knobs)`` steps. Never truncates.

    ## Information
    Every step: ``value`` (the choice taken) and ``bounded_action`` (float in [-1, 1]). The last step adds
    ``trial`` (plan, score, cost), ``is_success`` (the plan meets every budget: always true), and, for all
    knobs as they were assessed, ``values`` (tuple) and ``bounded_actions`` (float array).

    ## Arguments
    Args:
        problem: its knobs all carry as many features.
        enforce: ``scale`` or ``clip``.

    Raises:
        InfeasibleBudgetError: no plan of the problem meets its budgets.
        ValueError: knobs that differ in their number of features, or an unknown ``enforce``.

    Source: Wang et al., "APQ", CVPR 2020, for deciding all three together; He et al., "AMC", ECCV 2018, and
    Wang et al., "HAQ", CVPR 2019, for deciding layer by layer. APQ itself searches by evolution.
    """

    def __init__(self, problem: Problem, *, enforce: JointEnforce = "scale") -> None:
        if enforce not in get_args(JointEnforce):
            raise ValueError(f"enforce must be one of {', '.join(get_args(JointEnforce))}, got {enforce!r}")
        counts = {len(knob.features) for knob in problem.knobs}
        if len(counts) > 1:
            numbers = ", ".join(f"{knob.name!r} has {len(knob.features)}" for knob in problem.knobs)
            raise ValueError(f"every knob needs as many features as the others; {numbers}")
        super().__init__(problem)
        self.observation_space = Box(0.0, 1.0, (len(_KINDS) + counts.pop() + _NUM_DYNAMIC,), np.float32)
        self._enforce: JointEnforce = enforce
        totals = list(problem.largest.totals)
        self._metric: Metric = "macs" if "macs" in totals else totals[0]
        if problem.budgets:
            self._metric = problem.budgets[0].metric
        self._first: list[Value] = [knob.choices[0] for knob in problem.knobs]

    def observe(self) -> Vector:
        """The numbers of the class's table."""
        t = min(len(self._values), len(self.problem.knobs) - 1)
        knob, before = self.problem.knobs[t], self._values[:t]
        last, later = knob.choices[-1], self._first[t + 1 :]
        now = self._share(before)
        dynamic = (
            1 - self._share(self._values),
            now - self._share([*before, knob.choices[0]]),
            now - self._share([*before, last, *later]),
            self._left(before),
            self.last_choice,
        )
        kind = [float(knob.kind == name) for name in _KINDS]
        state = np.array([*kind, *knob.features, *dynamic], np.float32)
        # Rounding errors, and prices that measurements make fall towards larger choices, can leave [0, 1].
        return np.clip(state, 0.0, 1.0)

    def reward_of(self, trial: Trial) -> float:
        """The score."""
        return trial.score

    def _share(self, values: Sequence[Value]) -> float:
        """Cost of the first choices, the others unchanged, relative to the largest plan's."""
        cost, largest = self.problem.price(self.problem.plan(values)), self.problem.largest[self._metric]
        return cost[self._metric] / largest if largest else 0.0

    def _left(self, before: Sequence[Value]) -> float:
        cost = self.problem.price(self.problem.plan([*before, *self._first[len(before) :]]))
        return min((1 - cost[b.metric] / b.limit for b in self.problem.budgets), default=1.0)

    def _bounded(self, wanted: Value) -> Value:
        return wanted if self._enforce == "scale" else super()._bounded(wanted)

    def _repaired(self) -> list[Value]:
        return fitted(self.problem, self._values) if self._enforce == "scale" else super()._repaired()
