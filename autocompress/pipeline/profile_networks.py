"""Networks that a machine is measured on: seeded draws from the families that CNNs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from autocompress.core.graph import LayerSpec
from autocompress.export.layer_bench import Chain

_SIZES = (96, 112, 128, 160, 176, 192, 208, 224)


@dataclass
class _Walk:
    """Layers appended one after the other; ``channels`` and ``size`` are what the next one reads.

    ``reads`` and ``adds`` are those of :class:`.Chain`.
    """

    channels: int
    size: int
    layers: list[LayerSpec] = field(default_factory=list)
    reads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    adds: dict[int, int] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """Number of the last layer."""
        return len(self.layers) - 1

    def conv(self, out_channels: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        after = -(-self.size // stride)
        self.layers.append(
            LayerSpec(
                f"layer{len(self.layers)}",
                "conv",
                self.channels,
                out_channels,
                (kernel, kernel),
                (stride, stride),
                groups,
                in_hw=(self.size, self.size),
                out_hw=(after, after),
                bias=True,
            )
        )
        self.channels, self.size = out_channels, after

    def block(self, convs: Callable[[], None], stride: int) -> None:
        """Convolutions with a shortcut: nothing, or a 1 x 1 convolution where sizes change."""
        source, channels, size = self.last, self.channels, self.size
        convs()
        if (channels, stride) != (self.channels, 1):
            main, wide = self.last, self.channels
            self.channels, self.size = channels, size
            self.conv(wide, stride=stride)
            self.reads[self.last] = (source,)
            source = main
        self.adds[self.last] = source

    def depthwise(self, kernel: int, stride: int) -> None:
        self.conv(self.channels, kernel, stride=stride, groups=self.channels)

    def pool(self) -> None:
        self.size //= 2

    def linear(self, out_features: int, in_features: int | None = None) -> None:
        inputs = in_features or self.channels
        self.layers.append(LayerSpec(f"layer{len(self.layers)}", "linear", inputs, out_features, bias=True))
        self.channels, self.size = out_features, 1


Draw = np.random.Generator


def _width(draw: Draw, low: float, high: float, step: int = 8) -> int:
    """A multiple of ``step``, uniform on a logarithmic scale."""
    return max(step, round(float(np.exp(draw.uniform(np.log(low), np.log(high)))) / step) * step)


def _plain(draw: Draw, walk: _Walk) -> None:
    """VGG-like: 3 x 3 convolutions between poolings, linear layers."""
    width = _width(draw, 12, 28)
    while walk.size >= 6:
        for _ in range(int(draw.integers(1, 3))):
            walk.conv(min(_width(draw, width, 1.6 * width), 640), 3)
        walk.pool()
        width = min(2 * width, 400)
    walk.linear(_width(draw, 512, 3072), walk.channels * walk.size**2)
    walk.linear(_width(draw, 512, 2048))
    walk.linear(1000)


def _basic(draw: Draw, walk: _Walk) -> None:
    """ResNet-like: a stem, stages of 3 x 3 convolutions with strides."""
    width = _width(draw, 24, 72)
    walk.conv(width, 7, stride=2)
    walk.pool()
    for stage in range(4):
        for block in range(int(draw.integers(1, 3))):
            stride = 2 if stage and not block else 1

            def convs(width: int = min(width, 576), stride: int = stride) -> None:
                walk.conv(width, 3, stride=stride)
                walk.conv(width, 3)

            walk.block(convs, stride)
        width = _width(draw, 1.5 * width, 2.2 * width)
    walk.linear(1000)


def _bottleneck(draw: Draw, walk: _Walk) -> None:
    """ResNeXt-like: 1 x 1, 3 x 3 in groups or dense, 1 x 1."""
    width, per_group = _width(draw, 32, 64, 32), int(draw.choice([0, 8, 16, 32]))
    walk.conv(width, 3, stride=2)
    for stage in range(4):
        inner = min(width, 512)
        outer = _width(draw, 2 * inner, 4 * inner)
        for block in range(int(draw.integers(1, 3))):
            stride = 1 if block else 2

            def convs(inner: int = inner, outer: int = outer, stride: int = stride) -> None:
                walk.conv(inner)
                walk.conv(inner, 3, stride=stride, groups=inner // per_group if per_group else 1)
                walk.conv(outer)

            walk.block(convs, stride)
        width = 2 * inner if stage % 2 else _width(draw, 1.5 * inner, 2 * inner, 32)
    walk.linear(1000)


def _inverted(draw: Draw, walk: _Walk) -> None:
    """MobileNetV2-like: 1 x 1 up, depthwise, 1 x 1 down."""
    width, kernel = _width(draw, 8, 24), int(draw.choice([3, 3, 5]))
    walk.conv(_width(draw, 16, 40), 3, stride=2)
    for stage in range(5):
        for block in range(int(draw.integers(1, 4))):
            before = walk.last
            walk.conv(width * int(draw.choice([3, 4, 6])))
            walk.depthwise(kernel, 1 if block or not stage else 2)
            walk.conv(width)
            if block:
                walk.adds[walk.last] = before
        width = _width(draw, 1.3 * width, 2 * width)
    walk.conv(_width(draw, 640, 1536))
    walk.linear(1000)


def _separable(draw: Draw, walk: _Walk) -> None:
    """MobileNetV1-like: depthwise and 1 x 1 in turn, with ReLU6 as in the published networks."""
    width = _width(draw, 16, 40)
    walk.conv(width, 3, stride=2)
    while walk.size > 6:
        for block in range(int(draw.integers(1, 3))):
            walk.depthwise(int(draw.choice([3, 3, 5])), 1 if block else 2)
            walk.conv(_width(draw, width, 2 * width))
        width = min(2 * width, 768)
    walk.linear(1000)


def _fire(draw: Draw, walk: _Walk) -> None:
    """SqueezeNet-like: few channels into many through 1 x 1 and 3 x 3 convolutions side by side."""
    walk.conv(_width(draw, 40, 96), 3, stride=2)
    width = _width(draw, 12, 24, 4)
    while walk.size > 8:
        walk.pool()
        for _ in range(int(draw.integers(1, 4))):
            walk.conv(width)
            squeezed = walk.last
            walk.conv(_width(draw, 2 * width, 5 * width))
            wide, walk.channels = walk.channels, width
            walk.conv(_width(draw, 2 * width, 5 * width), 3)
            walk.reads[walk.last] = (squeezed,)
            walk.channels += wide
            walk.reads[walk.last + 1] = (squeezed + 1, walk.last)
        width = _width(draw, 1.2 * width, 2 * width, 4)
    walk.conv(1000)


FAMILIES: tuple[Callable[[Draw, _Walk], None], ...] = (
    _plain,
    _basic,
    _bottleneck,
    _inverted,
    _separable,
    _fire,
)


def measured_networks(num_networks: int, *, seed: int = 0) -> dict[str, Chain]:
    """Name -> networks to measure, the families in turn; equal for equal arguments."""
    networks = {}
    for number in range(num_networks):
        draw = np.random.default_rng((seed, number))
        family = FAMILIES[number % len(FAMILIES)]
        walk = _Walk(3, int(draw.choice(_SIZES)))
        family(draw, walk)
        networks[f"{family.__name__.strip('_')}{number}"] = Chain(
            tuple(walk.layers), family in (_inverted, _separable), walk.reads, walk.adds
        )
    return networks
