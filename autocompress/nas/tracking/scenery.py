"""What sequences are made of: sprites that move, and pieces of photographs behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import DataError
from autocompress.training.data import stratified
from autocompress.training.files import read_fashion_mnist

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sprites:
    """Small pictures, black where they are transparent.

    Args:
        name: of the data set.
        images: (N, side, side), in [0, 1]; an even side.
        labels: (N,), their classes.

    Raises:
        DataError: another shape, or an odd side.
    """

    name: str
    images: Floats
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.images.shape
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 or len(self.labels) != shape[0]:
            raise DataError(
                f"sprites must be (N, side, side) with an even side and N labels, got {shape} and "
                f"{len(self.labels)} labels; pad or resize them"
            )

    @property
    def side(self) -> int:
        """Height and width in pixels."""
        return int(self.images.shape[1])


def digit_sprites() -> Sprites:
    """The 1,797 handwritten digits of scikit-learn, 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Sprites("digits", (digits.images / 16).astype(np.float32), digits.target.astype(np.int64))


def fashion_sprites(root: Path, *, num: int = 10_000) -> Sprites:
    """Training images of Fashion-MNIST, 2x2 pixels averaged into one: 14x14.

    Args:
        root: folder that holds ``FashionMNIST/raw``; nothing is downloaded.
        num: how many, the first ones.

    Raises:
        DataError: a file is missing or damaged.
    """
    arrays = read_fashion_mnist(root, False)
    images = arrays.x_train[:num, 0].astype(np.float32) / 255
    halved = images.reshape(len(images), 14, 2, 14, 2).mean((2, 4))
    return Sprites("fashion_mnist", halved.astype(np.float32), arrays.y_train[:num])


def photo_tiles(side: int) -> Floats:
    """Pieces of scikit-learn's two photographs that share no pixel, grey, (N, side, side) in [0, 1].

    Args:
        side: height and width of a piece, at most 427.

    Raises:
        DataError: the photographs are not larger than a piece.
    """
    from sklearn.datasets import load_sample_images

    tiles: list[Floats] = []
    for photo in load_sample_images().images:
        grey = (photo @ np.array([0.299, 0.587, 0.114]) / 255).astype(np.float32)  # ITU-R BT.601
        rows, columns = grey.shape[0] // side, grey.shape[1] // side
        grid = grey[: rows * side, : columns * side].reshape(rows, side, columns, side)
        tiles += list(grid.transpose(0, 2, 1, 3).reshape(-1, side, side))
    if not tiles:
        raise DataError(f"no piece of {side}x{side} pixels fits into the photographs; use smaller sprites")
    return np.stack(tiles)


def divide(labels: NDArray[np.int64], shares: Sequence[float], *, seed: int) -> list[NDArray[np.int64]]:
    """Disjoint stratified parts of some items, as sorted indices; what the shares leave goes to the last.

    Args:
        labels: (N,).
        shares: of each part, adding up to 1.
        seed: same seed, same parts.
    """
    left, parts = np.arange(len(labels)), list[NDArray[np.int64]]()
    for number, share in enumerate(shares[:-1]):
        taken = left[stratified(labels[left], round(share * len(labels)), seed=seed + number)]
        parts.append(np.sort(taken))
        left = np.setdiff1d(left, taken)
    return [*parts, left]
