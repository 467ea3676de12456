"""ProxylessNAS: one path in memory, gradients or rewards for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from autocompress.core.errors import RecipeError
from autocompress.nas.supernet.gates import BinaryPath, OnePath, sample, sample_pair, straight_through
from autocompress.nas.supernet.network import Supernet
from autocompress.nas.supernet.step import Adam, Step, check_method, set_gradients

Variant = Literal["full", "two", "reinforce"]


_ALPHA = Adam(1e-3, (0.0, 0.999))


@dataclass(frozen=True)
class ProxylessNAS:
    """Learns one operation per decision with the memory of one path.

    Weights are trained on paths drawn from the distribution. The logits are updated by the gradient of the
    gates' values, of all paths (``full``) or of two drawn ones (``two``), or by rewards (``reinforce``).

    Cai, Zhu, Han, arXiv 1812.00332, and its released code. Differs in the gradient of a path without an
    operation, which the code loses, and in the baseline of rewards (see :func:`running_mean`); in ``two`` the
    cost too is expected under the distribution over the two.

    Args:
        variant: see above.
        alpha: how logits are updated.
        every: weight steps per architecture step.
        affine: whether BatchNorm scales and shifts.
        num_samples: members per step of ``reinforce``.
        reward_exponent: of ``reward = accuracy * (reference / cost) ** exponent``.
        baseline_decay: memory of the rewards' running mean, over steps.

    Raises:
        RecipeError: values out of range, all at once.
    """

    variant: Variant = "full"
    alpha: Adam = _ALPHA
    every: int = 5
    affine: bool = True
    num_samples: int = 10
    reward_exponent: float = 0.1
    baseline_decay: float = 0.99
    max_skips: None = None
    skip_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_method("proxyless", self.every, self.max_skips, self.skip_dropout)
        faults = []
        if self.variant not in get_args(Variant):
            faults.append(
                f"proxyless: variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}"
            )
        if self.num_samples < 2:
            faults.append(f"proxyless: num_samples must be >= 2, got {self.num_samples}")
        if not 0 <= self.baseline_decay < 1:
            faults.append(f"proxyless: baseline_decay must be in [0, 1), got {self.baseline_decay}")
        if faults:
            raise RecipeError(faults)

    def weight_gates(self, supernet: Supernet, generator: torch.Generator, progress: float) -> None:
        """See :class:`~autocompress.nas.supernet.step.Method`."""
        supernet.use({n: OnePath(sample(p, generator)) for n, p in supernet.probabilities().items()})

    def architecture_step(self, supernet: Supernet, step: Step) -> float:
        """See :class:`~autocompress.nas.supernet.step.Method`."""
        if self.variant == "full":
            return self._full(supernet, step)
        if self.variant == "two":
            return self._two(supernet, step)
        return self._reinforce(supernet, step)

    def _full(self, supernet: Supernet, step: Step) -> float:
        gates, probabilities = {}, supernet.probabilities()
        for name, p in probabilities.items():
            index = sample(p, step.generator)
            gates[name] = BinaryPath(straight_through(p, index), index, tuple(range(len(p))))
        loss = _gradient_of_gates(supernet, step, gates, probabilities)
        step.alpha_optimizer.step()
        return loss

    def _two(self, supernet: Supernet, step: Step) -> float:
        gates, probabilities = {}, {}
        for name, alpha in supernet.alphas.items():
            pair = sample_pair(torch.softmax(alpha, 0), step.generator)
            p = torch.softmax(alpha[list(pair)], 0)
            chosen, places = sample(p, step.generator), (torch.tensor(pair),)
            values = torch.zeros_like(alpha).index_put(places, straight_through(p, chosen))
            gates[name] = BinaryPath(values, pair[chosen], pair)
            probabilities[name] = torch.zeros_like(alpha).index_put(places, p)
        loss = _gradient_of_gates(supernet, step, gates, probabilities)
        before = {name: alpha.detach().clone() for name, alpha in supernet.alphas.items()}
        step.alpha_optimizer.step()
        with torch.no_grad():
            for name, alpha in supernet.alphas.items():
                alpha.copy_(rescaled_pair(before[name], alpha, gates[name].candidates))
        return loss

    def _reinforce(self, supernet: Supernet, step: Step) -> float:
        x, y = step.search
        drawn, rewards = [], []
        table = {n: p.detach() for n, p in supernet.probabilities().items()}
        for _ in range(self.num_samples):
            indices = {name: sample(p, step.generator) for name, p in table.items()}
            supernet.use({name: OnePath(index) for name, index in indices.items()})
            with torch.no_grad():
                logits = supernet(x)
            drawn.append(indices)
            rewards.append(self.reward(logits, y, indices, step))
        mean = sum(rewards) / len(rewards)
        baseline = supernet.reward_mean = running_mean(supernet.reward_mean, mean, self.baseline_decay)
        loss = reinforce_loss(supernet.alphas, drawn, [reward - baseline for reward in rewards])
        set_gradients(supernet, list(torch.autograd.grad(loss, list(supernet.alphas.values()))))
        step.alpha_optimizer.step()
        return -mean

    def reward(self, logits: Tensor, y: Tensor, indices: dict[str, int], step: Step) -> float:
        """``accuracy * (reference / cost) ** exponent`` of one member on one batch."""
        accuracy = float((logits.argmax(1) == y).double().mean())
        if step.cost is None:
            return accuracy
        costs = step.cost.costs
        cost = costs.fixed + sum(float(costs.table[name][index]) for name, index in indices.items())
        return accuracy * float((step.cost.reference / cost) ** self.reward_exponent)


def _gradient_of_gates(
    supernet: Supernet, step: Step, gates: dict[str, BinaryPath], probabilities: dict[str, Tensor]
) -> float:
    """Leaves the gradient of the search loss in the logits; gives the loss."""
    x, y = step.search
    supernet.use(gates)
    loss = step.total(step.loss(supernet(x), y), probabilities)
    gradients = torch.autograd.grad(loss, list(supernet.alphas.values()), allow_unused=True)
    set_gradients(supernet, list(gradients))
    return float(loss.detach())


def rescaled_pair(before: Tensor, after: Tensor, pair: tuple[int, ...]) -> Tensor:
    """Logits of which only a pair has moved, shifted so that no other probability changes.

    Both are lowered by ``log((e^a' + e^b') / (e^a + e^b))``. Other entries are those of ``before``.

    Args:
        before, after: logits around an update, shape (operations,).
        pair: the two numbers.
    """
    chosen = list(pair)
    shift = torch.logsumexp(after[chosen], 0) - torch.logsumexp(before[chosen], 0)
    result = before.clone()
    result[chosen] = after[chosen] - shift
    return result


def running_mean(old: float | None, value: float, decay: float) -> float:
    """``decay * old + (1 - decay) * value``, the baseline of REINFORCE; the first value starts it.

    Differs from the released code, which adds ``decay * (value - old)`` and so forgets almost everything.
    """
    return value if old is None else decay * old + (1 - decay) * value


def reinforce_loss(alphas: dict[str, Tensor], drawn: list[dict[str, int]], advantages: list[float]) -> Tensor:
    """The mean of ``-advantage * log p(sample)``: its gradient is REINFORCE's.

    Args:
        alphas: decision -> logits.
        drawn: samples: decision -> index.
        advantages: rewards less the baseline, one per sample.
    """
    logs = {name: torch.log_softmax(alpha, 0) for name, alpha in alphas.items()}
    terms = [
        -advantage * torch.stack([logs[name][index] for name, index in indices.items()]).sum()
        for indices, advantage in zip(drawn, advantages, strict=True)
    ]
    return torch.stack(terms).mean()
