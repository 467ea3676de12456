"""DARTS: all paths at once, and the architecture's gradient through one step of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.core.errors import RecipeError
from autocompress.nas.supernet.network import Supernet
from autocompress.nas.supernet.step import Adam, Step, check_method, set_gradients

_ALPHA = Adam(3e-4, (0.5, 0.999), 1e-3)


@dataclass(frozen=True)
class DARTS:
    """Learns the weights of a mixture of all operations by gradient.

    Liu, Simonyan, Yang, arXiv 1806.09055, equations 3 to 8, and its released code. Memory and time of all
    paths. Searches of this kind tend to collapse to skip connections; two guards are offered.

    Args:
        order: 2 differentiates through one step of the weights; 1 takes them as fixed.
        alpha: how logits are updated.
        every: weight steps per architecture step.
        affine: whether BatchNorm scales and shifts inside operations.
        max_skips: end the search when the normal cell derived after an epoch has that many skip connections
            (Liang et al., DARTS+, arXiv 1909.06035, criterion 1, there 2); 3 here. None switches it off.
        skip_dropout: rate at which skip connections are dropped at the start, falling linearly to 0 (Chen et
            al., Progressive DARTS, arXiv 1904.12760).

    Raises:
        RecipeError: values out of range, all at once.
    """

    order: int = 1
    alpha: Adam = _ALPHA
    every: int = 1
    affine: bool = False
    max_skips: int | None = 3
    skip_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_method("darts", self.every, self.max_skips, self.skip_dropout)
        if self.order not in (1, 2):
            raise RecipeError(f"darts: order must be 1 or 2, got {self.order}")

    def weight_gates(self, supernet: Supernet, generator: torch.Generator, progress: float) -> None:
        """See :class:`~autocompress.nas.supernet.step.Method`."""
        with torch.no_grad():
            supernet.use_mixture()

    def architecture_step(self, supernet: Supernet, step: Step) -> float:
        """See :class:`~autocompress.nas.supernet.step.Method`."""
        found: list[float] = []

        def search_loss() -> Tensor:
            supernet.use_mixture()
            loss = step.total(step.loss(supernet(step.search[0]), step.search[1]), supernet.probabilities())
            found.append(float(loss.detach()))
            return loss

        def train_loss() -> Tensor:
            supernet.use_mixture()
            return step.loss(supernet(step.train[0]), step.train[1])

        weights = [w for w in supernet.parameters() if w.requires_grad]
        group = step.weight_optimizer.param_groups[0]
        state = step.weight_optimizer.state
        gradients = unrolled_gradient(
            train_loss,
            search_loss,
            weights,
            list(supernet.alphas.values()),
            lr=group["lr"] if self.order == 2 else 0.0,
            velocity=[group["momentum"] * state.get(w, {}).get("momentum_buffer", 0.0) for w in weights],
            weight_decay=group["weight_decay"],
        )
        set_gradients(supernet, list(gradients))
        step.alpha_optimizer.step()
        return found[0]


def unrolled_gradient(
    train_loss: Callable[[], Tensor],
    search_loss: Callable[[], Tensor],
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    *,
    lr: float,
    velocity: Sequence[Tensor | float] = (),
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """The gradient of ``search_loss(w', alpha)`` by alpha, where ``w'`` is one step from w on ``train_loss``.

    ``w' = w - lr * (velocity + grad + weight_decay * w)``. The gradient through ``w'`` is a product of a
    mixed second derivative and a vector, approximated by a central difference of first gradients at
    ``w +- eps * v`` with ``eps = 0.01 / |v|``. Weights are set back.

    Args:
        train_loss, search_loss: functions of the present values of weights and alphas.
        weights: changed in place and set back.
        alphas: what is differentiated by.
        lr: of the step; 0 gives the first-order gradient.
        velocity: momentum times the optimiser's buffer, one per weight; zero when absent.
        weight_decay: of the step.
    """
    if lr == 0:
        return _gradients(search_loss(), alphas)
    before = [w.detach().clone() for w in weights]
    speeds = list(velocity) or [0.0] * len(weights)
    gradients = _gradients(train_loss(), weights)
    with torch.no_grad():
        for w, gradient, speed in zip(weights, gradients, speeds, strict=True):
            w.sub_(lr * (speed + gradient + weight_decay * w))
    found = _gradients(search_loss(), [*alphas, *weights])
    by_alpha, direction = found[: len(alphas)], found[len(alphas) :]
    with torch.no_grad():
        for w, old in zip(weights, before, strict=True):
            w.copy_(old)
    mixed = mixed_product(train_loss, weights, alphas, direction)
    return [a - lr * m for a, m in zip(by_alpha, mixed, strict=True)]


def mixed_product(
    loss: Callable[[], Tensor],
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    direction: Sequence[Tensor],
) -> list[Tensor]:
    """``d2 loss / (d alpha d w)`` times a direction, by a central difference; weights are set back."""
    norm = math.sqrt(sum(float((d.double() ** 2).sum()) for d in direction))
    if norm == 0:
        return [torch.zeros_like(a) for a in alphas]
    before = [w.detach().clone() for w in weights]
    epsilon, sides = 0.01 / norm, []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for w, old, d in zip(weights, before, direction, strict=True):
                w.copy_(old + sign * epsilon * d)
        sides.append(_gradients(loss(), alphas))
    with torch.no_grad():
        for w, old in zip(weights, before, strict=True):
            w.copy_(old)
    return [(plus - minus) / (2 * epsilon) for plus, minus in zip(*sides, strict=True)]


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, zero where the loss does not depend on a tensor."""
    found = torch.autograd.grad(loss, list(tensors), allow_unused=True) if tensors else ()
    return [torch.zeros_like(t) if g is None else g.detach() for t, g in zip(tensors, found, strict=True)]
