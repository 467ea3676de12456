"""The decisions of channel pruning: one knob per prunable channel group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from autocompress.core.graph import ChannelGroup, LayerGraph, LayerSpec
from autocompress.core.problem import Knob


def channel_knobs(
    graph: LayerGraph, *, round_to: int = 8, min_keep: float = 0.2, keep: Sequence[str] = ()
) -> tuple[Knob, ...]:
    """One knob per group that may shrink, in execution order.

    Choices are the multiples of ``round_to`` channels from ``min_keep`` of the group upward, and the full
    size; a group too small for two multiples gets finer steps, so that it stays a decision.

    The features are AMC's eight static observations of the layer that produces the group, scaled to [0, 1]
    over the knobs: (t, n, c, h, w, stride, k, MACs). Differs from the paper in that the knob is the *output*
    width of a group (AMC: the input width of a layer; the two name the same channels), and that MACs are
    those of all layers that touch the group.

    Args:
        graph: the uncompressed network.
        round_to: channels per step; 8 suits most hardware.
        min_keep: smallest share of a group that stays, in (0, 1].
        keep: shell patterns of layer or group names that must not be pruned.

    Raises:
        ValueError: ``round_to`` below 1, ``min_keep`` outside (0, 1], or a pattern that matches nothing.
    """
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    if not 0 < min_keep <= 1:
        raise ValueError(f"min_keep must be in (0, 1], got {min_keep}")
    names = {name for group in graph.groups for name in (group.name, *group.producers, *group.consumers)}
    unmatched = [p for p in keep if not any(fnmatchcase(name, p) for name in names)]
    if unmatched:
        raise ValueError(f"keep patterns {unmatched} match no layer; layers are {sorted(names)}")
    groups = [g for g in graph.prunable if not _kept(g, keep)]
    choices = [_choices(graph, group, round_to, min_keep) for group in groups]
    pairs = [(group, c) for group, c in zip(groups, choices, strict=True) if len(c) > 1]
    features = _features(graph, [group for group, _ in pairs])
    return tuple(
        Knob("channels", group.name, options, row)
        for (group, options), row in zip(pairs, features, strict=True)
    )


def _kept(group: ChannelGroup, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for name in (group.name, *group.producers) for p in patterns)


def _choices(graph: LayerGraph, group: ChannelGroup, round_to: int, min_keep: float) -> tuple[int, ...]:
    producer = _layer(graph, group)
    per_unit = dict(producer.out_width.terms).get(group.name, 1)
    step = max(1, min(round_to // per_unit, group.size // 4))
    least = max(1, math.ceil(min_keep * group.size))
    multiples = range(-(-least // step) * step, group.size, step)
    return (*multiples, group.size)


def _layer(graph: LayerGraph, group: ChannelGroup) -> LayerSpec:
    first = (group.producers or group.consumers)[0]
    return next(layer for layer in graph.layers if layer.name == first)


def _features(graph: LayerGraph, groups: Sequence[ChannelGroup]) -> list[tuple[float, ...]]:
    rows = []
    for t, group in enumerate(groups):
        layer = _layer(graph, group)
        touched = {*group.producers, *group.consumers}
        macs = sum(x.macs for x in graph.layers if (x.reuses or x.name) in touched)
        size = (layer.out_channels, layer.in_channels, *layer.in_hw)
        rows.append((t, *size, layer.stride[0], layer.kernel[0], macs))
    table = np.array(rows, dtype=float).reshape(len(rows), 8)
    if not len(table):
        return []
    low, span = table.min(axis=0), np.ptp(table, axis=0)
    scaled = np.where(span > 0, (table - low) / np.where(span > 0, span, 1), 0.0)
    return [tuple(float(v) for v in row) for row in scaled]
