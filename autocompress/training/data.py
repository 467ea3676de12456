"""What the rest of the package needs from a data set: three splits of normalised images with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from autocompress.core.errors import DataError, RecipeError

DEFAULT_SEARCH_SHARE = 0.1
_CHECKED_SAMPLES = 3


@runtime_checkable
class Samples(Protocol):
    """A map-style data set of (float tensor of shape (C, H, W), integer label)."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""
        ...


@dataclass(frozen=True)
class Data:
    """Three splits that share no sample.

    Args:
        name: how reports call it.
        train: what weights are trained on; may be augmented.
        search: what plans are scored on; held back from the training data, never augmented.
        test: what final figures come from.
        num_classes: labels lie in [0, num_classes).
        input_shape: (channels, height, width) of one sample.
    """

    name: str
    train: Samples
    search: Samples
    test: Samples
    num_classes: int
    input_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Augment:
    """Random crops out of a zero-padded image, and horizontal flips.

    Args:
        pad: zero pixels on each side before the crop.
        flip: whether half of the images are mirrored.
    """

    pad: int = 4
    flip: bool = True


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, served in whole batches.

    Args:
        pixels: (N, C, H, W), uint8 (divided by 255) or float32.
        labels: (N,), int64.
        mean: per channel, on the scale [0, 1] for uint8; zeros when absent.
        std: per channel; ones when absent.
        augment: how batches drawn with a generator are varied.

    Raises:
        DataError: sizes or types do not fit.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment | None = None,
    ) -> None:
        faults = []
        if pixels.ndim != 4 or pixels.dtype not in (torch.uint8, torch.float32):
            faults.append(
                f"pixels must be uint8 or float32 of shape (N, C, H, W), got {pixels.dtype} of shape "
                f"{tuple(pixels.shape)}"
            )
        if labels.shape != pixels.shape[:1] or labels.dtype != torch.int64:
            faults.append(
                f"labels must be int64, one for each of {pixels.shape[0]} images, got {labels.dtype} of "
                f"shape {tuple(labels.shape)}"
            )
        if faults:
            raise DataError("\n".join(faults))
        self.pixels, self.labels, self.augment = pixels, labels, augment
        self.mean, self.std = mean, std
        channels = pixels.shape[1]
        self._mean = per_channel("mean", mean, channels, default=0.0)
        self._std = per_channel("std", std, channels, default=1.0)

    @property
    def targets(self) -> Tensor:
        """The labels under torchvision's name."""
        return self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.batch(torch.tensor([range(len(self))[index]]), None)
        return x[0], int(y)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) and labels (B,); augmented only when a generator is given."""
        pixels = self.pixels[indices]
        if generator is not None and self.augment is not None:
            pixels = _augmented(pixels, self.augment, generator)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (x - self._mean) / self._std, self.labels[indices]

    def take(self, indices: NDArray[np.int64], *, augment: Augment | None = None) -> Images:
        """The images at these indices, with this augmentation."""
        index = torch.from_numpy(indices)
        return Images(self.pixels[index], self.labels[index], mean=self.mean, std=self.std, augment=augment)


def per_channel(name: str, values: Sequence[float] | None, channels: int, *, default: float) -> Tensor:
    """The values as a tensor (channels, 1, 1), checked.

    Raises:
        RecipeError: not one finite number per channel, or a std that is not positive.
    """
    given = [default] * channels if values is None else list(values)
    smallest = 0.0 if name == "std" else -math.inf
    if len(given) != channels or not all(math.isfinite(v) and v > smallest for v in given):
        raise RecipeError(
            f"{name} must be {channels} finite {'positive ' if name == 'std' else ''}numbers, "
            f"one per channel, got {given}"
        )
    return torch.tensor(given).reshape(channels, 1, 1)


def _augmented(pixels: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    num, channels, height, width = pixels.shape
    pad = augment.pad
    top, left = torch.randint(0, 2 * pad + 1, (2, num, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    if augment.flip:
        mirrored = torch.rand(num, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    sample = torch.arange(num)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def stratified(labels: NDArray[np.int64], size: int, *, seed: int) -> NDArray[np.int64]:
    """Indices of ``size`` samples in random order, each class with its share to within one sample.

    Args:
        labels: (N,).
        size: how many, at most N.
        seed: same seed, same indices.
    """
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    quotas = counts * size / len(labels)
    taken = np.floor(quotas).astype(np.int64)
    # Largest remainders first; ties go to the lower class.
    for index in np.argsort(taken - quotas, kind="stable")[: size - int(taken.sum())]:
        taken[index] += 1
    parts = [
        generator.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, taken, strict=True)
    ]
    return generator.permutation(np.concatenate(parts)).astype(np.int64)


def _split_sizes(num: int, search_size: int | float | None, train_size: int | None) -> tuple[int, int]:
    """Numbers of search and of training samples out of ``num`` training samples.

    Raises:
        RecipeError: they do not leave at least one sample for each.
    """
    share = DEFAULT_SEARCH_SHARE if search_size is None else search_size
    search = round(share * num) if isinstance(share, float) else share
    faults = []
    if isinstance(share, float) and not 0 < share < 1:
        faults.append(f"search_size as a share must be in (0, 1), got {share}; a count is an integer")
    elif not 1 <= search < num:
        faults.append(f"search_size must leave samples to train on: 1 to {num - 1} of {num}, got {search}")
    left = num - search
    if train_size is not None and not 1 <= train_size <= max(left, 1):
        faults.append(f"train_size must be 1 to {left}, what the search split leaves, got {train_size}")
    if faults:
        raise RecipeError(faults)
    return search, left if train_size is None else train_size


def split_indices(
    labels: NDArray[np.int64], *, search_size: int | float | None, train_size: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Disjoint indices (train, search) of the training data, both stratified.

    Raises:
        RecipeError: the sizes do not fit the data.
    """
    if seed < 0:
        raise RecipeError(f"seed must be >= 0, got {seed}")
    num_search, num_train = _split_sizes(len(labels), search_size, train_size)
    search = stratified(labels, num_search, seed=seed)
    rest = np.setdiff1d(np.arange(len(labels)), search)
    if num_train < len(rest):
        rest = np.sort(rest[stratified(labels[rest], num_train, seed=seed)])
    return rest, search


