from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autocompress.quant.grids import MAX_BITS, Grid, asymmetric, quantise_bias, symmetric

BITS = range(1, 9)


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def ramp(num: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Uniform data: midpoints of equal parts of [low, high]."""
    return (torch.arange(num, dtype=torch.float64) + 0.5).div(num).mul(high - low).add(low).float()


def grids(bits: int) -> list[Grid]:
    """One of every kind with some bits."""
    thresholds = scalar(0.7), torch.tensor([0.3, 1.0, 0.041]).reshape(3, 1)
    found = [
        symmetric(t, bits, signed=signed, narrow=narrow, power_of_two=po2)
        for t in thresholds
        for signed, narrow in ((True, True), (True, False), (False, False))
        for po2 in (False, True)
    ]
    return found + ([asymmetric(scalar(-0.2), scalar(0.9), bits)] if bits > 1 else [])


@pytest.mark.parametrize(("bits", "decibels"), [(3, 15.56), (4, 22.92), (6, 35.85), (8, 48.10)])
def test_signal_to_noise_of_uniform_data_is_that_of_the_formula(bits: int, decibels: float) -> None:
    x = ramp(1_000_000)
    noise = symmetric(scalar(1.0), bits, signed=True, narrow=True).quantise(x) - x
    measured = 10 * math.log10(float(x.double().square().mean() / noise.double().square().mean()))
    assert measured == pytest.approx(20 * math.log10(2 * (2 ** (bits - 1) - 1)), abs=0.01)
    assert measured == pytest.approx(decibels, abs=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_twice_is_rounding_once(bits: int) -> None:
    x = ramp(999).mul(1.3).reshape(3, 333)
    for grid in grids(bits):
        once = grid.quantise(x)
        assert torch.equal(grid.quantise(once), once)


@pytest.mark.parametrize("bits", BITS)
def test_a_grid_has_as_many_values_as_its_bits_allow(bits: int) -> None:
    x = ramp(20_000, -2, 2)
    for signed, narrow, lost in ((True, True, 1), (True, False, 0), (False, False, 0)):
        grid = symmetric(scalar(1.0), bits, signed=signed, narrow=narrow)
        values = grid.quantise(x).unique()
        assert len(values) == (2 if bits == 1 else 2**bits - lost)
        integers = grid.integers(x)
        assert (float(integers.min()), float(integers.max())) == (grid.low, grid.high)
    if bits > 1:
        assert len(asymmetric(scalar(-0.3), scalar(1.0), bits).quantise(x).unique()) == 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_takes_the_nearest_value_and_keeps_the_order(bits: int) -> None:
    x = ramp(3000, -1.5, 1.5)
    for grid in grids(bits):
        if grid.threshold.numel() > 1:
            continue
        values = grid.quantise(ramp(100_000, -9, 9)).unique()
        rounded = grid.quantise(x)
        nearest = (x[:, None] - values).abs().min(dim=1).values
        torch.testing.assert_close((rounded - x).abs(), nearest, rtol=0, atol=1e-6)
        assert bool((rounded.diff() >= 0).all())


@pytest.mark.parametrize("bits", BITS)
def test_the_threshold_is_a_value_and_nothing_lies_beyond(bits: int) -> None:
    for signed, narrow in ((True, True), (False, False)):
        grid = symmetric(scalar(0.37), bits, signed=signed, narrow=narrow)
        top = float(grid.quantise(scalar(100.0)))
        assert top == pytest.approx(0.37, rel=1e-6)
        assert float(grid.quantise(scalar(-100.0))) == pytest.approx(-top if signed else 0.0, rel=1e-6)


def test_one_signed_bit_is_plus_and_minus_and_zero_counts_as_plus() -> None:
    grid = symmetric(scalar(0.5), 1, signed=True)
    assert grid.quantise(torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0])).tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5]


def test_one_unsigned_bit_is_zero_and_the_threshold() -> None:
    grid = symmetric(scalar(0.5), 1, signed=False)
    assert grid.quantise(torch.tensor([-3.0, 0.1, 0.3, 9.0])).tolist() == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threshold", [1e-4, 0.3, 0.99, 1.0, 17.0])
def test_steps_are_the_nearest_powers_of_two(bits: int, threshold: float) -> None:
    for signed, narrow in ((True, True), (True, False), (False, False)):
        plain = symmetric(scalar(threshold), bits, signed=signed, narrow=narrow)
        grid = symmetric(scalar(threshold), bits, signed=signed, narrow=narrow, power_of_two=True)
        exponent = math.log2(float(grid.scale))
        assert exponent == round(exponent)
        assert abs(exponent - math.log2(float(plain.scale))) <= 0.5 + 1e-6


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (-3.0, 0.1), (0.5, 2.0), (-2.0, -1.0)])
def test_zero_is_a_value_of_every_asymmetric_grid(bits: int, low: float, high: float) -> None:
    grid = asymmetric(scalar(low), scalar(high), bits)
    assert grid.zero_point is not None
    zero_point = float(grid.zero_point)
    assert zero_point == round(zero_point)
    assert 0 <= zero_point <= grid.high
    assert float(grid.quantise(scalar(0.0))) == 0.0
    ends = grid.quantise(torch.tensor([min(low, 0.0), max(high, 0.0)]))
    torch.testing.assert_close(
        ends, torch.tensor([min(low, 0.0), max(high, 0.0)]), rtol=0, atol=float(grid.scale) / 2 * 1.001
    )


@pytest.mark.parametrize("bits", BITS)
def test_rounding_in_place_gives_the_same_values(bits: int) -> None:
    for num in (12, 300_000):  # within and beyond what is rounded at a time
        for grid in grids(bits):
            x = ramp(num).mul(1.2).reshape(3, -1)
            expected = grid.quantise(x)
            assert torch.equal(grid.quantise(x.clone(), in_place=True), expected)
            assert torch.equal(grid.quantise(x.clone().t().contiguous().t(), in_place=True), expected)
            kept = x.clone()
            grid.quantise(x)
            assert torch.equal(x, kept)


def test_channels_of_zeros_take_the_scale_of_the_median_channel() -> None:
    grid = symmetric(torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]), 4, signed=True, narrow=True)
    assert grid.threshold.tolist() == [2.0, 3.0, 1.0, 2.0, 2.0]
    assert symmetric(torch.zeros(2), 4, signed=True).threshold.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bits", [0, MAX_BITS + 1, 32])
def test_widths_that_no_grid_has_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to {MAX_BITS} bits, got {bits}"):
        symmetric(scalar(1.0), bits, signed=True)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_thresholds_must_be_positive_and_finite(threshold: float) -> None:
    with pytest.raises(ValueError, match="finite and > 0"):
        Grid(4, torch.tensor([1.0, threshold]), signed=True)


def test_one_bit_has_no_room_for_a_zero_point() -> None:
    with pytest.raises(ValueError, match="at least 2 bits"):
        asymmetric(scalar(-1.0), scalar(1.0), 1)


def test_biases_are_whole_multiples_of_the_accumulators_step() -> None:
    scales = torch.tensor([0.25, 0.5])
    bias = quantise_bias(torch.tensor([1.1, -0.9]), scalar(0.5), scales.reshape(2, 1, 1))
    assert bias.tolist() == [1.125, -1.0]


def test_biases_stay_within_32_bit_integers() -> None:
    step = 2.0**-30
    clipped = quantise_bias(torch.tensor([9.0, -9.0]), scalar(step), scalar(1.0))
    assert clipped.tolist() == pytest.approx([2.0, -2.0])
