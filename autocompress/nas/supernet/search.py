"""The loop that trains a supernet's weights and its distribution in turn."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from autocompress.core.errors import DataError, DivergenceError
from autocompress.nas.spaces import Space
from autocompress.nas.supernet.checkpoint import SearchCheckpoint, SearchState
from autocompress.nas.supernet.expected_cost import CostTerm
from autocompress.nas.supernet.network import SkipDropout, Supernet
from autocompress.nas.supernet.reports import SearchEpoch, SearchSettings
from autocompress.nas.supernet.step import Batch, Method, Step
from autocompress.training import Data, batches
from autocompress.training.batches import derived_seed, num_batches

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
        stopped_early: whether skip connections ended the search.
    """

    arch: dict[str, str]
    probabilities: dict[str, NDArray[np.float64]]
    reports: tuple[SearchEpoch, ...]
    supernet: Supernet
    stopped_early: bool


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

    Example:
        >>> from autocompress.nas.supernet import GDAS
        >>> search = SupernetSearch(GDAS(), SearchSettings(epochs=30, warmup_epochs=2))
    """

    method: Method
    settings: SearchSettings
    cost: CostTerm | None = None

    def __call__(
        self,
        space: Space,
        data: Data,
        *,
        seed: int,
        checkpoint: Path | None = None,
        on_epoch: Callable[[SearchEpoch], None] | None = None,
        device: str = "cpu",
    ) -> SupernetResult:
        """Search a space on some data.

        Args:
            space: of networks that fit the data.
            data: half of it in the search split is usual.
            seed: of weights, data order and everything drawn.
            checkpoint: file written after every epoch; continued from when it exists. A search that diverged
                may be continued with other learning rates or clipping.
            on_epoch: called after every epoch, once its checkpoint is on disk.
            device: where the supernet runs.

        Raises:
            CheckpointError: the checkpoint is damaged or of another search.
            DataError: the data does not fit the space, or a split is too small.
            DivergenceError: the loss or a weight is not finite; the checkpoint holds the last epoch before.
        """
        _check_data(space, data)
        supernet = Supernet(space, seed=seed, affine=self.method.affine)
        supernet.network.to(device)
        state = SearchState(supernet, self._sgd(supernet), self.method.alpha.optimizer(supernet))
        reports: tuple[SearchEpoch, ...] = ()
        saved = None
        if checkpoint is not None:
            saved = SearchCheckpoint(checkpoint, self._identity(space, data, seed))
            reports = saved.restore(state)
        run = _Run(self, state, data, seed, torch.device(device))
        while len(reports) < self.settings.epochs and not self._collapsed(reports):
            reports = (*reports, run.epoch(len(reports)))
            if not state.all_finite():
                raise DivergenceError(_diverged("a weight is not finite", len(reports) - 1, reports[-1].lr))
            _log.info("epoch %d: loss %.4f, %s", reports[-1].epoch, reports[-1].loss, reports[-1].arch)
            if saved is not None:
                saved.write(state, reports)
            if on_epoch is not None:
                on_epoch(reports[-1])
        collapsed = self._collapsed(reports)
        arch = reports[-2].arch if collapsed else reports[-1].arch
        return SupernetResult(dict(arch), supernet.probability_table(), reports, supernet, collapsed)

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

    def _identity(self, space: Space, data: Data, seed: int) -> dict[str, Any]:
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
            "seed": seed,
            "data": [data.name, len(data.train), len(data.search), list(data.input_shape)],
        }


@dataclass(frozen=True)
class _Run:
    search: SupernetSearch
    state: SearchState
    data: Data
    seed: int
    device: torch.device

    def epoch(self, epoch: int) -> SearchEpoch:
        """One pass over the training split, with steps of the architecture in between."""
        start = time.perf_counter()
        search, supernet = self.search, self.state.supernet
        settings, method = search.settings, search.method
        num_steps = num_batches(len(self.data.train), settings.batch_size)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch, 3))
        searching, losses, sums, lr = self._search_batches(epoch), list[float](), _Sums(), settings.lr
        supernet.train()
        self._drop_skips(method.skip_dropout * (1 - epoch / settings.epochs))
        with _seeded(derived_seed(self.seed, epoch, 4), self.device):
            stream = batches(self.data.train, settings.batch_size, seed=self.seed, epoch=epoch)
            for index, (x, y) in enumerate(stream):
                batch = (x.to(self.device), y.to(self.device))
                lr = settings.learning_rate((epoch + index / num_steps) / settings.epochs)
                self.state.weight_optimizer.param_groups[0]["lr"] = lr
                progress = self._progress(epoch, index / num_steps)
                if epoch >= settings.warmup_epochs and index % method.every == 0:
                    step = Step(
                        batch,
                        next(searching),
                        self.state.alpha_optimizer,
                        self.state.weight_optimizer,
                        generator,
                        progress,
                        search.cost,
                    )
                    losses.append(method.architecture_step(supernet, step))
                    if not math.isfinite(losses[-1]):
                        raise DivergenceError(_diverged(f"the search loss is {losses[-1]}", epoch, lr))
                method.weight_gates(supernet, generator, progress)
                sums.add(*self._weight_step(batch), len(y))
                if not math.isfinite(sums.loss):
                    raise DivergenceError(_diverged(f"the loss is {sums.loss}", epoch, lr))
        return self._report(epoch, sums, losses, lr, time.perf_counter() - start)

    def _progress(self, epoch: int, share: float) -> float:
        """Share of the search, warm-up apart, that is done."""
        settings = self.search.settings
        done = epoch + share - settings.warmup_epochs
        return max(0.0, done / (settings.epochs - settings.warmup_epochs))

    def _search_batches(self, epoch: int) -> Iterator[Batch]:
        """Batches of the search split without end, in an order of this epoch's own."""
        for number in count():
            seed = derived_seed(self.seed, epoch, 5)
            size = self.search.settings.batch_size
            for x, y in batches(self.data.search, size, seed=seed, epoch=number):
                yield x.to(self.device), y.to(self.device)

    def _weight_step(self, batch: Batch) -> tuple[float, int]:
        optimizer, clip = self.state.weight_optimizer, self.search.settings.clip_norm
        logits = self.state.supernet(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(self.state.supernet.parameters(), clip)
        optimizer.step()
        return float(loss.detach()), int((logits.argmax(1) == batch[1]).sum())

    def _drop_skips(self, rate: float) -> None:
        for module in self.state.supernet.modules():
            if isinstance(module, SkipDropout):
                module.rate = rate

    def _report(self, epoch: int, sums: _Sums, losses: list[float], lr: float, seconds: float) -> SearchEpoch:
        supernet, cost = self.state.supernet, self.search.cost
        arch = supernet.derive()
        return SearchEpoch(
            epoch=epoch,
            loss=sums.loss / sums.num_seen,
            accuracy=sums.num_right / sums.num_seen,
            search_loss=sum(losses) / len(losses) if losses else None,
            arch=arch,
            entropy=_entropy(list(supernet.probability_table().values())),
            num_skips=sum(op == "skip_connect" for d, op in arch.items() if not d.startswith("reduce.")),
            expected_cost=None if cost is None else float(cost.expected(supernet.probabilities()).detach()),
            lr=lr,
            seconds=seconds,
        )


@dataclass
class _Sums:
    loss: float = 0.0
    num_right: int = 0
    num_seen: int = 0

    def add(self, loss: float, num_right: int, num: int) -> None:
        self.loss += loss * num
        self.num_right += num_right
        self.num_seen += num


def _entropy(tables: list[NDArray[np.float64]]) -> float:
    """Mean over the distributions of their entropy as a share of the largest it could be."""
    shares = [
        -float((p * np.log(np.maximum(p, 1e-300))).sum()) / math.log(len(p)) for p in tables if len(p) > 1
    ]
    return sum(shares) / len(shares) if shares else 0.0


def _check_data(space: Space, data: Data) -> None:
    faults = []
    if data.input_shape != space.input_shape:
        faults.append(f"images of {data.name!r} are {data.input_shape}, the space is for {space.input_shape}")
    if data.num_classes != space.num_classes:
        faults.append(f"{data.name!r} has {data.num_classes} classes, the space {space.num_classes}")
    for name in ("train", "search"):
        if len(getattr(data, name)) < 2:
            faults.append(f"the {name} split of {data.name!r} needs at least 2 samples")
    if faults:
        raise DataError("; ".join(faults) + ". Build the space for this data, or load it otherwise.")


def _diverged(what: str, epoch: int, lr: float) -> str:
    return (
        f"the search diverged: {what} in epoch {epoch}, at learning rate {lr:.3g}. Lower lr or set clip_norm "
        "and repeat the call: it goes on from the checkpoint of the epoch before, where there is one"
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators at a seed, for dropout; set back on leaving."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
