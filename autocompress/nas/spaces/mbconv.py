"""Chains of inverted residuals with a choice of kernel and expansion per block (ProxylessNAS)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from autocompress.core.errors import RecipeError
from autocompress.core.graph import LayerGraph
from autocompress.nas.spaces.operations import MBConv, Nothing, Operation, Place
from autocompress.nas.spaces.sketch import Signal, Sketch
from autocompress.nas.spaces.space import Arch, Make, Space, check_sizes, frozen
from autocompress.zoo.chains import Classifier

SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks of one width.

    Args:
        width: output channels.
        num_blocks: how many; the first one changes width and size.
        stride: of the first block, 1 or 2.
    """

    width: int
    num_blocks: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """The parts of a chain that are not searched, and its stages.

    Args:
        stem: channels of the first 3x3 convolution.
        stem_stride: its stride, 1 or 2.
        first: channels after the fixed first block (3x3, expansion 1).
        stages: of searched blocks.
        head: channels of the last 1x1 convolution.
    """

    stem: int
    stem_stride: int
    first: int
    stages: tuple[Stage, ...]
    head: int

    @property
    def num_halvings(self) -> int:
        """How often the size is halved."""
        return sum(stride == 2 for stride in (self.stem_stride, *(s.stride for s in self.stages)))


# For 224: Cai, Zhu, Han, ProxylessNAS, arXiv 1812.00332, released code (width_stages, n_cell_stages,
# stride_stages). The smaller two keep the shape of that chain at sizes that two CPU cores can search.
LAYOUTS = {
    8: Layout(16, 1, 8, (Stage(16, 2, 1), Stage(32, 2, 2)), 64),
    32: Layout(16, 1, 16, (Stage(24, 3, 1), Stage(40, 3, 2), Stage(80, 3, 2), Stage(160, 1, 1)), 320),
    224: Layout(
        32,
        2,
        16,
        (
            Stage(24, 4, 2),
            Stage(40, 4, 2),
            Stage(80, 4, 2),
            Stage(96, 4, 1),
            Stage(192, 4, 2),
            Stage(320, 1, 1),
        ),
        1280,
    ),
}


