"""Layers as arrays, so that one formula prices one layer or a million."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from autocompress.core.graph import LayerGraph, LayerSpec

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Facts of N layers, each an int64 array of shape (N,).

    Args:
        in_channels, out_channels, groups: widths; ``groups`` counts convolution groups.
        kernel_h, kernel_w, stride_h, stride_w: of the window; 1 for linear layers.
        in_h, in_w, out_h, out_w: spatial size of one sample; tokens count as height.
        weight_bits, act_bits: bit-widths; 32 is floating point.
        linear, bias, transposed: 1 or 0.
        owns_weights: 0 for a later call of a reused module, whose weights are counted at the first.
    """

    in_channels: Ints
    out_channels: Ints
    groups: Ints
    kernel_h: Ints
    kernel_w: Ints
    stride_h: Ints
    stride_w: Ints
    in_h: Ints
    in_w: Ints
    out_h: Ints
    out_w: Ints
    weight_bits: Ints
    act_bits: Ints
    linear: Ints
    bias: Ints
    transposed: Ints
    owns_weights: Ints

    def __len__(self) -> int:
        return len(self.in_channels)

    @classmethod
    def of(cls, layers: Sequence[LayerSpec]) -> LayerTable:
        """The table of some layers, in order."""
        rows = [_row(layer) for layer in layers]
        columns = np.array(rows, dtype=np.int64).reshape(len(rows), len(fields(cls))).T
        return cls(*(np.ascontiguousarray(column) for column in columns))

    @classmethod
    def of_plans(
        cls,
        graph: LayerGraph,
        *,
        sizes: Mapping[str, Ints] | None = None,
        weight_bits: Mapping[str, Ints] | None = None,
        act_bits: Mapping[str, Ints] | None = None,
    ) -> LayerTable:
        """All layers of P variants of one graph: row ``p * len(graph.layers) + l``.

        Args:
            graph: the uncompressed network.
            sizes: channel group -> sizes, shape (P,); groups not named stay as they are.
            weight_bits, act_bits: layer -> bit-widths, shape (P,); others stay as they are.
        """
        given = [*(sizes or {}).values(), *(weight_bits or {}).values(), *(act_bits or {}).values()]
        num_plans = len(given[0]) if given else 1
        base = cls.of(graph.layers)
        tiled = {f.name: np.tile(getattr(base, f.name), (num_plans, 1)) for f in fields(cls)}
        if sizes:
            _resize(graph, sizes, tiled, num_plans)
        for column, chosen in (("weight_bits", weight_bits), ("act_bits", act_bits)):
            for index, layer in enumerate(graph.layers):
                bits = (chosen or {}).get(layer.reuses or layer.name)
                if bits is not None:
                    tiled[column][:, index] = bits
        return cls(**{name: values.reshape(-1) for name, values in tiled.items()})

    @classmethod
    def joined(cls, tables: Sequence[LayerTable]) -> LayerTable:
        """The rows of some tables, one table after the other."""
        return cls(*(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)))

    def take(self, rows: NDArray[np.int64]) -> LayerTable:
        """Some of the rows."""
        return LayerTable(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def kernel_weights(self) -> Ints:
        """Weights each layer multiplies with."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel_h * self.kernel_w

    @property
    def macs(self) -> Ints:
        """Multiply-accumulates of one sample."""
        positions = np.where(self.transposed == 1, self.in_h * self.in_w, self.out_h * self.out_w)
        return self.kernel_weights * positions

    @property
    def depthwise(self) -> NDArray[np.bool_]:
        """Whether every input channel is convolved on its own."""
        return np.asarray((self.groups > 1) & (self.groups == self.in_channels))


def ceil_div(value: Ints, divisor: Ints | int) -> Ints:
    """Quotient rounded up."""
    return -(-value // divisor)


def _row(layer: LayerSpec) -> tuple[int, ...]:
    return (
        *(layer.in_channels, layer.out_channels, layer.groups, *layer.kernel, *layer.stride),
        *(*layer.in_hw, *layer.out_hw, layer.bits.weight, layer.bits.act),
        *(int(layer.kind == "linear"), int(layer.bias), int(layer.transposed), int(layer.reuses is None)),
    )


def _resize(
    graph: LayerGraph, sizes: Mapping[str, Ints], tiled: dict[str, NDArray[np.int64]], num_plans: int
) -> None:
    current = {name: np.full(num_plans, size, dtype=np.int64) for name, size in graph.sizes.items()}
    current |= {name: np.asarray(values, dtype=np.int64) for name, values in sizes.items()}
    for index, layer in enumerate(graph.layers):
        if layer.in_width.terms:
            inputs = layer.in_width.fixed + sum(times * current[g] for g, times in layer.in_width.terms)
            if layer.groups > 1:
                tiled["groups"][:, index] = layer.groups * inputs // layer.in_channels
            tiled["in_channels"][:, index] = inputs
        if layer.out_width.terms:
            tiled["out_channels"][:, index] = layer.out_width.fixed + sum(
                times * current[g] for g, times in layer.out_width.terms
            )
