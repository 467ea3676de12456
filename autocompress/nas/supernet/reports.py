"""Settings of a search by gradient, and what one epoch of it gave."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autocompress.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How the weights of a supernet are trained: SGD with Nesterov momentum and half a cosine.

    Args:
        epochs: passes over the training split, warm-up included.
        warmup_epochs: epochs at the start in which only weights are trained.
        batch_size: samples per step, of weights and of the architecture alike.
        lr: learning rate at the start.
        min_lr: learning rate at the end.
        momentum: of SGD.
        weight_decay: on all weights.
        clip_norm: largest norm of the gradient; not clipped when absent.

    Raises:
        RecipeError: values out of range, all at once.
    """

    epochs: int
    warmup_epochs: int = 0
    batch_size: int = 64
    lr: float = 0.025
    min_lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip_norm: float | None = 5.0

    def __post_init__(self) -> None:
        rules = (
            ("epochs", "must be >= 1", self.epochs >= 1),
            ("warmup_epochs", "must be in [0, epochs)", 0 <= self.warmup_epochs < max(self.epochs, 1)),
            ("batch_size", "must be >= 2", self.batch_size >= 2),
            ("lr", "must be > 0 and finite", 0 < self.lr < math.inf),
            ("min_lr", "must be in [0, lr]", 0 <= self.min_lr <= self.lr),
            ("momentum", "must be in [0, 1)", 0 <= self.momentum < 1),
            ("weight_decay", "must be >= 0 and finite", 0 <= self.weight_decay < math.inf),
            ("clip_norm", "must be > 0, or absent", self.clip_norm is None or self.clip_norm > 0),
        )
        faults = [f"{name} {rule}, got {getattr(self, name)}" for name, rule, holds in rules if not holds]
        if faults:
            raise RecipeError(faults)

    def learning_rate(self, progress: float) -> float:
        """The rate when that share of the steps is done (Loshchilov and Hutter, arXiv 1608.03983, eq. 5)."""
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True)
class SearchEpoch:
    """Figures of one epoch of a search.

    Args:
        epoch: counted from 0.
        loss: mean loss of the weights' steps in nats.
        accuracy: share of right answers in the weights' steps, in [0, 1].
        search_loss: mean loss of the architecture's steps, cost included; None in the warm-up.
        arch: the member derived after the epoch.
        entropy: of the distributions over operations, mean over the decisions, as a share of its largest.
        num_skips: skip connections in the derived cell, reduction cells apart.
        expected_cost: of the distribution after the epoch, in the metric's unit; None without a cost.
        lr: of the last step of the weights.
        seconds: wall time.
        holdout_loss: mean loss on the hold-out after the epoch, in nats; None in the warm-up and without one.
    """

    epoch: int
    loss: float
    accuracy: float
    search_loss: float | None
    arch: dict[str, str]
    entropy: float
    num_skips: int
    expected_cost: float | None
    lr: float
    seconds: float
    holdout_loss: float | None = None
