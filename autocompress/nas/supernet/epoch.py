"""One epoch of a search by gradient: steps of the weights and of the distribution in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from autocompress.core.errors import DivergenceError
from autocompress.nas.supernet.checkpoint import SearchState
from autocompress.nas.supernet.holdout import HoldOut
from autocompress.nas.supernet.network import SkipDropout
from autocompress.nas.supernet.reports import SearchEpoch
from autocompress.nas.supernet.step import Batch, Step
from autocompress.training import Data, batches
from autocompress.training.batches import derived_seed, num_batches

if TYPE_CHECKING:
    from autocompress.nas.supernet.search import SupernetSearch


@dataclass(frozen=True)
class EpochRun:
    """Does the epochs of one search.

    Args:
        search: its settings.
        state: what every epoch changes.
        data: train and search splits are read.
        holdout: measured after every epoch that moved the logits.
        seed: of everything drawn.
        device: where the supernet runs.
    """

    search: SupernetSearch
    state: SearchState
    data: Data
    holdout: HoldOut | None
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
                        raise DivergenceError(diverged(f"the search loss is {losses[-1]}", epoch, lr))
                method.weight_gates(supernet, generator, progress)
                sums.add(*self._weight_step(batch), len(y))
                if not math.isfinite(sums.loss):
                    raise DivergenceError(diverged(f"the loss is {sums.loss}", epoch, lr))
        holdout_loss = self._holdout_loss(epoch) if epoch >= settings.warmup_epochs else None
        report = self._report(epoch, sums, losses, lr, time.perf_counter() - start)
        return replace(report, holdout_loss=holdout_loss)

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

    def _holdout_loss(self, epoch: int) -> float | None:
        """Mean loss on the hold-out, computed as in a step of the weights but without dropout."""
        if self.holdout is None:
            return None
        supernet, settings = self.state.supernet, self.search.settings
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch, 6))
        total = 0.0
        supernet.eval()
        with torch.no_grad():
            for x, y in batches(self.holdout.samples, settings.batch_size):
                self.search.method.weight_gates(supernet, generator, self._progress(epoch, 1.0))
                logits = supernet(x.to(self.device))
                total += float(F.cross_entropy(logits, y.to(self.device), reduction="sum"))
        if not math.isfinite(total):
            lr = self.state.weight_optimizer.param_groups[0]["lr"]
            raise DivergenceError(diverged(f"the loss on the hold-out is {total}", epoch, lr))
        return total / len(self.holdout.samples)

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


def diverged(what: str, epoch: int, lr: float) -> str:
    """The message of a search whose numbers are not finite."""
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
