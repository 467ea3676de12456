"""Readers of data set files, each checked before it is believed."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import DataError
from autocompress.training.data import per_channel

_CIFAR_RECORD = 1 + 3 * 32 * 32  # one label byte, then the planes of a 32x32 image
_CROP, _RESIZE = 224, 256  # torchvision's reference evaluation for ImageNet


@dataclass(frozen=True)
class Arrays:
    """Images (N, C, H, W) and int64 labels (N,) of both official splits."""

    x_train: NDArray[Any]
    y_train: NDArray[np.int64]
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]


def read_cifar10(root: Path, download: bool) -> Arrays:
    """CIFAR-10 from ``cifar10.npz``, ``cifar-10-batches-bin`` or torchvision's ``cifar-10-batches-py``.

    Krizhevsky, Learning multiple layers of features from tiny images, 2009.

    Raises:
        DataError: none of them is there, or it is damaged.
    """
    if (root / "cifar10.npz").is_file():
        return _read_npz(root / "cifar10.npz")
    if (root / "cifar-10-batches-bin").is_dir():
        folder = root / "cifar-10-batches-bin"
        x_train, y_train = _read_binary([folder / f"data_batch_{i}.bin" for i in range(1, 6)])
        return Arrays(x_train, y_train, *_read_binary([folder / "test_batch.bin"]))
    searched = f"{root / 'cifar10.npz'}, {root / 'cifar-10-batches-bin'} and {root / 'cifar-10-batches-py'}"
    return _read_torchvision_cifar("CIFAR10", root, download, searched)


def read_cifar100(root: Path, download: bool) -> Arrays:
    """CIFAR-100 (fine labels) from torchvision's ``cifar-100-python``.

    Raises:
        DataError: it is not there, or damaged.
    """
    return _read_torchvision_cifar("CIFAR100", root, download, str(root / "cifar-100-python"))


def _read_torchvision_cifar(kind: str, root: Path, download: bool, searched: str) -> Arrays:
    import torchvision

    make = getattr(torchvision.datasets, kind)
    try:
        train, test = (make(root, train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError, EOFError, ValueError) as fault:
        raise DataError(
            f"no readable {kind} in {searched}: {str(fault).splitlines()[0]}; set download: true, or fetch "
            "the files from https://www.cs.toronto.edu/~kriz/cifar.html"
        ) from fault
    planes = [np.ascontiguousarray(d.data.transpose(0, 3, 1, 2)) for d in (train, test)]
    labels = [np.asarray(d.targets, dtype=np.int64) for d in (train, test)]
    return Arrays(planes[0], labels[0], planes[1], labels[1])


def _read_npz(path: Path) -> Arrays:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found: dict[str, NDArray[Any]] = {key: archive[key] for key in keys}
    except KeyError as fault:
        raise DataError(f"{path} must hold {', '.join(keys)}: {fault}") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(f"{path} is damaged: {fault}; fetch or write it again") from fault
    faults = []
    for split in ("train", "test"):
        x, y = found[f"x_{split}"], found[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3):
            faults.append(
                f"x_{split} must be uint8 of shape (N, 32, 32, 3), got {x.dtype} of shape {x.shape}"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
            faults.append(f"y_{split} must be {len(x)} integers, got {y.dtype} of shape {y.shape}")
    if faults:
        raise DataError("\n".join(f"{path}: {fault}" for fault in faults))
    planes = [np.ascontiguousarray(found[key].transpose(0, 3, 1, 2)) for key in ("x_train", "x_test")]
    labels = [found[key].astype(np.int64) for key in ("y_train", "y_test")]
    return Arrays(planes[0], labels[0], planes[1], labels[1])


def _read_binary(paths: Sequence[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    faults, parts = [], []
    for path in paths:
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif path.stat().st_size == 0 or path.stat().st_size % _CIFAR_RECORD:
            faults.append(f"{path} must be whole records of {_CIFAR_RECORD} bytes, got {path.stat().st_size}")
        else:
            parts.append(np.fromfile(path, dtype=np.uint8).reshape(-1, _CIFAR_RECORD))
    if faults:
        raise DataError("\n".join([*faults, "fetch the binary version of CIFAR-10 again"]))
    records = np.concatenate(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].astype(np.int64)


def read_fashion_mnist(root: Path, download: bool) -> Arrays:
    """Fashion-MNIST from ``FashionMNIST/raw`` (torchvision's layout), packed with gzip or not.

    Xiao et al., arXiv 1708.07747.

    Raises:
        DataError: a file is missing or damaged.
    """
    raw = root / "FashionMNIST" / "raw"
    if download and not raw.is_dir():
        import torchvision

        try:
            torchvision.datasets.FashionMNIST(root, download=True)
        except (RuntimeError, OSError) as fault:
            raise DataError(f"cannot fetch Fashion-MNIST: {fault}; put its files into {raw}") from fault
    arrays: list[NDArray[Any]] = []
    for prefix in ("train", "t10k"):
        x = _read_idx(raw / f"{prefix}-images-idx3-ubyte", ndim=3)
        y = _read_idx(raw / f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(x) != len(y) or x.shape[1:] != (28, 28):
            raise DataError(
                f"{raw}: {prefix} must be 28x28 images and as many labels, got {x.shape}, {y.shape}"
            )
        arrays += [x[:, None], y.astype(np.int64)]
    return Arrays(arrays[0], arrays[1], arrays[2], arrays[3])


def _read_idx(path: Path, *, ndim: int) -> NDArray[np.uint8]:
    """An array in the IDX format: magic number, big-endian sizes, bytes."""
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise DataError(
            f"neither {path} nor {packed.name} is there; set download: true, or fetch the four files from "
            "https://github.com/zalandoresearch/fashion-mnist"
        )
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(f"{packed} is damaged: {fault}; fetch it again") from fault
    start = 4 * (1 + ndim)
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes((0, 0, 8, ndim)) or len(content) != start + math.prod(sizes):
        raise DataError(
            f"{path} is truncated or not an IDX file of bytes in {ndim} dimensions; fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes).copy()


@dataclass(frozen=True)
class Folders:
    """Images in one folder per class; ``train_plain`` is ``train`` without augmentation."""

    train: Any
    train_plain: Any
    test: Any

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.train.classes)


def read_folders(root: Path, *, mean: Sequence[float] | None, std: Sequence[float] | None) -> Folders:
    """``root/train`` and ``root/val`` or ``root/test``, with the usual crops to 224x224.

    Args:
        root: the folder.
        mean: per channel, on the scale [0, 1].
        std: per channel.

    Raises:
        DataError: a folder is missing or empty, or the two differ in their classes.
    """
    from torchvision import datasets, transforms

    train = root / "train"
    test = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(
            f"{root} must hold train and val (or test), each with one folder per class; "
            "set root to where they are"
        )
    normalise = transforms.Normalize(
        per_channel("mean", mean, 3, default=0.0), per_channel("std", std, 3, default=1.0)
    )
    last = [transforms.ToTensor(), normalise]
    varied = transforms.Compose(
        [transforms.RandomResizedCrop(_CROP), transforms.RandomHorizontalFlip(), *last]
    )
    plain = transforms.Compose([transforms.Resize(_RESIZE), transforms.CenterCrop(_CROP), *last])
    try:
        folders = Folders(
            datasets.ImageFolder(train, varied),
            datasets.ImageFolder(train, plain),
            datasets.ImageFolder(test, plain),
        )
    except OSError as fault:
        raise DataError(f"{root}: {fault}; every class folder needs an image") from fault
    if folders.train.classes != folders.test.classes:
        odd = sorted(set(folders.train.classes) ^ set(folders.test.classes))
        raise DataError(
            f"{train} and {test} must have the same class folders; only in one: {', '.join(odd[:8])}"
        )
    return folders
