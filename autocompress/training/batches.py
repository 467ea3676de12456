"""Batches in an order that follows from (seed, epoch) alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from autocompress.core.errors import AutocompressError, DataError, RecipeError
from autocompress.training.data import Samples


def derived_seed(*parts: int) -> int:
    """One seed out of several numbers, different for each sequence of them.

    Raises:
        RecipeError: a number is negative.
    """
    if min(parts) < 0:
        raise RecipeError(f"seed and epoch must be >= 0, got {parts}")
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def num_batches(num_samples: int, batch_size: int) -> int:
    """How many batches a training epoch has.

    A last batch of a single sample is left out: BatchNorm cannot take a variance over it.
    """
    whole, rest = divmod(num_samples, batch_size)
    return whole + (rest > 1 or whole == 0)


def batches(
    dataset: Samples, batch_size: int, *, seed: int | None = None, epoch: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images (B, C, H, W) and labels (B,).

    With a seed: shuffled and augmented, a function of (seed, epoch), for training; see :func:`num_batches`.
    Without: all samples in order, not augmented.

    Args:
        dataset: served through its ``batch(indices, generator)`` when it has one, else sample by sample.
            Random transforms may draw from the global generators of torch, NumPy and Python: these are
            seeded while a batch is read and then set back.
        batch_size: samples per batch; the last may have fewer.
        seed: shuffles.
        epoch: varies the order and the augmentation.

    Raises:
        DataError: a sample cannot be read; the message gives its index.
    """
    num = len(dataset)
    if seed is None:
        yield from _read(dataset, _chunks(torch.arange(num), batch_size), None)
        return
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    parts = _chunks(torch.randperm(num, generator=generator), batch_size)
    yield from _read(dataset, parts[: num_batches(num, batch_size)], generator)


def spread(dataset: Samples, batch_size: int, *, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As :func:`batches` without a seed, but only ``limit`` samples, evenly spaced over the data set.

    A data set sorted by class is then sampled in all of its classes.
    """
    indices = torch.arange(limit) * len(dataset) // limit
    yield from _read(dataset, _chunks(indices, batch_size), None)


def training_images(dataset: Samples, count: int, *, batch_size: int = 128, seed: int) -> list[Tensor]:
    """At least ``count`` images in batches as training draws them, shuffled and augmented; all if fewer.

    BatchNorm's statistics in a trained network are those of such images; averages over images without crops
    and flips are others.
    """
    stream = batches(dataset, batch_size, seed=seed)
    return [images for images, _ in itertools.islice(stream, -(-count // batch_size))]


def _chunks(indices: Tensor, size: int) -> list[Tensor]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _read(
    dataset: Samples, parts: list[Tensor], generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    whole = getattr(dataset, "batch", None)
    for part in parts:
        if whole is not None:
            x, y = whole(part, generator)
        else:
            seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
            with _global_generators(seed):
                x, y = _collate([_sample(dataset, int(i)) for i in part], part)
        yield x, y


def _sample(dataset: Samples, index: int) -> Any:
    try:
        return dataset[index]
    except AutocompressError:
        raise
    except Exception as fault:  # a data set may raise anything; which sample it was is what helps
        raise DataError(
            f"sample {index} of {type(dataset).__name__} cannot be read: {type(fault).__name__}: {fault}; "
            "repair or remove it"
        ) from fault


def _collate(samples: list[Any], part: Tensor) -> tuple[Tensor, Tensor]:
    try:
        x, y = default_collate(samples)
        return x, y.long()
    except (RuntimeError, TypeError, ValueError, AttributeError) as fault:
        raise DataError(
            f"samples {part.tolist()[:8]}... do not form a batch: {str(fault).splitlines()[0]}; "
            "all must be (float tensor of one shape, integer label)"
        ) from fault


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
