"""DDPG, TD3 and SAC on layer-wise episodes: the only door to stable-baselines3.

Source: He et al., "AMC", ECCV 2018, section 3.3 and its released code: every transition of an episode
carries the episode's final reward, the bounded action is what is stored, gradient steps are taken after each
episode, gamma 1. Differs from the paper in

* the target: each transition regresses on the final reward itself; adding the critic's value of the next
  state on top would count the same reward once per remaining layer. The target networks, and with them
  AMC's tau, then have no effect;
* the baseline: rewards in a batch are centred and scaled by mean and deviation of all stored ones,
  instead of subtracting a moving average;
* imitation: after the critic's steps, the actor also takes steps towards the stored actions of the best
  twentieth of the episodes, as in Oh et al., "Self-Imitation Learning", ICML 2018 (there weighted by
  advantage). ``imitation_steps=0`` turns them off;
* exploration: every second plan explores around the best plan so far instead of the actor's, which is what
  carries the result on problems whose optimum is known (docs/decisions/0005); ``follow_best=False`` turns it
  off. Noise is scaled by a common factor that spends the budget, so that no layer starves; it starts at 0.25
  where AMC starts at 0.5;
* warm-up: the uniform plans and jittered copies are among the warm-up plans; those of bits come from an
  integer program that learns from scores (``warm_start``, docs/decisions/0007);
* bits: HAQ's sweep keeps the budget, and the bits it leaves are what is stored as the action, not the wish;
* few gradient steps with large batches, a fixed number per plan, where AMC takes one per transition: with a
  hundred knobs the search itself would else take longer than many a score;
* one learning rate and 64 units where AMC has 1e-4 (actor), 1e-3 (critic) and 300 units.

The networks are tiny, so they stay on the CPU, where results are equal for equal seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import truncnorm
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from autocompress.agents.actor_critic import ActorCriticSearch
from autocompress.agents.baselines import recorded, require_plans
from autocompress.agents.scaling import scaled_to_budget
from autocompress.agents.warm_up import SMALLEST_FRACTION, WarmUp
from autocompress.core import Problem, SearchResult, Trial, TrialCallback, Value
from autocompress.core.errors import DivergenceError
from autocompress.envs import ChannelPruningEnv, JointEnv, LayerwiseEnv, MixedPrecisionEnv
from autocompress.envs.layerwise import Vector

_ALGORITHMS = {"ddpg": DDPG, "td3": TD3, "sac": SAC}
_EXPLORED_SHARE = 0.8  # share of the plans after which the noise has fallen to sigma_end
_ELITE_SHARE, _LEAST_ELITE = 0.05, 5  # episodes worth imitating, as a share of all plans and at least
_FIRST_LESSONS = 10

Policy = Callable[[Vector, int], float]


@dataclass(frozen=True)
class Episode:
    """What an environment showed and did.

    Args:
        states: shape (steps + 1, observation).
        actions: the bounded actions, shape (steps,).
        reward: of the last step.
        trial: plan, score and cost.
    """

    states: Vector
    actions: Vector
    reward: float
    trial: Trial


class EpisodeReplay(ReplayBuffer):
    """Replay buffer that gives the final reward to every transition of an episode.

    Rewards are returned with mean 0 and deviation 1 over the buffer.

    Args:
        rng: draws the batches (the base class draws from NumPy's global state).
        kwargs: as for the base class.
    """

    def __init__(self, *args: Any, rng: np.random.Generator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rng = rng

    def add_episode(self, episode: Episode) -> None:
        """Store every transition as an end of its own with the episode's reward."""
        reward, done = np.array([episode.reward]), np.array([True])
        for state, action, after in zip(episode.states, episode.actions, episode.states[1:], strict=False):
            self.add(state, after, np.array([action]), reward, done, [{}])

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """A batch with normalised rewards; ``env`` is not used."""
        rewards = self.rewards[: self.size(), 0]
        batch = self._get_samples(self._rng.integers(self.size(), size=batch_size))
        deviation = max(float(rewards.std()), 1e-8)
        return batch._replace(rewards=(batch.rewards - float(rewards.mean())) / deviation)

    def sample_best(self, batch_size: int, num_transitions: int) -> ReplayBufferSamples:
        """A batch drawn from the transitions with the highest rewards, the earlier first among equals."""
        best = np.argsort(-self.rewards[: self.size(), 0], kind="stable")[:num_transitions]
        return self._get_samples(self._rng.choice(best, batch_size))


class Learner:
    """An actor and its critics, with random numbers of their own.

    Evaluating a plan may draw from torch's global state or, when it comes from a ledger, may not; the
    learner must not notice, and the caller's state must not move.
    """

    def __init__(self, settings: ActorCriticSearch, env: LayerwiseEnv, num_plans: int, seed: int) -> None:
        self._settings = settings
        self._num_steps = len(env.problem.knobs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._random_state = torch.get_rng_state()
        with self._own_random_numbers():
            self.model = _ALGORITHMS[settings.algorithm](
                "MlpPolicy",
                env,
                learning_rate=settings.learning_rate,
                batch_size=settings.batch_size,
                gamma=1.0,
                buffer_size=self._num_steps * num_plans,
                replay_buffer_class=EpisodeReplay,
                replay_buffer_kwargs={"rng": np.random.default_rng([seed, 1])},
                policy_kwargs={"net_arch": list(settings.hidden)},
                device="cpu",
            )
        self.model.set_logger(Logger(None, []))
        self._num_best = self._num_steps * max(_LEAST_ELITE, round(_ELITE_SHARE * num_plans))

    def act(self, state: Vector, step: int) -> float:
        """The actor's own action, without noise."""
        action, _ = self.model.predict(state, deterministic=True)
        return float(action[0])

    def remember(self, episode: Episode) -> None:
        """Store an episode."""
        if not math.isfinite(episode.reward):
            raise DivergenceError(
                f"the reward of plan {episode.trial.plan.digest} must be finite, got {episode.reward}; "
                "check the score and the MACs"
            )
        self._replay.add_episode(episode)

    def learn(self) -> None:
        """Gradient steps for one episode."""
        with self._own_random_numbers():
            self.model.train(gradient_steps=self._settings.updates, batch_size=self._settings.batch_size)
        for _ in range(self._settings.imitation_steps):
            self._imitate()
        if not all(bool(p.isfinite().all()) for p in self.model.policy.parameters()):
            raise DivergenceError(
                f"{self._settings.algorithm}: network weights are not finite after a gradient step; "
                f"lower learning_rate (now {self._settings.learning_rate})"
            )

    def _imitate(self) -> None:
        batch = self._replay.sample_best(self._settings.batch_size, self._num_best)
        chosen = self.model.policy(batch.observations, deterministic=True)
        loss = torch.nn.functional.mse_loss(chosen, batch.actions)
        self.model.actor.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.model.actor.optimizer.step()

    @property
    def _replay(self) -> EpisodeReplay:
        replay = self.model.replay_buffer
        assert isinstance(replay, EpisodeReplay)  # for the type checker: set above
        return replay

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            yield
            self._random_state = torch.get_rng_state()


def search(
    settings: ActorCriticSearch,
    problem: Problem,
    *,
    num_plans: int,
    seed: int,
    callbacks: Sequence[TrialCallback] = (),
) -> SearchResult:
    """Run one actor-critic search; see :class:`ActorCriticSearch` for the order of the plans.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        ValueError: ``num_plans`` is below 2, or knobs lack the features of their environment.
        DivergenceError: rewards or network weights are not finite.
    """
    require_plans(settings, num_plans, problem)
    env = env_for(problem)
    rehearsal = env_for(replace(problem, evaluate=lambda plan: 0.0))
    learner = Learner(settings, rehearsal, num_plans, seed)
    rng = np.random.default_rng([seed, 0])
    warm_up = WarmUp(problem, rng, seed=seed, planned=settings.warm_start)
    num_warmup = max(1, min(100, num_plans // 4), min(warm_up.num_fixed, num_plans - 1))
    trials: list[Trial] = []
    best: Episode | None = None
    for index in range(num_plans - 1):
        if index < num_warmup:
            source, values = warm_up.propose()
        else:
            sigma = _sigma(settings, (index - num_warmup) / max(_EXPLORED_SHARE * num_plans - num_warmup, 1))
            follows = settings.follow_best and (index - num_warmup) % 2 == 0
            around = best if best and follows else play(rehearsal, learner.act)
            fractions = _noisy(around, sigma, rng)
            source, values = "explore", scaled_to_budget(problem, fractions.tolist())
        episode = play(env, _fixed(problem, values))
        learner.remember(episode)
        if best is None or episode.trial.score > best.trial.score:
            best = episode
        trials.append(recorded(replace(episode.trial, index=index, source=source), callbacks))
        if index < num_warmup:
            warm_up.observe(values, episode.trial.score)
        if index + 1 >= num_warmup:
            # An actor that has not yet caught up with planned plans would explore far from them.
            for _ in range(_FIRST_LESSONS if warm_up.is_planned and index + 1 == num_warmup else 1):
                learner.learn()
    final = play(env, learner.act).trial
    trials.append(recorded(replace(final, index=num_plans - 1, source="policy"), callbacks))
    return SearchResult(tuple(trials), final.plan)


def env_for(problem: Problem) -> LayerwiseEnv:
    """The environment whose observations fit the problem's knobs.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets.
        ValueError: knobs without the environment's features.
    """
    kinds = {knob.kind for knob in problem.knobs}
    if kinds == {"channels"}:
        return ChannelPruningEnv(problem)
    if kinds <= {"weight_bits", "act_bits"}:
        return MixedPrecisionEnv(problem, enforce="sweep")
    return JointEnv(problem)


def play(env: LayerwiseEnv, policy: Policy) -> Episode:
    """One episode in which ``policy(state, step)`` chooses every action."""
    state, _ = env.reset()
    states: list[Vector] = [state]
    reward, ended, info = 0.0, False, dict[str, Any]()
    while not ended:
        action = np.array([policy(state, len(states) - 1)], np.float32)
        state, reward, ended, _, info = env.step(action)
        states.append(state)
    return Episode(np.stack(states), info["bounded_actions"], reward, info["trial"])


def _fixed(problem: Problem, values: Sequence[Value]) -> Policy:
    """A policy that plays an assignment within budget."""
    actions = [2 * k.fraction_of(v) - 1 for k, v in zip(problem.knobs, values, strict=True)]
    return lambda state, step: actions[step]


def _sigma(settings: ActorCriticSearch, progress: float) -> float:
    return float(settings.sigma * (settings.sigma_end / settings.sigma) ** min(progress, 1.0))


def _noisy(episode: Episode, sigma: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Truncated normal fractions around those of an episode."""
    mean = (episode.actions.astype(np.float64) + 1) / 2
    low, high = (0 - mean) / sigma, (1 - mean) / sigma
    drawn: NDArray[np.float64] = truncnorm.rvs(low, high, mean, sigma, random_state=rng)
    return np.maximum(drawn, SMALLEST_FRACTION)
