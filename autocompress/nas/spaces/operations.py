"""The operations that search spaces choose between: each as a module and as layers of a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from autocompress.nas.spaces.sketch import Signal, Sketch


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operation runs in a network.

    Args:
        decision: the decision that chooses the operation; several places can share one.
        path: dotted name of the operation's module.
        in_channels, out_channels: of the operation.
        stride: 1 or 2.
        hw: size of its input, (height, width).
    """

    decision: str
    path: str
    in_channels: int
    out_channels: int
    stride: int
    hw: tuple[int, int]


class Operation(Protocol):
    """One choice of a decision."""

    def module(self, place: Place) -> nn.Module:
        """Fresh weights; maps (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        ...

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """The same as layers of a graph."""
        ...


class Zeros(nn.Module):
    """Nothing: zeros of the shape that the other operations give.

    Args:
        stride: of the operations in whose place it stands; the number of channels must not change.
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to zeros (N, C, H / stride, W / stride)."""
        x = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        return x * 0.0


class FactorizedReduce(nn.Module):
    """Halves the size with two 1x1 convolutions that read the even and the odd positions.

    Liu et al., DARTS, arXiv 1806.09055, released code (``operations.py``).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) with even H and W to (N, out_channels, H / 2, W / 2)."""
        x = self.relu(x)
        out: Tensor = self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))
        return out

    @staticmethod
    def sketch(sketch: Sketch, path: str, x: Signal, channels: int) -> Signal:
        """The same as layers of a graph."""
        even = sketch.conv(f"{path}.even", x, channels // 2, stride=2)
        shifted = replace(x, hw=(x.hw[0] - 1, x.hw[1] - 1))
        odd = sketch.conv(f"{path}.odd", shifted, channels - channels // 2, stride=2)
        return sketch.norm(f"{path}.norm", sketch.concat([even, odd]))


def relu_conv_bn(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """ReLU, a convolution that keeps the size at stride 1, and BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out_channels))


def sketch_relu_conv_bn(
    sketch: Sketch, path: str, x: Signal, channels: int, *, kernel: int = 1, stride: int = 1
) -> Signal:
    """The layers of :func:`relu_conv_bn`."""
    x = sketch.conv(f"{path}.1", x, channels, kernel=kernel, stride=stride)
    return sketch.norm(f"{path}.2", x)


@dataclass(frozen=True, slots=True)
class Nothing:
    """``none``: zeros."""

    def module(self, place: Place) -> nn.Module:
        """See :class:`Operation`."""
        return Zeros(place.stride)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`Operation`."""
        return sketch.pool(x, place.stride)


@dataclass(frozen=True, slots=True)
class SkipConnect:
    """Identity; at stride 2 a :class:`FactorizedReduce`."""

    def module(self, place: Place) -> nn.Module:
        """See :class:`Operation`."""
        if place.stride == 1:
            return nn.Identity()
        return FactorizedReduce(place.in_channels, place.out_channels)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`Operation`."""
        return x if place.stride == 1 else FactorizedReduce.sketch(sketch, place.path, x, place.out_channels)


@dataclass(frozen=True, slots=True)
class Pool:
    """3x3 pooling; an average counts only positions inside the image."""

    kind: str

    def module(self, place: Place) -> nn.Module:
        """See :class:`Operation`."""
        if self.kind == "max":
            return nn.MaxPool2d(3, place.stride, 1)
        return nn.AvgPool2d(3, place.stride, 1, count_include_pad=False)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`Operation`."""
        return sketch.pool(x, place.stride)


@dataclass(frozen=True, slots=True)
class ConvBN:
    """ReLU, a dense convolution and BatchNorm."""

    kernel: int

    def module(self, place: Place) -> nn.Module:
        """See :class:`Operation`."""
        return relu_conv_bn(place.in_channels, place.out_channels, self.kernel, place.stride)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`Operation`."""
        return sketch_relu_conv_bn(
            sketch, place.path, x, place.out_channels, kernel=self.kernel, stride=place.stride
        )


