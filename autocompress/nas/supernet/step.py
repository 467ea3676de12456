"""What one step of an architecture search is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.core.errors import RecipeError
from autocompress.nas.supernet.expected_cost import CostTerm
from autocompress.nas.supernet.network import Supernet

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Adam:
    """How architecture parameters are updated.

    Args:
        lr: step size.
        betas: decay of the running averages of the gradient and of its square.
        weight_decay: pull of the logits towards 0.

    Raises:
        RecipeError: values out of range, all at once.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        faults = [] if 0 < self.lr < float("inf") else [f"alpha lr must be > 0 and finite, got {self.lr}"]
        if not all(0 <= beta < 1 for beta in self.betas):
            faults.append(f"alpha betas must lie in [0, 1), got {self.betas}")
        if not 0 <= self.weight_decay < float("inf"):
            faults.append(f"alpha weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if faults:
            raise RecipeError(faults)

    def optimizer(self, supernet: Supernet) -> torch.optim.Adam:
        """The optimiser of a supernet's logits, its averages already made so that they can be restored."""
        optimizer = torch.optim.Adam(
            list(supernet.alphas.values()), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )
        for alpha in supernet.alphas.values():
            optimizer.state[alpha] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(alpha),
                "exp_avg_sq": torch.zeros_like(alpha),
            }
        return optimizer


@dataclass(frozen=True, eq=False)
class Step:
    """One step.

    Args:
        train, search: batches of images (N, C, H, W) and labels (N,), of the split for the weights and of
            the one for the architecture.
        alpha_optimizer: of the supernet's logits.
        weight_optimizer: of its weights; its present learning rate and momentum.
        generator: of everything drawn, on the CPU.
        progress: share of the search that is done, in [0, 1).
        cost: a machine's part of the loss.
        loss: logits (N, num_classes) and labels (N,) to a scalar.
    """

    train: Batch
    search: Batch
    alpha_optimizer: torch.optim.Adam
    weight_optimizer: torch.optim.SGD
    generator: torch.Generator
    progress: float = 0.0
    cost: CostTerm | None = None
    loss: Loss = F.cross_entropy

    def total(self, error: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The error and the cost's part of the loss, expected under these probabilities."""
        return error if self.cost is None else self.cost.loss(error, probabilities)


class Method(Protocol):
    """A way to learn a supernet's distribution; plain settings, deterministic given the step's generator."""

    @property
    def alpha(self) -> Adam:
        """How the logits are updated."""
        ...

    @property
    def every(self) -> int:
        """Weight steps per architecture step."""
        ...

    @property
    def affine(self) -> bool:
        """Whether BatchNorm scales and shifts inside operations during the search."""
        ...

    @property
    def max_skips(self) -> int | None:
        """The search ends when the derived cell, reduction cells apart, has that many skip connections."""
        ...

    @property
    def skip_dropout(self) -> float:
        """Rate at which skip connections are dropped at the start; falls linearly to 0."""
        ...

    def weight_gates(self, supernet: Supernet, generator: torch.Generator, progress: float) -> None:
        """Set the supernet's gates for a step of the weights."""
        ...

    def architecture_step(self, supernet: Supernet, step: Step) -> float:
        """Update the logits once; gives the loss that was lowered."""
        ...


def check_method(name: str, every: int, max_skips: int | None, skip_dropout: float) -> None:
    """Raise unless the settings that methods share are in range.

    Raises:
        RecipeError: all faults at once.
    """
    faults = []
    if every < 1:
        faults.append(f"{name}: every must be >= 1, got {every}")
    if max_skips is not None and max_skips < 1:
        faults.append(f"{name}: max_skips must be >= 1, or absent, got {max_skips}")
    if not 0 <= skip_dropout < 1:
        faults.append(f"{name}: skip_dropout must be in [0, 1), got {skip_dropout}")
    if faults:
        raise RecipeError(faults)


def set_gradients(supernet: Supernet, gradients: list[Tensor | None]) -> None:
    """Give the logits these gradients; zero where there is none."""
    for alpha, gradient in zip(supernet.alphas.values(), gradients, strict=True):
        alpha.grad = torch.zeros_like(alpha) if gradient is None else gradient.detach().clone()
