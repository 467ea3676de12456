"""Training a weight-sharing supernet: the largest path, the smallest and some between in every step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.core import Plan
from autocompress.core.errors import DivergenceError, RecipeError
from autocompress.nas.elastic import ElasticSupernet
from autocompress.training import (
    Data,
    EpochReport,
    TrainSettings,
    batches,
    distillation_loss,
    evaluate,
    recalibrate_batchnorm,
    subset,
)
from autocompress.training.batches import derived_seed, num_batches
from autocompress.training.checkpoint import Checkpoint, identity_of
from autocompress.training.evaluate import device_of, kept_modes, logits_of
from autocompress.training.loop import learning_rate, seeded, sgd

_log = logging.getLogger(__name__)
_NUM_CALIBRATION = 512  # training images for BatchNorm before the largest path is scored


def fit_elastic(
    supernet: ElasticSupernet,
    data: Data,
    settings: TrainSettings,
    *,
    seed: int,
    num_random: int = 2,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> tuple[EpochReport, ...]:
    """Trains all members of a supernet together, in place, on the device it lies on.

    Every step adds the gradients of the largest path, the smallest, and ``num_random`` drawn uniformly (the
    sandwich rule). The largest learns from the labels. Where ``settings.distill_weight`` is above 0, the
    others learn from its outputs in the same step (in-place distillation), and from the labels with the rest.

    Orders, augmentation and paths follow from (seed, epoch) alone. With a checkpoint, a call that was cut
    short and is repeated goes on after its last finished epoch and ends, on the CPU with as many threads,
    with the very bits of a call that was not.

    Yu and Huang, "Universally Slimmable Networks", arXiv 1903.05134, sections 3.2 and 3.3; Yu et al.,
    "BigNAS", arXiv 2003.11142, section 3.1, for kernels and depth beside widths. Differs from "Once-for-All"
    (arXiv 1908.09791) in one stage of training instead of progressive shrinking: channels need not be sorted
    by importance, since the first ones are trained to be the important ones.

    Args:
        supernet: trained in place; its path afterwards is the largest.
        data: trained on ``train``; ``search`` scores the largest path after every epoch.
        settings: how to train; a ``distill_weight`` of 1 is BigNAS', its temperature there is 1.
        seed: of data order, augmentation and paths.
        num_random: paths drawn per step.
        checkpoint: file written after every epoch; continued from when it exists.
        on_epoch: called after every epoch, once its checkpoint is on disk.

    Returns:
        One report per epoch: loss and accuracies of the largest path.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another training.
        DataError: the data does not fit the network.
        DivergenceError: a loss is not finite.
        RecipeError: a negative number of paths.
        RunDirectoryError: the checkpoint cannot be written; the previous one is intact.
    """
    if num_random < 0:
        raise RecipeError(f"num_random must be >= 0, got {num_random}")
    optimizer = sgd(supernet, settings)
    reports: tuple[EpochReport, ...] = ()
    saved = None
    if checkpoint is not None:
        identity = identity_of(supernet, data, settings=settings, seed=seed, teacher=None)
        saved = Checkpoint(checkpoint, identity | {"space": repr(supernet.joint), "num_random": num_random})
        reports = saved.restore(supernet, optimizer)
    run = _Run(supernet, optimizer, settings, num_random, seed)
    with kept_modes(supernet):
        for epoch in range(len(reports), settings.epochs):
            report = run.epoch(data, epoch)
            reports = (*reports, report)
            _log.info("epoch %d: loss %.4f, search %.4f", epoch, report.loss, report.search_accuracy)
            if saved is not None:
                saved.write(supernet, optimizer, reports)
            if on_epoch is not None:
                on_epoch(report)
    supernet.use(supernet.joint.largest)
    return reports


@dataclass(frozen=True)
class _Run:
    supernet: ElasticSupernet
    optimizer: torch.optim.SGD
    settings: TrainSettings
    num_random: int
    seed: int

    def epoch(self, data: Data, epoch: int) -> EpochReport:
        """One pass over the training split, then the score of the largest path on the search split."""
        start, settings, supernet = time.perf_counter(), self.settings, self.supernet
        device = device_of(supernet)
        num_steps = num_batches(len(data.train), settings.batch_size)
        rng = np.random.default_rng(derived_seed(self.seed, epoch, 6))
        total, num_right, num_seen, lr = 0.0, 0, 0, 0.0
        supernet.train()
        with seeded(derived_seed(self.seed, epoch, 7), device):
            stream = batches(data.train, settings.batch_size, seed=self.seed, epoch=epoch)
            for step, (x, y) in enumerate(stream):
                lr = learning_rate(settings, epoch * num_steps + step, num_steps)
                loss, right = self._step(x.to(device), y, lr, rng)
                if not math.isfinite(loss):
                    raise DivergenceError(
                        f"the loss is {loss} in epoch {epoch}, step {step}, at learning rate {lr:.3g}; "
                        "lower lr, add warmup_epochs or set clip_norm"
                    )
                total, num_right, num_seen = total + loss * len(y), num_right + right, num_seen + len(y)
        accuracy = self._search_accuracy(data)
        seconds = time.perf_counter() - start
        return EpochReport(epoch, total / num_seen, num_right / num_seen, accuracy, seconds, lr)

    def _step(self, x: Tensor, y: Tensor, lr: float, rng: np.random.Generator) -> tuple[float, int]:
        """Loss and number of right answers of the largest path; NaN when any path's loss is not finite."""
        supernet, settings, labels = self.supernet, self.settings, y.to(x.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        supernet.use(supernet.joint.largest)
        logits = self._logits(x, y)
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        teacher, finite = logits.detach(), bool(torch.isfinite(loss))
        for plan in [supernet.joint.smallest, *self._drawn(rng)]:
            supernet.use(plan)
            lesson = self._lesson(self._logits(x, y), teacher, labels)
            lesson.backward()  # type: ignore[no-untyped-call]
            finite = finite and bool(torch.isfinite(lesson))
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(supernet.parameters(), settings.clip_norm)
        self.optimizer.step()
        right = int((teacher.argmax(dim=1) == labels).sum())
        return (float(loss.detach()) if finite else math.nan), right

    def _drawn(self, rng: np.random.Generator) -> list[Plan]:
        return [self.supernet.joint.random(rng) for _ in range(self.num_random)]

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.settings.mixed_precision else torch.float32
        return logits_of(self.supernet, x, y, dtype=dtype).float()

    def _lesson(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The loss of a path that is not the largest."""
        weight, settings = self.settings.distill_weight, self.settings
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        if weight > 0:
            soft = distillation_loss(logits, teacher, temperature=settings.distill_temperature)
            loss = (1 - weight) * loss + weight * soft
        return loss

    def _search_accuracy(self, data: Data) -> float:
        """Of the largest path, with BatchNorm statistics of its own."""
        self.supernet.use(self.supernet.joint.largest)
        number = min(_NUM_CALIBRATION, len(data.train))
        images = subset(data.train, np.arange(number) * len(data.train) // number, augmented=False)
        recalibrate_batchnorm(self.supernet, (x for x, _ in batches(images, self.settings.batch_size)))
        return evaluate(self.supernet, data.search).accuracy