class Residual(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        out: Tensor = x + self.conv(x)
        return out


class Plain(nn.Module):
    """A block without a residual, under the same name for its layers."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return out


@dataclass(frozen=True)
class MBConvChain(Space):
    """ProxylessNAS' space: per block a kernel size and an expansion, or no block at all.

    A block can be skipped where its stride is 1 and its width does not change. Cai, Zhu, Han, arXiv
    1812.00332, section 4.2. Decisions are named ``block01``, ``block02``, ...; operations ``k5e3`` (kernel 5,
    expansion 3) and ``skip``.

    Args:
        layout: widths, depths and strides.
        input_shape: of one image, (channels, height, width).
        num_classes: number of outputs.
        kernels: odd, ascending.
        expansions: ascending.

    Raises:
        RecipeError: images too small for the halvings, or settings out of range; all faults at once.
    """

    layout: Layout
    input_shape: tuple[int, int, int]
    num_classes: int
    kernels: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (3, 6)
    name: str = "mbconv_chain"

    def __post_init__(self) -> None:
        stages = self.layout.stages
        faults = []
        if not stages or any(s.width < 1 or s.num_blocks < 1 or s.stride not in (1, 2) for s in stages):
            faults.append(
                f"{self.name}: stages need width and num_blocks >= 1 and stride 1 or 2, got {stages}"
            )
        for key, values, low in (("kernels", self.kernels, 1), ("expansions", self.expansions, 1)):
            ascending = list(values) == sorted(set(values)) and min(values, default=0) >= low
            if not ascending or (key == "kernels" and any(k % 2 == 0 for k in values)):
                kind = "odd, ascending" if key == "kernels" else "ascending"
                faults.append(f"{self.name}: {key} must be {kind} and >= {low}, got {values}")
        if faults:
            raise RecipeError(faults)
        check_sizes(self.name, self.input_shape, self.num_classes, num_halvings=self.layout.num_halvings)

    @cached_property
    def operations(self) -> Mapping[str, Operation]:
        """See :class:`Space`."""
        found: dict[str, Operation] = {SKIP: Nothing()}
        return found | {f"k{k}e{e}": MBConv(k, e) for e in self.expansions for k in self.kernels}

    @cached_property
    def decisions(self) -> Mapping[str, tuple[str, ...]]:
        """See :class:`Space`."""
        names = tuple(self.operations)
        return frozen({p.decision: names if _residual(p) else names[1:] for p in self.places})

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """See :class:`Space`."""
        layout, found = self.layout, list[Place]()
        width, hw = layout.first, _divided(self.input_shape[1:], layout.stem_stride)
        for stage in layout.stages:
            for index in range(stage.num_blocks):
                stride, name = (stage.stride if index == 0 else 1), f"block{len(found) + 1:02d}"
                found.append(Place(name, f"features.{name}.conv", width, stage.width, stride, hw))
                width, hw = stage.width, _divided(hw, stride)
        return tuple(found)

    @property
    def _first(self) -> Place:
        hw = _divided(self.input_shape[1:], self.layout.stem_stride)
        return Place("", "features.first", self.layout.stem, self.layout.first, 1, hw)

    def assemble(self, make: Make) -> nn.Module:
        """See :class:`Space`."""
        layout, places = self.layout, self.places
        stem = nn.Conv2d(self.input_shape[0], layout.stem, 3, layout.stem_stride, 1, bias=False)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["stem"] = nn.Sequential(stem, nn.BatchNorm2d(layout.stem), nn.ReLU6())
        parts["first"] = MBConv(3, 1).module(self._first)
        for place in places:
            block = make(place)
            if block is not None:
                parts[place.decision] = Residual(block) if _residual(place) else Plain(block)
        head = nn.Conv2d(places[-1].out_channels, layout.head, 1, bias=False)
        parts["head"] = nn.Sequential(head, nn.BatchNorm2d(layout.head), nn.ReLU6())
        return Classifier(nn.Sequential(parts), layout.head, self.num_classes)

    def graph(self, arch: Arch) -> LayerGraph:
        """See :class:`Space`."""
        self.check(arch)
        layout, sketch = self.layout, Sketch(self.input_shape)
        x = sketch.conv("features.stem.0", sketch.input, layout.stem, kernel=3, stride=layout.stem_stride)
        x = MBConv(3, 1).sketch(sketch, self._first, sketch.norm("features.stem.1", x))
        for place in self.places:
            if arch[place.decision] != SKIP:
                out: Signal = self.operations[arch[place.decision]].sketch(sketch, place, x)
                x = sketch.add(x, out) if _residual(place) else out
        x = sketch.norm("features.head.1", sketch.conv("features.head.0", x, layout.head))
        sketch.linear("classifier", x, self.num_classes)
        return sketch.graph()


def mbconv_chain(input_shape: tuple[int, int, int], num_classes: int, *, width: float = 1.0) -> MBConvChain:
    """The chain whose layout suits images of that size: the largest layout that is no larger than they are.

    Args:
        input_shape: of one image, (channels, height, width).
        num_classes: number of outputs.
        width: multiplies the channels of the skeleton, which are then rounded to multiples of 8 (the width
            multiplier of Howard et al., arXiv 1704.04861, section 3.3).

    Raises:
        RecipeError: images smaller than every layout, or that cannot be halved as often as the layout does;
            a width that is not positive.

    Example:
        >>> space = mbconv_chain((1, 8, 8), 10)
        >>> space.num_members, space.decisions["block01"]
        (1764, ('k3e3', 'k5e3', 'k7e3', 'k3e6', 'k5e6', 'k7e6'))
    """
    if not 0 < width < math.inf:
        raise RecipeError(f"mbconv_chain: width must be > 0 and finite, got {width}")
    fitting = [size for size in LAYOUTS if size <= min(input_shape[1:])]
    if not fitting:
        raise RecipeError(
            f"mbconv_chain has layouts for images of {', '.join(map(str, LAYOUTS))} pixels and more, got "
            f"{input_shape[1]}x{input_shape[2]}; give MBConvChain a Layout with fewer strides of 2"
        )
    return MBConvChain(_scaled(LAYOUTS[max(fitting)], width), input_shape, num_classes)


def _scaled(layout: Layout, width: float) -> Layout:
    if width == 1:
        return layout

    def channels(count: int) -> int:
        return max(8, 8 * round(count * width / 8))

    return Layout(
        channels(layout.stem),
        layout.stem_stride,
        channels(layout.first),
        tuple(replace(stage, width=channels(stage.width)) for stage in layout.stages),
        channels(layout.head),
    )


def _residual(place: Place) -> bool:
    return place.stride == 1 and place.in_channels == place.out_channels


def _divided(hw: tuple[int, int], stride: int) -> tuple[int, int]:
    return hw[0] // stride, hw[1] // stride
