"""The loop that trains a supernet's weights and its distribution in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autocompress.core.errors import DataError, DivergenceError
from autocompress.nas.spaces import Space
from autocompress.nas.supernet.checkpoint import SearchCheckpoint, SearchState
from autocompress.nas.supernet.epoch import EpochRun, diverged
from autocompress.nas.supernet.expected_cost import CostTerm
from autocompress.nas.supernet.holdout import HoldOut
from autocompress.nas.supernet.network import Supernet
from autocompress.nas.supernet.reports import SearchEpoch, SearchSettings
from autocompress.nas.supernet.step import Method
from autocompress.nas.supernet.task import CLASSIFICATION, Task
from autocompress.training import Data

_log = logging.getLogger(__name__)
# What may differ between a search that diverged and the one that goes on from its checkpoint.
_MAY_CHANGE = ("lr", "min_lr", "clip_norm")


@dataclass(frozen=True)
class SupernetResult:
    """Outcome of a search by gradient.

    Args:
        arch: the member found.
        probabilities: decision -> distribution over its operations at the end, shape (operations,).
        reports: one per epoch.
        supernet: with its trained weights.
        stopped_early: whether skip connections or the hold-out ended the search.
        epoch: the one after which the member found was derived; the last, or one before when either of them
            chose it.
    """

    arch: dict[str, str]
    probabilities: dict[str, NDArray[np.float64]]
    reports: tuple[SearchEpoch, ...]
    supernet: Supernet
    stopped_early: bool
    epoch: int


@dataclass(frozen=True)
class SupernetSearch:
    """Trains a supernet, its weights on the training split and its distribution on the search split.

    The test split is never read. Everything drawn follows from (seed, epoch), so that a call that was cut
    short and is repeated with its checkpoint goes on after its last finished epoch and ends, on the CPU with
    as many threads, with the very bits of a call that was not.

    Args:
        method: how the distribution is learnt.
        settings: how the weights are trained.
        cost: a machine's part of the loss.
        task: what the networks are asked.

    Example:
        >>> from autocompress.nas.supernet import GDAS
        >>> search = SupernetSearch(GDAS(), SearchSettings(epochs=30, warmup_epochs=2))
    """

    method: Method
    settings: SearchSettings
    cost: CostTerm | None = None
    task: Task = CLASSIFICATION

    def __call__(
        self,
        space: Space,
        data: Data,
        *,
        seed: int,
        holdout: HoldOut | None = None,
        checkpoint: Path | None = None,
        on_epoch: Callable[[SearchEpoch], None] | None = None,
        device: str = "cpu",
    ) -> SupernetResult:
        """Search a space on some data.

        Args:
            space: of networks that fit the data.
            data: half of it in the search split is usual.
            seed: of weights, data order and everything drawn.
            holdout: chooses the epoch whose member is kept, and ends the search; absent, the last one is.
            checkpoint: file written after every epoch; continued from when it exists. A search that diverged
                may be continued with other learning rates or clipping.
            on_epoch: called after every epoch, once its checkpoint is on disk.
            device: where the supernet runs.

        Raises:
            CheckpointError: the checkpoint is damaged or of another search.
            DataError: the data does not fit the space, or a split is too small.
            DivergenceError: the loss or a weight is not finite; the checkpoint holds the last epoch before.
        """
        self._check_data(space, data)
        supernet = Supernet(space, seed=seed, affine=self.method.affine, task=self.task)
        supernet.network.to(device)
        state = SearchState(supernet, self._sgd(supernet), self.method.alpha.optimizer(supernet))
        reports: tuple[SearchEpoch, ...] = ()
        saved = None
        if checkpoint is not None:
            saved = SearchCheckpoint(checkpoint, self._identity(space, data, seed, holdout))
            reports = saved.restore(state)
        run = EpochRun(self, state, data, holdout, seed, torch.device(device))
        while len(reports) < self.settings.epochs and not self._is_over(reports, holdout):
            reports = (*reports, run.epoch(len(reports)))
            if not state.all_finite():
                raise DivergenceError(diverged("a weight is not finite", len(reports) - 1, reports[-1].lr))
            _log.info("epoch %d: loss %.4f, %s", reports[-1].epoch, reports[-1].loss, reports[-1].arch)
            if saved is not None:
                saved.write(state, reports)
            if on_epoch is not None:
                on_epoch(reports[-1])
        kept = self._kept(reports, holdout)
        over = self._is_over(reports, holdout)
        return SupernetResult(
            dict(kept.arch), supernet.probability_table(), reports, supernet, over, kept.epoch
        )

    def _is_over(self, reports: tuple[SearchEpoch, ...], holdout: HoldOut | None) -> bool:
        """Whether skip connections or the hold-out end the search after these epochs."""
        risen = holdout is not None and holdout.is_over([report.holdout_loss for report in reports])
        return risen or self._collapsed(reports)

    def _kept(self, reports: tuple[SearchEpoch, ...], holdout: HoldOut | None) -> SearchEpoch:
        """The epoch whose member is the result."""
        left = reports[:-1] if self._collapsed(reports) else reports
        return left[-1] if holdout is None else left[holdout.best([report.holdout_loss for report in left])]

    def _collapsed(self, reports: tuple[SearchEpoch, ...]) -> bool:
        """Whether the last epoch derived too many skip connections, and the one before it did not.

        Random logits can derive as many, so an epoch counts only where the logits were moved before.
        """
        limit = self.method.max_skips
        if limit is None or len(reports) < self.settings.warmup_epochs + 2:
            return False
        return reports[-2].num_skips < limit <= reports[-1].num_skips

    def _sgd(self, supernet: Supernet) -> torch.optim.SGD:
        settings = self.settings
        optimizer = torch.optim.SGD(
            supernet.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        for parameter in supernet.parameters():
            # Made here, not by the first step, so that a resumed search has buffers of the same layout.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def _check_data(self, space: Space, data: Data) -> None:
        faults = self.task.faults(space, data)
        faults += [
            f"the {name} split of {data.name!r} needs at least 2 samples"
            for name in ("train", "search")
            if len(getattr(data, name)) < 2
        ]
        if faults:
            raise DataError("; ".join(faults) + ". Build the space for this data, or load it otherwise.")

    def _identity(self, space: Space, data: Data, seed: int, holdout: HoldOut | None) -> dict[str, Any]:
        settings = {
            name: getattr(self.settings, name)
            for name in SearchSettings.__dataclass_fields__
            if name not in _MAY_CHANGE
        }
        cost = None
        if self.cost is not None:
            tables = {name: table.tolist() for name, table in self.cost.costs.table.items()}
            cost = [self.cost.form, self.cost.reference, self.cost.weight, self.cost.scale, tables]
        return {
            "space": repr(space),
            "method": repr(self.method),
            "settings": settings,
            "cost": cost,
            "task": repr(self.task),
            "holdout": None if holdout is None else [len(holdout.samples), holdout.patience],
            "seed": seed,
            "data": [data.name, len(data.train), len(data.search), list(data.input_shape)],
        }
