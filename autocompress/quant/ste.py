"""Rounding with straight-through gradients, and clipping thresholds that training adjusts."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autocompress.quant.grids import Grid, quantise_bias, steps_of


class LearnedGrid(nn.Module):
    """A grid whose threshold is learned; rounds to the nearest values with straight-through gradients.

    The threshold is its first value times ``exp(rate * log)``, where ``log`` is the parameter, at first 0. It
    stays above 0 whatever a step does, a step changes it by a share of itself whatever its size, and weight
    decay, which spares vectors and scalars, does not shrink it. Power-of-two grids round the exponent.

    Gradients: 1 for values inside the grid and 0 for values it clips; for the threshold that of learned step
    sizes (Esser et al., LSQ, arXiv 1902.08153, equation 3), as Brevitas derives it. Differs from the paper in
    the logarithm, which takes the place of its gradient scale, and in that whatever rounds to an end lies
    inside. Signed grids of one bit pass
    gradients up to the threshold where they round activations, and always where they round weights.

    Args:
        grid: bits, kind and first threshold. A zero point stays the integer that it is.
        rate: share of the learning rate that the threshold gets, as a square root.
        weights: whether weights are rounded, not activations.
    """

    start: Tensor

    def __init__(self, grid: Grid, *, rate: float, weights: bool = False) -> None:
        super().__init__()
        self.grid, self.rate, self.weights = grid, rate, weights
        self.rectifies = False  # whether a ReLU in front was left to this grid
        self.register_buffer("start", grid.threshold.detach().clone())
        # A vector, for what has more dimensions is a weight and decays.
        count = grid.threshold.shape[:1]
        self.log = nn.Parameter(torch.zeros(count, device=grid.threshold.device))
        self._steps = steps_of(
            grid.bits, signed=grid.signed, narrow=grid.narrow, power_of_two=grid.power_of_two
        )

    @property
    def threshold(self) -> Tensor:
        """The threshold now, in the shape of the first one."""
        log = (self.rate * self.log).reshape(self.start.shape)
        if self.grid.power_of_two:
            return self.start * torch.exp2(_Whole.apply(log / torch.tensor(2.0).log()))
        return self.start * torch.exp(log)

    @property
    def scale(self) -> Tensor:
        """The step between neighbouring values."""
        return self.scale_of(self.threshold)

    def scale_of(self, threshold: Tensor) -> Tensor:
        """The step between neighbouring values at another threshold."""
        return threshold / self._steps

    @property
    def is_unsigned(self) -> bool:
        """Whether the smallest value is 0."""
        return not self.grid.signed and self.grid.zero_point is None

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values of the grid, shape of ``x``, as float32."""
        return self.rounded(x, self.threshold)

    def rounded(self, x: Tensor, threshold: Tensor) -> Tensor:
        """As :meth:`forward`, with another threshold."""
        x, grid = x.float(), self.grid
        if grid.binary:
            return cast(Tensor, _Sign.apply(x, threshold, not self.weights))
        low = 0.0 if self.rectifies else grid.low - 0.5
        limits = (grid.low, grid.high, low)
        return cast(Tensor, _Round.apply(x, self.scale_of(threshold), grid.zero_point, limits))

    def learned(self, threshold: Tensor | None = None) -> Grid:
        """The grid with its threshold of now, or with another one, as plain numbers.

        Raises:
            ValueError: a threshold is not positive and finite.
        """
        value = (self.threshold if threshold is None else threshold).detach().clone()
        grid = self.grid
        return Grid(grid.bits, value, grid.signed, grid.narrow, grid.zero_point, grid.power_of_two)


def rounded_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """:func:`~autocompress.quant.grids.quantise_bias` with straight-through gradients for the bias alone."""
    return cast(Tensor, _Bias.apply(bias, input_scale.detach(), weight_scale.detach()))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, limits: tuple[int, int, float]
    ) -> Tensor:
        low, high, _ = limits
        y = x / scale
        if zero_point is not None:
            y.add_(zero_point)
        y.round_().clamp_(low, high)
        if zero_point is not None:
            y.sub_(zero_point)
        y.mul_(scale)
        ctx.save_for_backward(x, y, scale, zero_point)
        ctx.limits = limits
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y, scale, zero_point = ctx.saved_tensors
        _, high, lowest = ctx.limits
        shift = 0.0 if zero_point is None else zero_point
        bottom, top = (lowest - shift) * scale, (high + 0.5 - shift) * scale
        # d y / d scale = (y - x) / scale inside and y / scale outside; summed without further large tensors.
        if scale.numel() == 1:
            inside = torch.ops.aten.hardtanh_backward(gradient, x, float(bottom), float(top))
            total = torch.dot(gradient.reshape(-1), y.reshape(-1))
            total = total - torch.dot(inside.reshape(-1), x.reshape(-1))
        else:
            inside = gradient * ((x > bottom) & (x < top))
            total = (gradient * y - inside * x).flatten(1).sum(dim=1)
        return inside, total.reshape(scale.shape) / scale, None, None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, clips: bool) -> Tensor:
        signs = torch.where(x >= 0, 1.0, -1.0)
        ctx.save_for_backward(x, signs, threshold)
        ctx.clips = clips
        return signs * threshold

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, signs, threshold = ctx.saved_tensors
        inside = gradient * (x.abs() <= threshold) if ctx.clips else gradient
        total = gradient * signs
        total = total.sum() if threshold.numel() == 1 else total.flatten(1).sum(dim=1)
        return inside, total.reshape(threshold.shape), None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        return quantise_bias(bias, input_scale, weight_scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
