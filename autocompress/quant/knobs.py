"""The decisions of mixed precision: bits of each layer's weights, and of the activations it reads."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from autocompress.core.graph import Bits, LayerGraph, LayerSpec
from autocompress.core.problem import Knob
from autocompress.quant.grids import MAX_BITS

FirstLast = Literal["pin", "input", "free"]
BIT_CHOICES = (2, 3, 4, 5, 6, 7, 8)
PINNED_BITS = 8
"""Of the sides that ``first_last`` takes from the search; an image has as many."""


def bit_knobs(
    graph: LayerGraph,
    *,
    weight_bits: Sequence[int] = BIT_CHOICES,
    act_bits: Sequence[int] = BIT_CHOICES,
    first_last: FirstLast = "pin",
    keep: Sequence[str] = (),
) -> tuple[Knob, ...]:
    """Two knobs per layer in execution order: bits of its weights, then of the activations it reads.

    A side that is pinned, kept, or has a single choice is no decision and gets no knob; the bits it has are
    those of :func:`reference_bits`, which belong into ``Problem.base``.

    The features are HAQ's nine static observations, scaled to [0, 1] over the knobs: (depthwise, input
    channels, output channels, stride, kernel size, weights, input area, index, 1 for weights and 0 for
    activations); linear layers have stride 0 and kernel size 1. ``MixedPrecisionEnv`` adds the last action.

    Args:
        graph: the network.
        weight_bits: widths to choose from, ascending; the last leaves the network unchanged. Offer what the
            target tells apart: a machine that rounds 3 bits up to 4 gains nothing from 3.
        act_bits: likewise; none where only the size of the weights matters.
        first_last: ``pin`` takes both sides of the first and the last layer from the search (HAQ), ``input``
            only what the first layer reads (an image, for binary networks), ``free`` nothing.
        keep: shell patterns of layers that are not decided.

    Raises:
        ValueError: widths out of range or order, an unknown rule, a pattern that matches nothing; all at
            once.

    Source: Wang et al., "HAQ", CVPR 2019, section 3.1, and its released code. Differs from the code in that
    the scale is taken over the decided layers only.
    """
    _check(graph, weight_bits, act_bits, first_last=first_last, keep=keep)
    layers = _own_layers(graph)
    pinned = _pinned(layers, first_last)
    decisions = [
        (index, layer, side, tuple(choices))
        for index, layer in enumerate(layers)
        for side, choices in (("weight_bits", weight_bits), ("act_bits", act_bits))
        if len(choices) > 1
        and (layer.name, side) not in pinned
        and not any(fnmatchcase(layer.name, pattern) for pattern in keep)
    ]
    rows = [(*_facts(layer), index, side == "weight_bits") for index, layer, side, _ in decisions]
    return tuple(
        Knob("weight_bits" if side == "weight_bits" else "act_bits", layer.name, choices, features)
        for (_, layer, side, choices), features in zip(decisions, _scaled(rows), strict=True)
    )


def reference_bits(
    graph: LayerGraph,
    *,
    weight_bits: Sequence[int] = BIT_CHOICES,
    act_bits: Sequence[int] = BIT_CHOICES,
    first_last: FirstLast = "pin",
) -> dict[str, Bits]:
    """Bits of every layer before any decision: the last choices, and 8 for what ``first_last`` pins.

    Without ``act_bits`` activations stay floating point, pinned or not.

    Args:
        graph, weight_bits, act_bits, first_last: as for :func:`bit_knobs`.
    """
    _check(graph, weight_bits, act_bits, first_last=first_last, keep=())
    layers = _own_layers(graph)
    pinned = _pinned(layers, first_last)

    def side(layer: LayerSpec, name: str, choices: Sequence[int]) -> int:
        if not choices:
            return 32
        return PINNED_BITS if (layer.name, name) in pinned else choices[-1]

    return {
        layer.name: Bits(side(layer, "weight_bits", weight_bits), side(layer, "act_bits", act_bits))
        for layer in layers
    }


def _own_layers(graph: LayerGraph) -> list[LayerSpec]:
    """Without later calls of a module, which take the bits of its first."""
    return [layer for layer in graph.layers if not layer.reuses]


def _pinned(layers: Sequence[LayerSpec], first_last: FirstLast) -> set[tuple[str, str]]:
    """The pairs (layer, side) that are not searched."""
    if first_last == "free" or not layers:
        return set()
    first, last = layers[0].name, layers[-1].name
    if first_last == "input":
        return {(first, "act_bits")}
    return {(name, side) for name in (first, last) for side in ("weight_bits", "act_bits")}


def _facts(layer: LayerSpec) -> tuple[float, ...]:
    linear = layer.kind == "linear"
    return (
        float(layer.is_depthwise),
        layer.in_channels,
        layer.out_channels,
        0 if linear else layer.stride[0],
        1 if linear else layer.kernel[0],
        layer.kernel_weights,
        layer.in_hw[0] * layer.in_hw[1],
    )


def _scaled(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Every column from 0 to 1; a column of one value becomes 0, but for the last, which is a flag."""
    if not rows:
        return []
    table = np.array(rows, dtype=np.float64)
    low, span = table.min(axis=0), np.ptp(table, axis=0)
    low[-1], span[-1] = 0.0, 1.0
    scaled = np.where(span > 0, (table - low) / np.where(span > 0, span, 1), 0.0)
    return [tuple(row) for row in scaled.tolist()]


def _check(
    graph: LayerGraph,
    weight_bits: Sequence[int],
    act_bits: Sequence[int],
    *,
    first_last: str,
    keep: Sequence[str],
) -> None:
    faults = []
    for name, choices in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        known = all(1 <= bits <= MAX_BITS or bits == 32 for bits in choices)
        if not known or any(b <= a for a, b in pairwise(choices)):
            faults.append(f"{name} must ascend, from 1 to {MAX_BITS} or 32 (float), got {list(choices)}")
    if not weight_bits:
        faults.append("weight_bits must offer at least one width")
    if first_last not in get_args(FirstLast):
        faults.append(f"first_last must be one of {', '.join(get_args(FirstLast))}, got {first_last!r}")
    names = [layer.name for layer in _own_layers(graph)]
    if unmatched := [p for p in keep if not any(fnmatchcase(name, p) for name in names)]:
        faults.append(f"keep patterns {unmatched} match no layer; layers are {names}")
    if faults:
        raise ValueError("; ".join(faults))
