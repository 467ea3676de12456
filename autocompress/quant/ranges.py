"""Where to clip before rounding: by maximum, percentile, squared error or divergence."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.quant.grids import symmetric

RangeMethod = Literal["max", "percentile", "mse", "kl", "haq"]
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

PERCENTILE = 0.9999
_CANDIDATES = 64  # thresholds that are tried for the smallest squared error
_MAX_COLUMNS = 4096  # values per row that decide a threshold; rows longer than this are thinned evenly
_HAQ_FEW_BITS = 5


def clip_thresholds(
    values: Tensor, bits: int, method: RangeMethod, *, signed: bool, narrow: bool = False
) -> Tensor:
    """The magnitude at which each row is clipped before it is rounded to a grid.

    * ``max``: nothing is clipped.
    * ``percentile``: the 99.99th percentile of the magnitudes.
    * ``mse``: least mean squared error of the rounded values, out of 64 shares of the maximum.
    * ``kl``: HAQ's rule, least divergence between cumulative distributions before and after (see
      :func:`kl_threshold`).
    * ``haq``: ``max`` from 5 bits up, ``kl`` below, as HAQ's released code.

    One bit, whatever the method: the threshold of least squared error, which for signed values is the mean
    magnitude (Rastegari et al., XNOR-Net, ECCV 2016, section 3.1).

    Args:
        values: shape (rows, n), one row per threshold; one row for a whole tensor.
        bits: of the grid.
        method: how to choose.
        signed, narrow: of the grid.

    Returns:
        Shape (rows,), at least 0; 0 where a row holds only zeros.

    Raises:
        ValueError: unknown method, or values that are not finite or empty.
    """
    if method not in RANGE_METHODS:
        raise ValueError(f"range method must be one of {', '.join(RANGE_METHODS)}, got {method!r}")
    if values.ndim != 2 or values.shape[1] == 0 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"values must be finite, shape (rows, n), got shape {tuple(values.shape)}")
    sizes = values.abs().float()
    largest = sizes.amax(dim=1)
    if bits == 1:
        return (
            sizes.mean(dim=1) if signed else _least_error(values, bits, largest, signed=False, narrow=False)
        )
    if method == "haq":
        method = "kl" if bits < _HAQ_FEW_BITS else "max"
    if method == "max":
        return largest
    if method == "percentile":
        index = min(int(PERCENTILE * sizes.shape[1]), sizes.shape[1] - 1)
        return sizes.sort(dim=1).values[:, index]
    if method == "mse":
        return _least_error(values, bits, largest, signed=signed, narrow=narrow)
    rows = [kl_threshold(row.numpy().astype(np.float64), bits) for row in sizes]
    return torch.tensor(rows, dtype=torch.float32)


def _least_error(values: Tensor, bits: int, largest: Tensor, *, signed: bool, narrow: bool) -> Tensor:
    values = _thinned(values.float())
    best = torch.full_like(largest, torch.inf)
    chosen = largest.clone()
    for share in torch.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES):
        threshold = (largest * share).clamp(min=torch.finfo(torch.float32).tiny)
        grid = symmetric(threshold[:, None], bits, signed=signed, narrow=narrow)
        error = (grid.quantise(values) - values).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, largest * share, chosen)
    return chosen


def _thinned(values: Tensor) -> Tensor:
    """Evenly spaced order statistics of long rows, the extremes among them."""
    if values.shape[1] <= _MAX_COLUMNS:
        return values
    ordered = values.sort(dim=1).values
    picked = torch.linspace(0, values.shape[1] - 1, _MAX_COLUMNS).round().long()
    return ordered[:, picked]


def kl_threshold(sizes: NDArray[np.float64], bits: int) -> float:
    """HAQ's clipping threshold for the magnitudes of a tensor.

    P is the cumulative distribution of the magnitudes over as many equal bins as the square root of their
    number. Cutting after i bins makes it reach 1 there; its first i values are then sampled down to
    ``2^(bits-1)`` points by linear interpolation and up again, which gives Q. The cut with the least
    ``sum (P - Q) log2(P / Q)`` over all bins decides, half a bin beyond it.

    Args:
        sizes: at least 0, shape (n,).
        bits: at least 2.

    Source: released code of Wang et al., "HAQ", CVPR 2019. The paper, section 3.4, speaks of the divergence
    between distributions; the code compares cumulative ones, with the symmetric divergence of Jeffreys.
    """
    largest = float(sizes.max())
    counts, edges = np.histogram(sizes, bins="sqrt", range=(0.0, largest or 1.0))
    points = 2 ** (bits - 1)
    if largest == 0 or counts.size < points + 1:
        return largest
    original = np.cumsum(counts) / counts.sum()
    best, threshold = np.inf, largest
    for cut in range(points + 1, counts.size + 1):
        clipped = original.copy()
        clipped[cut - 1 :] = 1.0
        coarse_at, fine_at = np.linspace(0, 1, points), np.linspace(0, 1, cut)
        clipped[:cut] = np.interp(fine_at, coarse_at, np.interp(coarse_at, fine_at, clipped[:cut]))
        held = (original > 0) & (clipped > 0)
        p, q = original[held], clipped[held]
        divergence = float(np.sum((p - q) * np.log2(p / q)))
        if divergence < best:
            best, threshold = divergence, (cut + 0.5) * float(edges[1] - edges[0])
    return min(threshold, largest)
