"""How good a network is, and BatchNorm statistics that fit its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.core.errors import DataError, DivergenceError, RecipeError, UnsupportedModelError
from autocompress.training.batches import batches, spread
from autocompress.training.data import Samples


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one evaluation.

    Args:
        accuracy: share of right top-1 answers, in [0, 1].
        loss: mean cross-entropy in nats; a row that is not finite counts log(number of classes), no answer.
        num_samples: how many samples were evaluated.
    """

    accuracy: float
    loss: float
    num_samples: int


def evaluate(
    model: nn.Module,
    dataset: Samples,
    *,
    batch_size: int = 500,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Top-1 accuracy and loss of a classifier in evaluation mode.

    Args:
        model: maps (N, C, H, W) to logits (N, num_classes); its weights and modes are left as they were.
        dataset: samples, never augmented.
        batch_size: samples per forward pass.
        limit: number of samples to use, evenly spaced over the data set; all when absent.
        dtype: ``torch.bfloat16`` runs under autocast with channels last.

    Raises:
        DataError: the data set is empty or does not fit the network.
        DivergenceError: no logit of a batch is finite.
        RecipeError: batch_size or limit is below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} must be >= 1, got {value}")
    if len(dataset) == 0:
        raise DataError("cannot evaluate on an empty data set")
    device = device_of(model)
    num_samples = num_right = 0
    loss = 0.0
    stream = (
        batches(dataset, batch_size)
        if limit is None or limit >= len(dataset)
        else spread(dataset, batch_size, limit=limit)
    )
    with kept_modes(model), torch.inference_mode():
        model.eval()
        for x, y in stream:
            logits = logits_of(model, x.to(device), y, dtype=dtype).float().cpu()
            finite = logits.isfinite().all(dim=1)
            if not logits.isfinite().any():
                raise DivergenceError(
                    f"no logit of samples {num_samples} to {num_samples + len(y) - 1} is finite; the network "
                    "has diverged: reload its weights, or compress it less"
                )
            num_right += int((finite & (logits.argmax(dim=1) == y)).sum())
            loss += float(F.cross_entropy(logits[finite], y[finite], reduction="sum"))
            loss += float((~finite).sum()) * math.log(logits.shape[1])
            num_samples += len(y)
    return Scores(num_right / num_samples, loss / num_samples, num_samples)


def logits_of(model: nn.Module, x: Tensor, y: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's logits (N, num_classes) for a batch, with a clear word where the two do not fit.

    Args:
        model: the network.
        x: (N, C, H, W) on the model's device.
        y: (N,) labels on the CPU.
        dtype: below 32 bits, autocast and channels last.

    Raises:
        DataError: sizes, channels or labels do not fit the network.
        UnsupportedModelError: the output is not a tensor of shape (N, num_classes).
    """
    low = dtype != torch.float32
    if low and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    try:
        with torch.autocast(x.device.type, dtype=dtype, enabled=low):
            logits = model(x)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError) as fault:
        raise DataError(
            f"the network cannot take input of shape {tuple(x.shape)}: {' '.join(str(fault).split())[:300]}; "
            "choose data of the size and channels it was built for"
        ) from fault
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"the network must return logits of shape (N, num_classes), got {got}; "
            "wrap it in a module that does"
        )
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise DataError(
            f"labels {int(y.min())} to {int(y.max())} do not fit a network of {logits.shape[1]} outputs; "
            "build it with the number of classes of the data"
        )
    return logits


def recalibrate_batchnorm(
    model: nn.Module, inputs: Iterable[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Replaces BatchNorm's running statistics by averages over some inputs, in place.

    Li et al., EagleEye, arXiv 2007.02491, section 3.3 (adaptive BatchNorm). Differs from the paper, which
    keeps the running average of training, in a plain average over the batches: their order does not weigh.

    Args:
        model: the network; all but the statistics stays as it was. Nothing happens without BatchNorm.
        inputs: batches of shape (N, C, H, W), of one size for equal weights.
        dtype: ``torch.bfloat16`` runs under autocast with channels last; statistics stay in 32 bits.

    Raises:
        DataError: there are no inputs.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return
    stream = iter(inputs)
    first = next(stream, None)
    if first is None:
        raise DataError("BatchNorm recalibration needs at least one batch of inputs, got none")
    device, low = device_of(model), dtype != torch.float32

    def run(x: Tensor) -> None:
        if low and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=dtype, enabled=low):
            model(x.to(device))

    momenta = [layer.momentum for layer in layers]
    with kept_modes(model), torch.no_grad():
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        try:
            run(first)
            for x in stream:
                run(x)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Sets every module's training flag back on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU when it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
