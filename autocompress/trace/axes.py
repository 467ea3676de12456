"""Where the channels of a tensor are after its shape has changed.

A tensor is described by one entry per axis: None when no index of the axis ever goes, else the unit of every
index. An element goes when the unit of any of its indices goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.trace.units import FIXED, Labels, Units

Axis = Labels | None
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Context:
    """Who asks, for statements about units.

    Args:
        units: takes the statements.
        where: the operation and its module, in words.
        split_inside: which of two axes shrinks when one axis of channels is split into two and nothing tells
            which: the inner one (``view(n, 2, c // 2)``) or the outer one (``view(n, c // 2, 2)``).
        splits: gets an entry for every such choice.
    """

    units: Units
    where: str
    split_inside: bool
    splits: list[str]

    def lock(self, axis: Axis, reason: str) -> None:
        """Lock the units of an axis; the reason follows the name of the operation."""
        self.units.lock(axis, f"{self.where} {reason}")

    def tie(self, table: Labels, *, along: int = 0) -> Labels:
        """Make units with the same index along one axis of a table one; returns one unit per index."""
        rows = np.moveaxis(table, along, 0).reshape(table.shape[along], -1)
        self.units.join(rows[:, :1], rows, f"{self.where} ties these channels to some that never go")
        return rows[:, 0].copy()


def merged(context: Context, axes: Sequence[tuple[Axis, int]], size: int) -> Axis:
    """An axis of operands that meet index by index.

    Args:
        context: who asks.
        axes: labels and length of the axis in every operand that has it.
        size: length in the result; operands of length 1 are repeated.
    """
    labelled = [labels for labels, length in axes if labels is not None and length == size]
    for labels, length in axes:
        if length != size:
            context.lock(labels, "repeats this one channel")
    if not labelled:
        return None
    for other in labelled[1:]:
        context.units.join(
            labelled[0], other, f"{context.where} combines these channels with some that never go"
        )
    if size > 1 and any(labels is None for labels, length in axes if length == size):
        context.lock(np.concatenate(labelled), "combines these channels with a tensor of fixed size")
    return labelled[0]


def reshaped(
    context: Context, axes: Axes, old: Sequence[int], new: Sequence[int], *, free: int | None = None
) -> Axes:
    """The axes of a tensor after a view or reshape.

    Args:
        context: who asks.
        axes: before.
        old, new: shapes before and after.
        free: the axis whose length was left open (-1), if any.
    """
    result: list[Axis] = [None] * len(new)
    if math.prod(old) == 0:
        for axis in axes:
            context.lock(axis, "changes the shape of an empty tensor")
        return tuple(result)
    for axis, length in zip(axes, old, strict=True):
        if length == 1:
            context.lock(axis, "drops the axis of this one channel")
    for inside, outside in _blocks(old, new):
        labelled = [i for i in inside if axes[i] is not None]
        if len(labelled) > 1:
            for i in labelled:
                context.lock(axes[i], "merges two axes of channels into one")
        elif labelled:
            position = inside.index(labelled[0])
            shape = [old[i] if k == position else 1 for k, i in enumerate(inside)]
            labels = axes[labelled[0]]
            assert labels is not None
            table = np.broadcast_to(labels.reshape(shape), [old[i] for i in inside])
            kept, found = _along_one(context, table.reshape([new[j] for j in outside]), outside, free)
            result[kept] = found
    return tuple(result)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes, without those of length 1, that hold the same number of elements."""
    before = [i for i, length in enumerate(old) if length != 1]
    after = [j for j, length in enumerate(new) if length != 1]
    blocks = []
    while before and after:
        inside, outside = [before.pop(0)], [after.pop(0)]
        a, b = old[inside[0]], new[outside[0]]
        while a != b:
            if a < b:
                inside.append(before.pop(0))
                a *= old[inside[-1]]
            else:
                outside.append(after.pop(0))
                b *= new[outside[-1]]
        blocks.append((inside, outside))
    return blocks


def _along_one(context: Context, table: Labels, axes: Sequence[int], free: int | None) -> tuple[int, Labels]:
    """Give the units of a block to one of its axes, tying units where one axis does not tell them apart."""
    varying = [k for k in range(table.ndim) if (table != table.take([0], axis=k)).any()]
    if not varying:
        chosen = int(np.argmax(table.shape))
    elif len(varying) == 1:
        chosen = varying[0]
    else:
        open_ = [k for k in varying if axes[k] == free]
        if not open_:
            context.splits.append(context.where)
        chosen = open_[0] if open_ else varying[-1 if context.split_inside else 0]
    return axes[chosen], context.tie(table, along=chosen)


def cut(context: Context, labels: Labels, start: int, length: int, step: int = 1) -> Axis:
    """Part of an axis.

    Equal parts (``chunk``, ``x[:, : c // 2]``) stay equal parts: what goes from one goes from all. Any other
    cut is at a place that the channels before it must not move.
    """
    part = labels[start : start + length * step : step][:length]
    if step == 1 and length and len(labels) % length == 0 and start % length == 0:
        if length < len(labels):
            context.tie(labels.reshape(-1, length), along=1)
        return part
    context.lock(labels, "takes channels at fixed places")
    return None if (part == FIXED).all() else part
