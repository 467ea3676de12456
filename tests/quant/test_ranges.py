from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from autocompress.quant.grids import symmetric
from autocompress.quant.ranges import RANGE_METHODS, clip_thresholds, kl_threshold


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_error(threshold: float, bits: int) -> float:
    """Mean squared error of a narrow symmetric grid on a standard normal variable, by integration."""
    levels = 2 ** (bits - 1) - 1
    step = threshold / levels
    edges = [0.0, *(step * (i + 0.5) for i in range(levels)), np.inf]
    values = [step * i for i in range(levels + 1)]
    parts = [
        quad(lambda x, v=v: (x - v) ** 2 * norm.pdf(x), low, min(high, 12))[0]
        for v, (low, high) in zip(values, pairwise(edges), strict=True)
    ]
    return 2 * sum(parts)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_finds_the_optimal_clipping_of_a_gaussian(bits: int) -> None:
    best = minimize_scalar(gaussian_error, bounds=(0.5, 6), args=(bits,), method="bounded").fun
    x = drawn(1, 200_000)
    threshold = float(clip_thresholds(x, bits, "mse", signed=True, narrow=True))
    assert gaussian_error(threshold, bits) <= best * 1.01  # thresholds are tried in steps of a 64th


def test_optimal_steps_of_a_gaussian_are_those_of_max() -> None:
    """Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960, table II: 3 levels."""
    step = minimize_scalar(gaussian_error, bounds=(0.5, 6), args=(2,), method="bounded").x
    assert step == pytest.approx(1.224, abs=1e-3)


def test_mse_is_no_worse_than_any_other_method() -> None:
    x = drawn(6, 2000) ** 3
    for bits in range(2, 9):
        for signed, narrow in ((True, True), (True, False)):
            errors = {}
            for method in RANGE_METHODS:
                thresholds = clip_thresholds(x, bits, method, signed=signed, narrow=narrow)
                grid = symmetric(thresholds[:, None], bits, signed=signed, narrow=narrow)
                errors[method] = (grid.quantise(x) - x).square().sum(dim=1)
            # 64 candidates: a rival may lie between two of them.
            assert all(bool((errors["mse"] <= 1.02 * error).all()) for error in errors.values())


def test_max_clips_nothing() -> None:
    x = drawn(3, 500)
    assert torch.equal(clip_thresholds(x, 4, "max", signed=True), x.abs().amax(dim=1))


def test_percentile_leaves_a_ten_thousandth_beyond() -> None:
    x = torch.arange(1, 100_001.0)[None]
    threshold = float(clip_thresholds(x, 8, "percentile", signed=True))
    assert int((x > threshold).sum()) == 9  # of the ten largest, one is the threshold itself


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_one_signed_bit_takes_the_mean_magnitude(method: str) -> None:
    x = drawn(2, 400)
    thresholds = clip_thresholds(x, 1, method, signed=True)  # type: ignore[arg-type]
    torch.testing.assert_close(thresholds, x.abs().mean(dim=1))
    errors = [
        float((torch.where(x >= 0, 1, -1) * thresholds[:, None] * scale - x).square().sum())
        for scale in (0.98, 1.0, 1.02)
    ]
    assert min(errors) == errors[1]


def reference_kl(sizes: NDArray[np.float64], bits: int) -> float:
    """HAQ's threshold written from its description, point by point."""
    points = 2 ** (bits - 1)
    width = sizes.max() / len(np.histogram_bin_edges(sizes, "sqrt", (0, sizes.max()))[1:])
    num_bins = round(sizes.max() / width)
    index = np.minimum((sizes / width).astype(int), num_bins - 1)
    share = [float(np.mean(index <= b)) for b in range(num_bins)]
    best = (np.inf, sizes.max())
    for cut in range(points + 1, num_bins + 1):
        clipped = [*share[: cut - 1], 1.0]

        def at(curve: list[float], place: float) -> float:
            left = min(int(place * (len(curve) - 1)), len(curve) - 2)
            rest = place * (len(curve) - 1) - left
            return curve[left] * (1 - rest) + curve[left + 1] * rest

        coarse = [at(clipped, k / (points - 1)) for k in range(points)]
        q = [at(coarse, k / (cut - 1)) for k in range(cut)] + [1.0] * (num_bins - cut)
        divergence = sum((a - b) * np.log2(a / b) for a, b in zip(share, q, strict=True) if a > 0 and b > 0)
        best = min(best, (divergence, (cut + 0.5) * width))
    return min(best[1], sizes.max())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_kl_threshold_is_that_of_haq(bits: int, power: int) -> None:
    sizes = drawn(3000, seed=bits).abs().double().numpy() ** power
    assert kl_threshold(sizes, bits) == pytest.approx(reference_kl(sizes, bits), rel=1e-9)


def test_kl_clips_long_tails_and_keeps_the_largest_value_in_reach() -> None:
    sizes = drawn(10_000).abs().double().numpy() ** 3
    threshold = kl_threshold(sizes, 3)
    assert np.median(sizes) < threshold < sizes.max() / 2
    few = np.array([0.1, 0.5, 0.9])
    assert kl_threshold(few, 4) == 0.9  # fewer bins than points: nothing to cut


def test_haq_takes_the_maximum_from_five_bits_up_and_kl_below() -> None:
    x = drawn(2, 1000)
    for bits in range(2, 9):
        same = clip_thresholds(x, bits, "max" if bits >= 5 else "kl", signed=True)
        assert torch.equal(clip_thresholds(x, bits, "haq", signed=True), same)


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_rows_of_zeros_have_threshold_zero(method: str, bits: int) -> None:
    x = torch.stack([torch.zeros(100), drawn(100)])
    thresholds = clip_thresholds(x, bits, method, signed=True)  # type: ignore[arg-type]
    assert float(thresholds[0]) == 0.0
    assert float(thresholds[1]) > 0.0


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_thresholds_scale_with_the_values(method: str) -> None:
    x = drawn(4, 3000)
    for bits in (2, 4, 8):
        one, four = (clip_thresholds(x * s, bits, method, signed=True) for s in (1, 4))  # type: ignore[arg-type]
        torch.testing.assert_close(four, 4 * one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        clip_thresholds(torch.tensor([[1.0, bad]]), 4, "max", signed=True)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="max, percentile, mse, kl, haq"):
        clip_thresholds(drawn(1, 4), 4, "best", signed=True)  # type: ignore[arg-type]
