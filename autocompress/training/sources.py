"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autocompress.core.errors import DataError, RecipeError
from autocompress.core.wording import did_you_mean
from autocompress.training.data import (
    Augment,
    Data,
    Images,
    Samples,
    from_datasets,
    split_indices,
    stratified,
)
from autocompress.training.files import Arrays, read_cifar10, read_cifar100, read_fashion_mnist, read_folders
from autocompress.zoo import call_factory

# The usual ImageNet figures; the public CIFAR-10 ResNets of the zoo were trained with them too.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DIGITS_TEST_SHARE, _DIGITS_SEARCH_SHARE = 0.2, 0.1


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`load_data`."""

    name: str
    root: Path
    download: bool
    search_size: int | float | None
    seed: int
    train_size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


def load_data(
    name: str,
    *,
    root: Path | None = None,
    download: bool = False,
    search_size: int | float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Data:
    """A data set by name, with a search split held back from its training data.

    Takes more than seven arguments because each is one line of a recipe.

    Args:
        name: a key of :data:`DATASETS`, or ``pkg.mod:factory``: your function, given ``root`` and
            ``seed`` if it accepts them, that returns a :class:`Data` or a pair (train, test) of data sets.
        root: folder of the files; ``data`` when absent.
        download: whether torchvision may fetch missing files (CIFAR only).
        search_size: samples held back, a count or a share in (0, 1); a tenth when absent. Stratified.
        seed: chooses the samples held back and those kept.
        train_size: samples to keep of what remains, stratified; all when absent.
        mean: per channel, on the scale [0, 1]; the data set's usual one when absent.
        std: per channel, likewise.

    Raises:
        DataError: files are missing or damaged.
        RecipeError: the name is unknown or the sizes do not fit the data.
    """
    request = _Request(
        name, Path("data") if root is None else root, download, search_size, seed, train_size, mean, std
    )
    if ":" in name:
        return _from_factory(request)
    if name not in DATASETS:
        raise RecipeError(
            f"unknown data set {name!r}{did_you_mean(name, DATASETS)}; known: {', '.join(DATASETS)}, "
            "or pkg.mod:factory for your own"
        )
    return DATASETS[name](request)


def _digits(request: _Request) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    pixels = (digits.images / 16).astype(np.float32)[:, None]
    test = np.sort(stratified(labels, round(_DIGITS_TEST_SHARE * len(labels)), seed=0))
    rest = np.setdiff1d(np.arange(len(labels)), test)
    if request.search_size is None:
        request = replace(request, search_size=round(_DIGITS_SEARCH_SHARE * len(labels)))
    arrays = Arrays(pixels[rest], labels[rest], pixels[test], labels[test])
    return _in_memory(request, arrays, num_classes=10, augment=None)


def _from_arrays(
    request: _Request,
    *,
    read: Callable[[Path, bool], Arrays],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Data:
    request = _normalised(request, mean, std)
    arrays = read(request.root, request.download)
    return _in_memory(request, arrays, num_classes=num_classes, augment=Augment())


def _normalised(request: _Request, mean: Sequence[float], std: Sequence[float]) -> _Request:
    return replace(
        request,
        mean=mean if request.mean is None else request.mean,
        std=std if request.std is None else request.std,
    )


def _in_memory(request: _Request, arrays: Arrays, *, num_classes: int, augment: Augment | None) -> Data:
    _check_labels(request.name, arrays, num_classes)
    kept, held = split_indices(
        arrays.y_train, search_size=request.search_size, train_size=request.train_size, seed=request.seed
    )
    train = _images(arrays.x_train, arrays.y_train, request)
    return Data(
        name=request.name,
        train=train.take(kept, augment=augment),
        search=train.take(held),
        test=_images(arrays.x_test, arrays.y_test, request),
        num_classes=num_classes,
        input_shape=arrays.x_train.shape[1:],
    )


def _images(pixels: NDArray[Any], labels: NDArray[np.int64], request: _Request) -> Images:
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), mean=request.mean, std=request.std)


def _check_labels(name: str, arrays: Arrays, num_classes: int) -> None:
    for split, labels in (("training", arrays.y_train), ("test", arrays.y_test)):
        if len(labels) == 0:
            raise DataError(f"the {split} split of {name} is empty; fetch the files again")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(
                f"{split} labels of {name} must lie in [0, {num_classes}), got {labels.min()} to "
                f"{labels.max()}; the file is damaged or of another data set"
            )


def _folders(request: _Request, *, num_classes: int | None = None) -> Data:
    request = _normalised(request, _IMAGENET_MEAN, _IMAGENET_STD)
    folders = read_folders(request.root, mean=request.mean, std=request.std)
    if num_classes not in (None, folders.num_classes):
        raise DataError(
            f"{request.name} must have {num_classes} class folders, {request.root / 'train'} has "
            f"{folders.num_classes}; use imagefolder for a subset"
        )
    kept, held = split_indices(
        np.asarray(folders.train.targets, dtype=np.int64),
        search_size=request.search_size,
        train_size=request.train_size,
        seed=request.seed,
    )
    return Data(
        name=request.name,
        train=torch.utils.data.Subset(folders.train, kept.tolist()),
        search=torch.utils.data.Subset(folders.train_plain, held.tolist()),
        test=folders.test,
        num_classes=folders.num_classes,
        input_shape=(3, 224, 224),
    )


def _from_factory(request: _Request) -> Data:
    unused: dict[str, object] = {"mean": request.mean, "std": request.std}
    made = call_factory(request.name, root=request.root, seed=request.seed)
    if isinstance(made, Data):
        unused |= {"search_size": request.search_size, "train_size": request.train_size}
    given = [key for key, value in unused.items() if value is not None]
    if given:
        raise RecipeError(f"{', '.join(given)} cannot be set for {request.name!r}: its factory decides them")
    if isinstance(made, Data):
        return made
    if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(d, Samples) for d in made):
        raise DataError(
            f"{request.name!r} must return a Data or a pair (train, test) of map-style data sets, "
            f"got {type(made).__name__}"
        )
    return from_datasets(
        *made,
        search_size=request.search_size,
        train_size=request.train_size,
        seed=request.seed,
        name=request.name,
    )


DATASETS: dict[str, Callable[[_Request], Data]] = {
    "digits": _digits,
    "cifar10": partial(
        _from_arrays, read=read_cifar10, num_classes=10, mean=_IMAGENET_MEAN, std=_IMAGENET_STD
    ),
    "cifar100": partial(
        _from_arrays, read=read_cifar100, num_classes=100, mean=_IMAGENET_MEAN, std=_IMAGENET_STD
    ),
    "fashion_mnist": partial(
        _from_arrays, read=read_fashion_mnist, num_classes=10, mean=(0.2860,), std=(0.3530,)
    ),
    "imagefolder": _folders,
    "imagenet": partial(_folders, num_classes=1000),
}
