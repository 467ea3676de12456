"""Training that gives the same weights whether or not it was interrupted."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.core.errors import DataError, DivergenceError, RecipeError
from autocompress.training.batches import batches, derived_seed, num_batches
from autocompress.training.checkpoint import Checkpoint, identity_of
from autocompress.training.data import Data
from autocompress.training.evaluate import device_of, evaluate, kept_modes, logits_of
from autocompress.training.settings import EpochReport, TrainSettings

_log = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> tuple[EpochReport, ...]:
    """Trains a classifier in place, on the device it lies on.

    Order, augmentation and dropout follow from (seed, epoch) alone. With a checkpoint, a call that was cut
    short and is repeated goes on after its last finished epoch and ends, on the CPU with as many threads,
    with the very bits of a call that was not. The network takes its weights from the checkpoint.

    Args:
        model: maps (N, C, H, W) to logits (N, num_classes).
        data: trained on ``train``; ``search`` is scored after every epoch.
        settings: how to train.
        seed: of data order, augmentation and dropout.
        teacher: a network on the same device whose logits are distilled when ``distill_weight`` > 0.
        checkpoint: file written after every epoch; continued from when it exists.
        on_epoch: called after every epoch, once its checkpoint is on disk.

    Returns:
        One report per epoch, those before an interruption included.

    Raises:
        CheckpointError: the checkpoint is damaged, or of other settings, data, seed, teacher or network.
        DataError: the data does not fit the network.
        DivergenceError: the loss is not finite.
        RecipeError: distillation without a teacher.
        RunDirectoryError: the checkpoint cannot be written; the previous one is intact.
    """
    if settings.distill_weight > 0 and teacher is None:
        raise RecipeError("distill_weight > 0 needs a teacher; pass one or set distill_weight to 0")
    if len(data.train) == 0:
        raise DataError(f"the training split of {data.name!r} is empty")
    distilled = teacher if settings.distill_weight > 0 else None
    optimizer = sgd(model, settings)
    reports: tuple[EpochReport, ...] = ()
    saved = None
    if checkpoint is not None:
        identity = identity_of(model, data, settings=settings, seed=seed, teacher=distilled)
        saved = Checkpoint(checkpoint, identity)
        reports = saved.restore(model, optimizer)
    learner = _Learner(model, optimizer, settings, distilled)
    with kept_modes(model):
        for epoch in range(len(reports), settings.epochs):
            report = learner.epoch(data, epoch, seed)
            reports = (*reports, report)
            _log.info("epoch %d: loss %.4f, search accuracy %.4f", epoch, report.loss, report.search_accuracy)
            if saved is not None:
                saved.write(model, optimizer, reports)
            if on_epoch is not None:
                on_epoch(report)
    return reports


@dataclass(frozen=True)
class _Learner:
    model: nn.Module
    optimizer: torch.optim.SGD
    settings: TrainSettings
    teacher: nn.Module | None

    def epoch(self, data: Data, epoch: int, seed: int) -> EpochReport:
        """One pass over the training split, then the score on the search split."""
        start = time.perf_counter()
        device = device_of(self.model)
        num_steps = num_batches(len(data.train), self.settings.batch_size)
        total_loss, num_right, num_seen, lr = 0.0, 0, 0, 0.0
        self.model.train()
        with seeded(derived_seed(seed, epoch, 1), device):
            stream = batches(data.train, self.settings.batch_size, seed=seed, epoch=epoch)
            for step, (x, y) in enumerate(stream):
                lr = learning_rate(self.settings, epoch * num_steps + step, num_steps)
                loss, right = self._step(x.to(device), y, lr)
                if not math.isfinite(loss):
                    raise DivergenceError(
                        f"the loss is {loss} in epoch {epoch}, step {step}, at learning rate {lr:.3g}; "
                        "lower lr, add warmup_epochs or set clip_norm"
                    )
                total_loss, num_right, num_seen = (
                    total_loss + loss * len(y),
                    num_right + right,
                    num_seen + len(y),
                )
        search = evaluate(self.model, data.search, dtype=self._dtype)
        return EpochReport(
            epoch=epoch,
            loss=total_loss / num_seen,
            train_accuracy=num_right / num_seen,
            search_accuracy=search.accuracy,
            seconds=time.perf_counter() - start,
            lr=lr,
        )

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.mixed_precision else torch.float32

    def _step(self, x: Tensor, y: Tensor, lr: float) -> tuple[float, int]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logits = logits_of(self.model, x, y, dtype=self._dtype).float()
        labels = y.to(x.device)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        if self.teacher is not None:
            with kept_modes(self.teacher), torch.no_grad():
                self.teacher.eval()
                target = logits_of(self.teacher, x, y, dtype=self._dtype).float()
            weight = self.settings.distill_weight
            soft = distillation_loss(logits, target, temperature=self.settings.distill_temperature)
            loss = (1 - weight) * loss + weight * soft
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return float(loss.detach()), int((logits.argmax(dim=1) == labels).sum())


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch.

    Hinton et al., arXiv 1503.02531, section 2: the factor T^2 keeps the gradients' scale.

    Args:
        student: logits (N, num_classes).
        teacher: logits (N, num_classes).
        temperature: T.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """The rate of a step counted from 0: a linear rise to ``lr``, then half a cosine towards 0.

    Loshchilov and Hutter, arXiv 1608.03983, equation 5, with one period and a minimum of 0.
    """
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    total = settings.epochs * steps_per_epoch
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def sgd(model: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """The optimiser of a network's parameters, its momentum already made so that it can be restored."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if _decays(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if not _decays(p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
    )
    if settings.momentum > 0:
        # Made here, not by the first step, so that a resumed run has buffers of the same memory layout.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _decays(parameter: Tensor) -> bool:
    """Whether a parameter holds weights, not one value per channel (bias, gain, threshold)."""
    return parameter.ndim > 1 and parameter.numel() > len(parameter)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators at a seed, for dropout; set back on leaving."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
