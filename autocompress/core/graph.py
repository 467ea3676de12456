"""What a network is: its layers as facts, and which channels shrink together.

A :class:`LayerGraph` holds no weights. Channel counts that can change are written as a :class:`Width`:
a fixed part plus whole multiples of the sizes of channel groups, which covers chains, residual adds
(two layers naming one group), concatenations (a sum of groups), depthwise and grouped convolutions
and a flatten in front of a linear layer (a multiple of one group).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal


@dataclass(frozen=True, slots=True)
class Bits:
    """Bit-widths of one layer: its weights and the activations it reads. 32 means floating point."""

    weight: int = 32
    act: int = 32

    def __post_init__(self) -> None:
        for name in ("weight", "act"):
            value = getattr(self, name)
            if not 1 <= value <= 32:
                raise ValueError(f"bits must be between 1 and 32, got {name}={value}")


@dataclass(frozen=True, slots=True)
class Width:
    """A number of channels: ``fixed + sum(multiplicity * size of group)``.

    Args:
        fixed: channels that never change.
        terms: pairs (group name, multiplicity); a name appears at most once.
    """

    fixed: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, sizes: Mapping[str, int]) -> int:
        """The number of channels when the groups have the given sizes."""
        return self.fixed + sum(times * sizes[group] for group, times in self.terms)

    def __add__(self, other: Width) -> Width:
        times: dict[str, int] = dict(self.terms)
        for group, count in other.terms:
            times[group] = times.get(group, 0) + count
        return Width(self.fixed + other.fixed, tuple(times.items()))

    def __rmul__(self, factor: int) -> Width:
        return Width(factor * self.fixed, tuple((g, factor * n) for g, n in self.terms))


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels of one or more layers that can only be removed together.

    Args:
        name: the first layer (in execution order) that produces them.
        size: number of units; a unit is one channel, or one whole group of a grouped convolution.
        producers: names of the layers whose output channels belong to the group.
        consumers: names of the layers whose input channels belong to the group.
        locked: why the group cannot be pruned, with the remedy; None when it can.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    locked: str | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One execution of a convolution or linear layer, as facts.

    Args:
        name: dotted module name; a later call of a reused module has ``@2``, ``@3``, ... appended.
        kind: ``conv`` (1-d and 2-d, also transposed) or ``linear``.
        in_channels, out_channels: current widths (features for linear layers).
        kernel, stride: (height, width).
        groups: number of convolution groups; equal to ``in_channels`` for depthwise layers.
        in_hw, out_hw: spatial size of input and output for one sample; tokens count as height.
        bias: whether the layer adds a bias.
        in_width, out_width: how the widths follow from the sizes of the channel groups.
        reuses: name of the first call when the same module runs again (its weights are counted once).
        bits: bit-widths of weights and input activations.
    """

    name: str
    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    in_hw: tuple[int, int] = (1, 1)
    out_hw: tuple[int, int] = (1, 1)
    bias: bool = False
    in_width: Width = field(default=Width())
    out_width: Width = field(default=Width())
    transposed: bool = False
    reuses: str | None = None
    bits: Bits = Bits()

    @property
    def kernel_weights(self) -> int:
        """Number of weights the layer multiplies with, whether or not another call owns them."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def num_weights(self) -> int:
        """Number of weights (without bias); 0 when another call already counted them."""
        return 0 if self.reuses else self.kernel_weights

    @property
    def num_params(self) -> int:
        """Number of weights and biases; 0 when another call already counted them."""
        return 0 if self.reuses else self.kernel_weights + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample (1 MAC = 2 FLOPs; biases are not counted)."""
        positions = self.in_hw if self.transposed else self.out_hw
        return self.kernel_weights * positions[0] * positions[1]

    @property
    def bitops(self) -> int:
        """MACs times weight bits times activation bits."""
        return self.macs * self.bits.weight * self.bits.act

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel is convolved on its own."""
        return self.kind == "conv" and 1 < self.groups == self.in_channels

    def resized(self, sizes: Mapping[str, int]) -> LayerSpec:
        """The same layer with its widths at the given group sizes; whole convolution groups come and go."""
        in_channels, out_channels = self.in_width.at(sizes), self.out_width.at(sizes)
        if (in_channels, out_channels) == (self.in_channels, self.out_channels):
            return self
        groups = self.groups * in_channels // self.in_channels if self.groups > 1 else 1
        return replace(self, in_channels=in_channels, out_channels=out_channels, groups=groups)


@dataclass(frozen=True)
class LayerGraph:
    """A network as its layers in execution order and its channel groups.

    Args:
        layers: one entry per executed convolution or linear layer.
        groups: the channel groups, in execution order of their first producer.
        other_params: parameters outside ``layers`` (BatchNorm, PReLU, ...) as a function of group sizes.
        uncounted: operations whose arithmetic is in no layer, listed so that nobody thinks they are free.
        input_shape: shape of one sample without the batch axis, e.g. (3, 32, 32).
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[ChannelGroup, ...] = ()
    other_params: Width = Width()
    uncounted: tuple[str, ...] = ()
    input_shape: tuple[int, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Current size of every channel group."""
        return {group.name: group.size for group in self.groups}

    @cached_property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that are not locked."""
        return tuple(group for group in self.groups if group.locked is None)

    def group(self, name: str) -> ChannelGroup:
        """The group of that name.

        Raises:
            ValueError: no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f"no channel group named {name!r}; the network has {sorted(self.sizes)}")

    def with_channels(self, channels: Mapping[str, int]) -> LayerGraph:
        """The graph with some groups shrunk.

        Args:
            channels: group name -> number of units kept, from 1 to the present size.

        Raises:
            ValueError: unknown or locked group, or a number out of range.
        """
        changed = {}
        for name, kept in channels.items():
            group = self.group(name)
            if not 1 <= kept <= group.size:
                raise ValueError(f"group {name!r} keeps from 1 to {group.size} channels, got {kept}")
            if kept != group.size and group.locked is not None:
                raise ValueError(f"group {name!r} is locked: {group.locked}")
            changed[name] = kept
        sizes = self.sizes | changed
        return replace(
            self,
            layers=tuple(layer.resized(sizes) for layer in self.layers),
            groups=tuple(replace(g, size=sizes[g.name]) for g in self.groups),
        )

    def with_bits(self, bits: Mapping[str, Bits]) -> LayerGraph:
        """The graph with the bit-widths of some layers set.

        Raises:
            ValueError: unknown layer.
        """
        names = {layer.name for layer in self.layers}
        if unknown := sorted(set(bits) - names):
            raise ValueError(f"no layer named {unknown}; the network has {sorted(names)}")
        return replace(self, layers=tuple(_with_bits(layer, bits) for layer in self.layers))


def _with_bits(layer: LayerSpec, bits: Mapping[str, Bits]) -> LayerSpec:
    """A reused module has one set of weights, so its later calls take the bits of the first."""
    chosen = bits.get(layer.name) or bits.get(layer.reuses or "")
    return replace(layer, bits=chosen) if chosen else layer