def from_datasets(
    train: Samples,
    test: Samples,
    *,
    num_classes: int | None = None,
    search_size: int | float | None = None,
    train_size: int | None = None,
    seed: int = 0,
    name: str = "own",
) -> Data:
    """Wraps your own data sets and holds part of the training data back for the search.

    Labels are read from an attribute ``targets`` or ``labels``; without one, every training sample is read.

    Args:
        train: samples to train on and to search with.
        test: samples for the final figures.
        num_classes: number of classes; the largest training label plus one when absent.
        search_size: samples held back: a count, or a share in (0, 1); a tenth when absent.
        train_size: samples to keep of what remains; all when absent.
        seed: chooses the samples held back.
        name: how reports call it.

    Raises:
        DataError: a split is empty, or samples are not float tensors (C, H, W) with integer labels in range.
        RecipeError: the sizes do not fit the data.
    """
    for split, dataset in (("train", train), ("test", test)):
        if len(dataset) == 0:
            raise DataError(f"the {split} split of {name!r} is empty; give it at least one sample")
    shape = _checked_shape(name, train, test)
    labels = _read_labels(train, name)
    known = int(labels.max()) + 1 if num_classes is None else num_classes
    for split, found in (("train", labels), ("test", _stored_labels(test))):
        if found is not None and (found.min() < 0 or found.max() >= known):
            raise DataError(
                f"labels of the {split} split of {name!r} must lie in [0, {known}), got "
                f"{found.min()} to {found.max()}; number the classes from 0 or pass num_classes"
            )
    kept, held = split_indices(labels, search_size=search_size, train_size=train_size, seed=seed)
    return Data(
        name=name,
        train=subset(train, kept),
        search=subset(train, held, augmented=False),
        test=test,
        num_classes=known,
        input_shape=shape,
    )


def subset(dataset: Samples, indices: NDArray[np.int64], *, augmented: bool = True) -> Samples:
    """The samples at these indices; images in memory stay there, and lose their augmentation on request."""
    if isinstance(dataset, Images):
        return dataset.take(indices, augment=dataset.augment if augmented else None)
    chosen: Samples = Subset(dataset, indices.tolist())  # type: ignore[arg-type]
    return chosen


def _read_labels(dataset: Samples, name: str) -> NDArray[np.int64]:
    """The label of every sample, shape (N,)."""
    stored = _stored_labels(dataset)
    if stored is not None:
        return stored
    return np.array([_checked_label(name, i, dataset[i][1]) for i in range(len(dataset))], dtype=np.int64)


def _stored_labels(dataset: Samples) -> NDArray[np.int64] | None:
    for attribute in ("targets", "labels"):
        values = np.asarray(getattr(dataset, attribute, ()))
        if values.shape == (len(dataset),) and np.issubdtype(values.dtype, np.integer):
            return values.astype(np.int64)
    return None


def _checked_shape(name: str, train: Samples, test: Samples) -> tuple[int, int, int]:
    shapes: dict[tuple[int, ...], str] = {}
    for split, dataset in (("train", train), ("test", test)):
        for index in range(min(_CHECKED_SAMPLES, len(dataset))):
            where = f"{split}[{index}]"
            sample = dataset[index]
            if not isinstance(sample, (tuple, list)) or len(sample) != 2:
                raise DataError(f"{name}: {where} must be a pair (image, label), got {type(sample).__name__}")
            image, label = sample
            if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
                got = (
                    f"{image.dtype} {tuple(image.shape)}"
                    if isinstance(image, Tensor)
                    else type(image).__name__
                )
                raise DataError(
                    f"{name}: the image of {where} must be a float tensor of shape (C, H, W), got {got}; "
                    "add torchvision.transforms.ToTensor() or convert it in __getitem__"
                )
            _checked_label(name, index, label)
            shapes.setdefault(tuple(image.shape), where)
    if len(shapes) > 1:
        listed = ", ".join(f"{where} {shape}" for shape, where in shapes.items())
        raise DataError(f"{name}: all images must have one shape, got {listed}; resize or crop them")
    channels, height, width = next(iter(shapes))
    return channels, height, width


def _checked_label(name: str, index: int, label: Any) -> int:
    value = label.item() if isinstance(label, (Tensor, np.generic)) and label.ndim == 0 else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f"{name}: the label of sample {index} must be an integer class index, got {label!r}; "
            "one-hot and float labels are not supported"
        )
    return value
