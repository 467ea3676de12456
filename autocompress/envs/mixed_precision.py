"""HAQ's environment: how many bits each layer's weights and activations have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from gymnasium.spaces import Box

from autocompress.core import Problem, Trial, Value
from autocompress.envs.layerwise import LayerwiseEnv, Vector

Enforce = Literal["clip", "sweep"]
_NUM_STATIC = 9
_NUM_BEFORE_LAST_ACTION = 8
_REWARD_SCALE = 10.0  # HAQ: 0.1 on accuracies in percent


class MixedPrecisionEnv(LayerwiseEnv):
    """Decides one bit-width per step, as HAQ's agent does: of each layer the weights', then the activations'.

    Which layers are decided, in which order and between which bits is the problem's: its knobs are of the
    kinds ``weight_bits`` and ``act_bits``, and a pinned side has no knob.

    ## Action space
    ``Box(-1, 1, (1,), float32)``. Action ``a`` asks for the bits of the current knob at the fraction
    ``u = (a + 1) / 2`` of its choices, in equal bins: -1 is the fewest bits, 1 the most, and of the bits
    2 to 8 each has a seventh of the range. How the budgets are kept is ``enforce``:

    * ``clip``: at every step the environment takes the most bits, at most those asked for, from which
      every budget can still be met by the later knobs at their fewest bits.
    * ``sweep``: every wish is taken; after the last one, sweeps from the last knob to the first take one
      bit off each that has one to give, until every budget is met (see :func:`swept`).

    ``info["bounded_actions"]`` of the last step are the actions that ask for exactly the bits assessed.

    ## Observation space
    ``Box(0, 1, (10,), float32)``, about the knob to decide next (once all are decided: the last knob).

    | num | name | meaning | range |
    |-----|------|---------|-------|
    | 0 | depthwise | whether the layer is a depthwise convolution | 0 to 1 |
    | 1 | c_in | input channels | 0 to 1 |
    | 2 | c_out | output channels | 0 to 1 |
    | 3 | stride | stride; 0 for linear layers | 0 to 1 |
    | 4 | k | kernel size; 1 for linear layers | 0 to 1 |
    | 5 | params | number of weights | 0 to 1 |
    | 6 | in_area | height times width of the input | 0 to 1 |
    | 7 | index | index of the layer | 0 to 1 |
    | 8 | last action | previous choice: its index over the last index; 1 at the start | 0 to 1 |
    | 9 | weight | 1 when the weights are to be decided, 0 when the activations are | 0 to 1 |

    Rows 0 to 7 and 9 are the ``features`` of the knob, scaled over the knobs by whoever made the problem.

    ## Rewards
    0 before the last step; then ``10 * (score - reference_score)``.

    ## Starting state
    No knob decided. Nothing is random: equal actions give equal episodes.

    ## Episode end
    Terminates when every knob is decided, after ``len(problem.knobs)`` steps. Never truncates.

    ## Information
    Every step: ``value`` (the bits taken) and ``bounded_action`` (float in [-1, 1]). The last step adds
    ``trial`` (plan, score, cost), ``is_success`` (the plan meets every budget: always true), and, for all
    knobs as they were assessed, ``values`` (tuple) and ``bounded_actions`` (float array).

    ## Arguments
    Args:
        problem: its knobs carry the nine features above.
        reference_score: score at which the reward is 0, such as that of the network at 8 bits.
        enforce: ``clip`` or ``sweep``.

    Raises:
        InfeasibleBudgetError: no plan of the problem meets its budgets.
        ValueError: knobs that do not decide bits or lack the nine features, a reference that is not finite,
            or an unknown ``enforce``.

    Example:
        >>> import gymnasium
        >>> import autocompress.envs
        >>> from autocompress.testing import bits_problem
        >>> env = gymnasium.make("autocompress/MixedPrecision-v0", problem=bits_problem(0)[0])
        >>> env.reset(seed=0)[0].shape
        (10,)

    Source: Wang et al., "HAQ: Hardware-Aware Automated Quantization with Mixed Precision", CVPR 2019,
    sections 3.1 to 3.4, and its released code. Differs from the paper in the default bound (``clip``, which
    no target can make endless), in what the action of a repaired knob is taken to be (the repaired bits, not
    the wish), in the score (whatever the problem evaluates; the released code rewards training accuracy),
    and in ``last action``, which is scaled like the rest and starts at 1.
    """

    def __init__(self, problem: Problem, *, reference_score: float = 1.0, enforce: Enforce = "clip") -> None:
        if enforce not in get_args(Enforce):
            raise ValueError(f"enforce must be one of {', '.join(get_args(Enforce))}, got {enforce!r}")
        if not math.isfinite(reference_score):
            raise ValueError(f"reference_score must be finite, got {reference_score}")
        super().__init__(problem)
        if other := [f"{k.name!r} decides {k.kind}" for k in problem.knobs if not k.is_bits]:
            raise ValueError(f"every knob must decide weight_bits or act_bits; {', '.join(other)}")
        wrong = [f"{k.name!r} has {len(k.features)}" for k in problem.knobs if len(k.features) != _NUM_STATIC]
        if wrong:
            raise ValueError(
                f"every knob needs the {_NUM_STATIC} features depthwise, c_in, c_out, stride, k, params, "
                f"in_area, index, weight; {', '.join(wrong)}"
            )
        self.observation_space = Box(0.0, 1.0, (_NUM_STATIC + 1,), np.float32)
        self._reference_score = reference_score
        self._enforce: Enforce = enforce

    def observe(self) -> Vector:
        """The ten numbers of the class's table, shape (10,)."""
        knobs = self.problem.knobs
        features = knobs[min(len(self._values), len(knobs) - 1)].features
        before, after = features[:_NUM_BEFORE_LAST_ACTION], features[_NUM_BEFORE_LAST_ACTION:]
        return np.array([*before, self.last_choice, *after], np.float32)

    def reward_of(self, trial: Trial) -> float:
        """Rises with the score: ``10 * (score - reference_score)``."""
        return _REWARD_SCALE * (trial.score - self._reference_score)

    def _bounded(self, wanted: Value) -> Value:
        return wanted if self._enforce == "sweep" else super()._bounded(wanted)

    def _repaired(self) -> list[Value]:
        return swept(self.problem, self._values) if self._enforce == "sweep" else super()._repaired()


def swept(problem: Problem, values: Sequence[Value]) -> list[Value]:
    """HAQ's enforcement: one bit off each knob, from the last to the first, until every budget is met.

    A sweep that ends over budget is followed by another; knobs at their first choice are passed over. The
    result is found by bisection over the number of single steps, since costs never rise towards fewer bits,
    and ends even where no choices meet the budgets.

    Args:
        problem: whose knobs stand in the order weights, activations within each layer.
        values: one choice per knob.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
    """
    problem.reachable()
    choices = [knob.choices for knob in problem.knobs]
    start = [options.index(value) for options, value in zip(choices, values, strict=True)]
    steps = [
        knob for sweep in range(max(start)) for knob in reversed(range(len(start))) if start[knob] > sweep
    ]

    def after(num_steps: int) -> list[Value]:
        taken = np.bincount(np.array(steps[:num_steps], np.int64), minlength=len(start))
        return [options[first - n] for options, first, n in zip(choices, start, taken.tolist(), strict=True)]

    low, high = -1, len(steps)  # after(high) meets the budgets; after(low), if it exists, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.feasible(after(middle)) else (middle, high)
    return after(high)
