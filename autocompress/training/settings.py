"""How to train, and what one epoch of it gave."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autocompress.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train with SGD, Nesterov momentum and a cosine schedule to zero.

    Args:
        epochs: passes over the training split; 0 leaves the network as it is.
        batch_size: samples per step.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: on weights; what holds one value per channel (biases, BatchNorm, thresholds) has none.
        label_smoothing: share of the target spread over all classes.
        warmup_epochs: epochs in which the learning rate rises linearly.
        mixed_precision: forward passes in bfloat16 with channels last.
        distill_weight: share of the teacher's term in the loss, 0 for none.
        distill_temperature: softens both distributions.
        clip_norm: largest norm of the gradient; not clipped when absent.

    Raises:
        RecipeError: values out of range, all at once.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_epochs: int = 0
    mixed_precision: bool = False
    distill_weight: float = 0.0
    distill_temperature: float = 4.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        rules = (
            ("epochs", "must be >= 0", self.epochs >= 0),
            ("batch_size", "must be >= 1", self.batch_size >= 1),
            ("lr", "must be > 0 and finite", 0 < self.lr < math.inf),
            ("momentum", "must be in [0, 1)", 0 <= self.momentum < 1),
            ("weight_decay", "must be >= 0 and finite", 0 <= self.weight_decay < math.inf),
            ("label_smoothing", "must be in [0, 1)", 0 <= self.label_smoothing < 1),
            ("warmup_epochs", "must be in [0, epochs]", 0 <= self.warmup_epochs <= self.epochs),
            ("distill_weight", "must be in [0, 1]", 0 <= self.distill_weight <= 1),
            ("distill_temperature", "must be > 0 and finite", 0 < self.distill_temperature < math.inf),
            ("clip_norm", "must be > 0, or absent", self.clip_norm is None or self.clip_norm > 0),
        )
        faults = [f"{name} {rule}, got {getattr(self, name)}" for name, rule, holds in rules if not holds]
        if faults:
            raise RecipeError(faults)


@dataclass(frozen=True, slots=True)
class EpochReport:
    """Figures of one epoch.

    Args:
        epoch: counted from 0.
        loss: mean training loss in nats, distillation included.
        train_accuracy: share of right answers while training, on augmented samples, in [0, 1].
        search_accuracy: share of right answers on the search split after the epoch, in [0, 1].
        seconds: wall time, evaluation included.
        lr: learning rate of the last step.
    """

    epoch: int
    loss: float
    train_accuracy: float
    search_accuracy: float
    seconds: float
    lr: float
