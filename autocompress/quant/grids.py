"""The values a quantised tensor may take, and rounding to them.

Every function computes in the order of Brevitas' integer quantiser (divide, add the zero point, round half
to even, clamp, subtract, multiply), so that its values are Brevitas' values to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autocompress.core.graph import Bits

MAX_BITS = 16
"""Above this a float32 no longer holds a layer's integers and products exactly enough to be worth it."""

_NOTHING = 1e-20  # magnitudes that count as 0
_MAX_PRODUCT_BITS = 24
_CHUNK = 1 << 17  # elements rounded at a time: half a megabyte stays in a core's cache for all four passes


@dataclass(frozen=True, eq=False)
class Grid:
    """Evenly spaced values ``scale * (q - zero_point)`` for whole numbers ``q`` from ``low`` to ``high``.

    A signed grid of one bit holds the two values -threshold and +threshold (binary); an unsigned one holds 0
    and threshold.

    Args:
        bits: from 1 to 16.
        threshold: the largest magnitude that is represented, > 0: a scalar, or one per output channel in a
            shape that broadcasts against the tensor. For grids with a zero point: the width of the range.
        signed: whether negative values are represented with a sign; False after a ReLU.
        narrow: leave out the most negative integer, so that the grid is symmetric (weights).
        zero_point: the integer that stands for 0, whole, in the shape of the threshold; None for 0.
        power_of_two: whether the step is a power of two, as fixed-point arithmetic wants it; the threshold
            must be one.

    Raises:
        ValueError: bits out of range, or a threshold that is not positive and finite.
    """

    bits: int
    threshold: Tensor
    signed: bool
    narrow: bool = False
    zero_point: Tensor | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"a grid has from 1 to {MAX_BITS} bits, got {self.bits}")
        if not bool(torch.isfinite(self.threshold).all() and (self.threshold > 0).all()):
            raise ValueError(
                f"a threshold must be finite and > 0, got {self.threshold.flatten()[:8].tolist()}"
            )

    @property
    def binary(self) -> bool:
        """Whether the grid is the two values plus and minus the threshold."""
        return self.bits == 1 and self.signed

    @property
    def low(self) -> int:
        """Smallest integer."""
        if self.binary:
            return -1
        return int(self.narrow) - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest integer."""
        if self.binary:
            return 1
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @cached_property
    def scale(self) -> Tensor:
        """The step between neighbouring values (for binary grids the threshold), shaped like it."""
        return self.threshold / steps_of(
            self.bits, signed=self.signed, narrow=self.narrow, power_of_two=self.power_of_two
        )

    def integers(self, x: Tensor) -> Tensor:
        """The integers that stand for some values, as floats, shape of ``x``."""
        if self.binary:
            return torch.where(x >= 0, 1.0, -1.0)
        return self._round_(x / self.scale)

    def quantise(self, x: Tensor, *, in_place: bool = False) -> Tensor:
        """The nearest value of the grid for every element, shape of ``x``.

        Args:
            x: floats of any shape that the scale broadcasts against.
            in_place: write the values into ``x``; saves a third to a half of the time on large tensors.
        """
        if self.binary:
            return self.integers(x).mul_(self.scale)
        if not in_place or not x.is_contiguous() or self.scale.numel() > 1:
            return self._restore_(self._round_(x / self.scale))
        for part in torch.split(x.view(-1), _CHUNK):
            self._restore_(self._round_(part.div_(self.scale)))
        return x

    def _round_(self, q: Tensor) -> Tensor:
        if self.zero_point is not None:
            q.add_(self.zero_point)
        return q.round_().clamp_(self.low, self.high)

    def _restore_(self, q: Tensor) -> Tensor:
        if self.zero_point is not None:
            q.sub_(self.zero_point)
        return q.mul_(self.scale)


def steps_of(bits: int, *, signed: bool, narrow: bool = False, power_of_two: bool = False) -> int:
    """Into how many steps a grid divides its threshold."""
    if bits == 1 and signed:
        return 1
    if power_of_two or (signed and not narrow):
        return 1 << (bits - int(signed))
    return (1 << (bits - int(signed))) - 1


def symmetric(
    threshold: Tensor, bits: int, *, signed: bool, narrow: bool = False, power_of_two: bool = False
) -> Grid:
    """A grid around zero, or from zero upward.

    Thresholds of 0 (a channel of zeros) stand for nothing; they take the median of the others, so that a
    bias quantised at the channel's scale keeps its precision.

    Args:
        threshold: at least 0, scalar or per channel.
        bits: from 1 to 16.
        signed, narrow: as in :class:`Grid`.
        power_of_two: round the threshold so that the step is the nearest power of two (on a log scale).

    Raises:
        ValueError: as :class:`Grid`.
    """
    threshold = _without_zeros(threshold.float())
    if power_of_two:
        steps = steps_of(bits, signed=signed, narrow=narrow)
        step = torch.exp2(torch.round(torch.log2(threshold / steps)))
        threshold = step * steps_of(bits, signed=signed, narrow=narrow, power_of_two=True)
    return Grid(bits, threshold, signed, narrow, power_of_two=power_of_two)


def asymmetric(low: Tensor, high: Tensor, bits: int) -> Grid:
    """An unsigned grid with a zero point from ``low`` to ``high``; zero is always represented exactly.

    Args:
        low, high: ends of the range, scalar or per channel; widened to hold 0.
        bits: from 2 to 16.

    Raises:
        ValueError: one bit, or as :class:`Grid`.
    """
    if bits < 2:
        raise ValueError(f"an asymmetric grid needs at least 2 bits, got {bits}; use a symmetric one")
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    width = _without_zeros(high - low)
    grid = Grid(bits, width, signed=False)
    zero_point = torch.round(-low / grid.scale).clamp(0, grid.high)
    return Grid(bits, width, signed=False, zero_point=zero_point)


def has_integer_bias(bits: Bits) -> bool:
    """Whether a layer's bias is rounded to 32-bit integers at the accumulator's step.

    The step shrinks with every bit of weights and activations; above 24 in sum, 32-bit integers reach only
    some products far and common biases would be clipped, so they stay floating point.
    """
    return bits.act < 32 and bits.weight + bits.act <= _MAX_PRODUCT_BITS


def quantise_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """A bias rounded to whole multiples of the accumulator's step, as 32-bit integers hold it.

    Args:
        bias: shape (out,).
        input_scale: scalar.
        weight_scale: scalar, or one element per output channel in any shape.
    """
    step = input_scale * weight_scale.flatten()
    q = torch.round(bias / step).clamp_(-(2.0**31), 2.0**31 - 1)
    return q.mul_(step)


def _without_zeros(threshold: Tensor) -> Tensor:
    above = threshold > _NOTHING
    instead = threshold[above].median() if bool(above.any()) else torch.ones(())
    return torch.where(above, threshold, instead)