@dataclass(frozen=True, slots=True)
class Separable:
    """ReLU, depthwise and pointwise convolution, BatchNorm, ``repeats`` times; the first has the stride.

    Liu et al., arXiv 1806.09055, section 3.1: separable convolutions are applied twice, dilated ones once
    with dilation 2.
    """

    kernel: int
    dilation: int
    repeats: int

    def module(self, place: Place) -> nn.Module:
        """See :class:`Operation`."""
        layers: list[nn.Module] = []
        pad = self.dilation * (self.kernel // 2)
        for index in range(self.repeats):
            inputs = place.in_channels
            outputs = place.out_channels if index == self.repeats - 1 else inputs
            stride = place.stride if index == 0 else 1
            depthwise = nn.Conv2d(
                inputs, inputs, self.kernel, stride, pad, self.dilation, groups=inputs, bias=False
            )
            pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
            layers += [nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(outputs)]
        return nn.Sequential(*layers)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`Operation`."""
        for index in range(self.repeats):
            outputs = place.out_channels if index == self.repeats - 1 else x.channels
            stride, name = (place.stride if index == 0 else 1), place.path
            first = 4 * index + 1
            x = sketch.conv(
                f"{name}.{first}", x, x.channels, kernel=self.kernel, stride=stride, depthwise=True
            )
            x = sketch.norm(f"{name}.{first + 2}", sketch.conv(f"{name}.{first + 1}", x, outputs))
        return x


@dataclass(frozen=True, slots=True)
class MBConv:
    """Expand by 1x1, filter depthwise, project by 1x1, each with BatchNorm and the first two with ReLU6.

    Sandler et al., arXiv 1801.04381, table 1, with a kernel size; no expansion layer at ``expand`` 1. The
    residual is outside.
    """

    kernel: int
    expand: int

    def module(self, place: Place) -> nn.Module:
        """See :class:`Operation`."""
        hidden = place.in_channels * self.expand
        return inverted_residual(place, self.kernel, hidden, expands=self.expand != 1)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`Operation`."""
        hidden, path, index = place.in_channels * self.expand, place.path, 0
        if self.expand != 1:
            x = sketch.norm(f"{path}.1", sketch.conv(f"{path}.0", x, hidden))
            index = 3
        x = sketch.conv(f"{path}.{index}", x, hidden, kernel=self.kernel, stride=place.stride, depthwise=True)
        x = sketch.norm(f"{path}.{index + 1}", x)
        x = sketch.conv(f"{path}.{index + 3}", x, place.out_channels)
        return sketch.norm(f"{path}.{index + 4}", x)


def inverted_residual(place: Place, kernel: int, hidden: int, *, expands: bool = True) -> nn.Sequential:
    """The layers of :class:`MBConv` with any number of channels inside.

    Args:
        place: where it runs.
        kernel: of the depthwise convolution.
        hidden: its channels.
        expands: whether a 1x1 convolution makes them; without, they are the input's.
    """
    layers: list[nn.Module] = []
    if expands:
        layers += [nn.Conv2d(place.in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
    depthwise = nn.Conv2d(hidden, hidden, kernel, place.stride, kernel // 2, groups=hidden, bias=False)
    layers += [depthwise, nn.BatchNorm2d(hidden), nn.ReLU6()]
    project = nn.Conv2d(hidden, place.out_channels, 1, bias=False)
    return nn.Sequential(*layers, project, nn.BatchNorm2d(place.out_channels))


CELL_OPERATIONS: dict[str, Operation] = {
    "none": Nothing(),
    "skip_connect": SkipConnect(),
    "avg_pool_3x3": Pool("avg"),
    "max_pool_3x3": Pool("max"),
    "nor_conv_1x1": ConvBN(1),
    "nor_conv_3x3": ConvBN(3),
    "dil_conv_3x3": Separable(3, 2, 1),
    "dil_conv_5x5": Separable(5, 2, 1),
    "sep_conv_3x3": Separable(3, 1, 2),
    "sep_conv_5x5": Separable(5, 1, 2),
}
"""Names as in the released code of DARTS and NAS-Bench-201."""
