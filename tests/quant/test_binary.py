"""Binary networks: dot products by popcount, thresholds that stand for BatchNorm and sign."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.quant.binary import SignThresholds, popcount_dot, sign_thresholds


def _signs(bits: np.ndarray) -> np.ndarray:
    return np.where(bits, 1, -1)


@pytest.mark.parametrize("length", range(1, 13))
def test_counting_equal_bits_is_the_dot_product_of_signs(length: int) -> None:
    words = (np.arange(2**length)[:, None] >> np.arange(length) & 1).astype(bool)
    for some in np.array_split(words, max(1, 2**length // 256)):  # all pairs, a part at a time
        assert np.array_equal(popcount_dot(some, words), _signs(words) @ _signs(some).T)


_VALUES = [Fraction(n, 4) for n in (-9, -4, -2, -1, 0, 1, 2, 5)]


@pytest.mark.parametrize("fan_in", range(1, 13))
def test_one_comparison_is_batchnorm_and_sign_for_every_dot_product(fan_in: int) -> None:
    """All of K <= 12, with factors of both signs and of zero, and with ties, in exact arithmetic."""
    norms = list(product(_VALUES, _VALUES, (Fraction(-3), Fraction(0), Fraction(5, 2)), (Fraction(1, 2), 2)))
    columns = [np.array([float(n[i]) for n in norms]) for i in range(4)]
    limits = sign_thresholds(*columns)
    counts = np.arange(fan_in + 1)
    dots = 2 * counts - fan_in
    wanted = np.array([[g * (int(d) - m) / s + b >= 0 for g, b, m, s in norms] for d in dots])
    assert np.array_equal(limits.positive(dots[:, None]), wanted)
    assert np.array_equal(limits.on_popcounts(fan_in).positive(counts[:, None]), wanted)
    assert limits.flipped.tolist() == [g < 0 for g, *_ in norms]


def test_the_comparisons_of_a_float_network_are_those_of_its_batchnorm() -> None:
    """1,000 inputs, away from exact ties, which float32 arithmetic decides by its rounding."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm1d(32).eval()
    with torch.no_grad():
        for tensor, scale in ((norm.weight, 1.0), (norm.bias, 2.0), (norm.running_mean, 9.0)):
            tensor.copy_(torch.randn(32, generator=generator) * scale)
        norm.running_var.copy_(torch.rand(32, generator=generator) * 80 + 1)
        weights = torch.rand(32, 75, generator=generator) < 0.5
        inputs = torch.rand(1000, 75, generator=generator) < 0.5
        dots = popcount_dot(weights.numpy(), inputs.numpy())
        outputs = norm(torch.from_numpy(dots).float())
    limits = sign_thresholds(
        norm.weight.detach(), norm.bias.detach(), norm.running_mean, torch.sqrt(norm.running_var + norm.eps)
    )
    clear = (outputs.abs() > 1e-5).numpy()
    assert clear.mean() > 0.999
    assert (norm.weight < 0).any()
    assert np.array_equal(limits.positive(dots)[clear], (outputs >= 0).numpy()[clear])


def test_max_pooling_commutes_with_a_comparison_and_becomes_min_pooling_when_it_is_flipped() -> None:
    values = np.random.default_rng(0).integers(-20, 20, (500, 4, 6))  # windows of 4, 6 channels
    limits = SignThresholds(np.array([-3, 0, 4, -3, 0, 4]), np.array([False] * 3 + [True] * 3))
    pooled_first = limits.positive(values.max(axis=1))
    signs = limits.positive(values)
    assert np.array_equal(pooled_first[:, :3], signs.max(axis=1)[:, :3])
    assert np.array_equal(pooled_first[:, 3:], signs.min(axis=1)[:, 3:])


@pytest.mark.parametrize("bad", [{"std": 0.0}, {"gamma": np.nan}, {"mean": np.inf}])
def test_batchnorm_that_is_not_finite_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be finite and std > 0"):
        sign_thresholds(**{"gamma": 1.0, "beta": 0.0, "mean": 0.0, "std": 1.0, **bad})
