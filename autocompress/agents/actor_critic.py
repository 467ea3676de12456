"""Settings of the actor-critic searches; stable-baselines3 is loaded when one of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from autocompress.agents.settings import Rule, are_counts, check_settings, is_count, is_share
from autocompress.core import Problem, SearchResult, TrialCallback

Algorithm = Literal["ddpg", "td3", "sac"]

HAQ_SETTINGS: dict[str, Any] = {
    "hidden": (300, 300),
    "learning_rate": 1e-3,
    "batch_size": 64,
    "updates": 100,
    "sigma": 0.5,
    "sigma_end": 0.004,
    "imitation_steps": 0,
    "follow_best": False,
    "warm_start": False,
}
"""HAQ's settings of ``ddpg`` where they differ from the defaults and are settings here. Its released code
explores with 0.5 times 0.99 per episode for 600 episodes, learns with 1e-4 (actor) and 1e-3 (critic), takes
one step per decision (about a hundred in MobileNetV2), and warms up with 20 random episodes."""


@dataclass(frozen=True)
class ActorCriticSearch:
    """Learns a network that maps what is known of a knob to its choice; base of DDPG, TD3 and SAC.

    Channels are decided in a ``ChannelPruningEnv``, bits in a ``MixedPrecisionEnv`` that sweeps. Plans in
    order: the uniform ones; warm-up plans (a quarter of all, at most 100); explored plans, in turn around the
    best plan so far and around the actor's; last, the actor's own deterministic episode, which is
    ``SearchResult.policy``. Warm-up plans are, in turn, jittered around the uniform one and wholly random; of
    bits, with ``warm_start``, they are those of ``milp``, which come before the uniform ones. Trials are
    marked ``uniform``, ``jitter``, ``warm-up``, ``explore`` and ``policy``, those of ``milp`` as there.

    Exploration adds truncated normal noise to the fractions of that plan. Its standard deviation
    falls exponentially from ``sigma`` after the warm-up to ``sigma_end`` at 80 % of the plans. All but
    the last plan are moved together to spend the budget.

    Args:
        hidden: units per hidden layer of actor and critic.
        learning_rate: of actor and critic (Adam).
        batch_size: transitions per gradient step.
        sigma, sigma_end: standard deviation of the exploration, in fractions of the choices.
        updates: gradient steps of actor and critic after each plan.
        imitation_steps: further steps of the actor after each plan, towards the actions of the best plans.
        follow_best: whether every second explored plan is around the best plan so far; else all are around
            the actor's.
        warm_start: whether the first plans of bits are those of the search ``milp``, but for its measuring of
            single knobs. Changes nothing for channels.

    Raises:
        RecipeError: a setting is out of range; names all of them.
    """

    hidden: tuple[int, ...] = (64, 64)
    learning_rate: float = 3e-3
    batch_size: int = 256
    sigma: float = 0.25
    sigma_end: float = 0.05
    updates: int = 4
    imitation_steps: int = 16
    follow_best: bool = True
    warm_start: bool = True

    algorithm: ClassVar[Algorithm]

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("hidden must be one or more whole numbers >= 1", self.hidden, are_counts(self.hidden)),
            ("learning_rate must be in (0, 1]", self.learning_rate, is_share(self.learning_rate)),
            ("batch_size must be a whole number >= 1", self.batch_size, is_count(self.batch_size)),
            ("sigma must be in (0, 1]", self.sigma, is_share(self.sigma)),
            ("sigma_end must be in (0, 1]", self.sigma_end, is_share(self.sigma_end)),
            ("updates must be a whole number >= 1", self.updates, is_count(self.updates)),
            (
                "imitation_steps must be a whole number >= 0",
                self.imitation_steps,
                is_count(self.imitation_steps, 0),
            ),
            ("follow_best must be true or false", self.follow_best, isinstance(self.follow_best, bool)),
            ("warm_start must be true or false", self.warm_start, isinstance(self.warm_start, bool)),
        ]
        check_settings(self.algorithm, rules)
        falls = self.sigma_end <= self.sigma
        check_settings(
            self.algorithm, [(f"sigma_end must be at most sigma ({self.sigma})", self.sigma_end, falls)]
        )

    def least_plans(self, num_knobs: int) -> int:
        """One plan to learn from, and the actor's own."""
        return 2

    def __call__(
        self, problem: Problem, *, num_plans: int, seed: int, callbacks: Sequence[TrialCallback] = ()
    ) -> SearchResult:
        """Assess exactly ``num_plans`` plans; see :class:`autocompress.core.Search`.

        Raises:
            InfeasibleBudgetError: no plan meets the budgets.
            RecipeError: knobs of kinds that no environment decides together.
            ValueError: ``num_plans`` is below 2, or knobs lack the features of their environment.
            DivergenceError: rewards or network weights are not finite.
        """
        from autocompress.agents import sb3

        return sb3.search(self, problem, num_plans=num_plans, seed=seed, callbacks=callbacks)


class DDPGSearch(ActorCriticSearch):
    """Deep deterministic policy gradient, the search of AMC and HAQ; settings as in the base class.

    Source: He et al., "AMC", ECCV 2018, section 3.3; Lillicrap et al., arXiv 1509.02971. See
    :mod:`autocompress.agents.sb3` for what differs from the paper.
    """

    algorithm: ClassVar[Algorithm] = "ddpg"


class TD3Search(ActorCriticSearch):
    """DDPG with two critics and delayed actor updates; settings as in the base class.

    Source: Fujimoto et al., "Addressing Function Approximation Error in Actor-Critic Methods", ICML 2018.
    """

    algorithm: ClassVar[Algorithm] = "td3"


class SACSearch(ActorCriticSearch):
    """Soft actor-critic; settings as in the base class.

    Source: Haarnoja et al., arXiv 1812.05905. Differs from the paper in exploring like DDPG instead of
    sampling the actor, so that ``sigma`` means the same for all three.
    """

    algorithm: ClassVar[Algorithm] = "sac"
