"""What torch operations do to the channels of their operands, one rule per kind of operation.

A rule gets an :class:`Operation` that has just run and returns the axes of its result, or of each tensor of
it. On the way it says which units are one and which must stay. Operations without a rule are split by PyTorch
into simpler ones where they can be; what is left is opaque: the channels it reads must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autocompress.trace.axes import Axes, Axis, Context, cut, merged, reshaped
from autocompress.trace.layers import tensors_in
from autocompress.trace.units import FIXED


@dataclass(frozen=True)
class Operation(Context):
    """One operation that ran.

    Args:
        name: without namespace and in-place mark, e.g. ``relu``.
        args: all arguments by their name in the operation's schema, defaults included.
        out: the result.
        axes_of: the axes of a tensor.
        names: names of the parameters and buffers among the operands.
    """

    name: str
    args: Mapping[str, Any]
    out: Any
    axes_of: Callable[[Tensor], Axes]
    names: tuple[str, ...] = ()

    @property
    def operands(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return tensors_in(list(self.args.values()))

    @property
    def first(self) -> Tensor:
        """The tensor that the operation is about."""
        return self.operands[0]


Rule = Callable[[Operation], Axes | list[Axes]]


def opaque(op: Operation) -> list[Axes]:
    """Nothing is known of the operation: what it reads must stay."""
    with_ = f" with {', '.join(map(repr, op.names))}" if op.names else ""
    for tensor in op.operands:
        for axis in op.axes_of(tensor):
            op.lock(
                axis, f"computes on these channels{with_} outside a layer module; make it one or leave them"
            )
    return [(None,) * tensor.dim() for tensor in tensors_in(op.out)]


def elementwise(op: Operation) -> list[Axes]:
    """Operands are lined up from the last axis and repeated where they have length 1."""
    tensors = [(op.axes_of(t), tuple(t.shape)) for t in op.operands]
    return [_broadcast(op, tensors, tuple(out.shape)) for out in tensors_in(op.out)]


def _broadcast(
    op: Operation, tensors: Sequence[tuple[Axes, tuple[int, ...]]], shape: tuple[int, ...]
) -> Axes:
    result: list[Axis] = []
    for place in range(-len(shape), 0):
        here = [(axes[place], sizes[place]) for axes, sizes in tensors if len(sizes) >= -place]
        result.append(merged(op, here, shape[place]))
    return tuple(result)


def like(op: Operation) -> Axes:
    """A new tensor of the size of another."""
    return op.axes_of(op.first)


def over_positions(op: Operation) -> list[Axes]:
    """Pooling, resampling and padding of the last axes: whole channels go in and come out."""
    spatial = int(op.name.replace("_with_indices", "").rstrip("d")[-1])
    axes = op.axes_of(op.first)
    for axis in axes[-spatial:]:
        op.lock(axis, "mixes these channels, as it takes them for positions")
    return [axes[:-spatial] + (None,) * spatial for _ in tensors_in(op.out)]


def reduce(op: Operation) -> list[Axes]:
    """Sums, means, maxima: an axis that is summed up must stay."""
    axes, gone = op.axes_of(op.first), _dims(op)
    for i in gone:
        op.lock(axes[i], "mixes its channels, so removing some changes the result")
    if op.args.get("keepdim"):
        kept = tuple(None if i in gone else axis for i, axis in enumerate(axes))
    else:
        kept = tuple(axis for i, axis in enumerate(axes) if i not in gone)
    return [kept for _ in tensors_in(op.out)]


def along(op: Operation) -> list[Axes]:
    """Softmax, sorting, reversal, ...: the axis they work along must stay."""
    axes, mixed = op.axes_of(op.first), _dims(op)
    for i in mixed:
        op.lock(axes[i], "mixes or re-orders these channels")
    kept = tuple(None if i in mixed else axis for i, axis in enumerate(axes))
    return [kept for _ in tensors_in(op.out)]


def normalise_last(op: Operation) -> list[Axes]:
    """LayerNorm: the normalised axes are the last ones."""
    axes, count = op.axes_of(op.first), len(op.args["normalized_shape"])
    for axis in axes[-count:]:
        op.lock(axis, "normalises over its channels, so removing some changes the others")
    return [axes[:-count] + (None,) * count] + [(None,) * t.dim() for t in tensors_in(op.out)[1:]]


def normalise_groups(op: Operation) -> list[Axes]:
    """GroupNorm: channels are normalised together."""
    axes = op.axes_of(op.first)
    for axis in axes[1:]:
        op.lock(axis, "normalises over its channels, so removing some changes the others")
    return [axes[:1] + (None,) * (len(axes) - 1)] + [(None,) * t.dim() for t in tensors_in(op.out)[1:]]


def normalise_each(op: Operation) -> list[Axes]:
    """BatchNorm and InstanceNorm as functions: statistics and scales per channel."""
    axes = list(op.axes_of(op.first))
    if len(axes) > 1:
        own = [(op.axes_of(t)[0], len(t)) for t in op.operands[1:] if t.dim() == 1]
        axes[1] = merged(op, [(axes[1], op.first.shape[1]), *own], op.first.shape[1])
    return [tuple(axes)] + [(None,) * t.dim() for t in tensors_in(op.out)[1:]]


def product(op: Operation) -> Axes:
    """Matrix products of activations, as in attention: what is summed over must stay."""
    a, b = op.operands[:2]
    left, right = op.axes_of(a), op.axes_of(b)
    if a.dim() < 2 or b.dim() < 2:
        return opaque(op)[0]
    for axis in (left[-1], right[-2]):
        op.lock(axis, "multiplies activations and sums over these channels, as attention does")
    stacks = [(left[:-2], tuple(a.shape[:-2])), (right[:-2], tuple(b.shape[:-2]))]
    return (*_broadcast(op, stacks, tuple(op.out.shape[:-2])), left[-2], right[-1])


def attention(op: Operation) -> Axes:
    """Scaled dot products: the width of queries and keys sets the scale, that of values passes through."""
    query, key, value = (op.args[name] for name in ("query", "key", "value"))
    q, k, v = (op.axes_of(tensor) for tensor in (query, key, value))
    for axis in (q[-1], *k[-2:], v[-2]):
        op.lock(axis, "is attention, which sums over these channels")
    stacks = [(axes[:-2], tuple(t.shape[:-2])) for axes, t in ((q, query), (k, key), (v, value))]
    return (*_broadcast(op, stacks, tuple(op.out.shape[:-2])), q[-2], v[-1])


def view(op: Operation) -> Axes:
    """The same elements in another shape."""
    if "dtype" in op.args:
        return opaque(op)[0]
    requested = op.args.get("size", op.args.get("shape", ()))
    free = next((i for i, length in enumerate(requested) if length == -1), None)
    return reshaped(op, op.axes_of(op.first), op.first.shape, op.out.shape, free=free)


def permute(op: Operation) -> Axes:
    """Axes in another order."""
    axes = op.axes_of(op.first)
    return tuple(axes[i] for i in op.args["dims"])


def transpose(op: Operation) -> Axes:
    """Two axes exchanged."""
    axes = list(op.axes_of(op.first))
    i, j = op.args.get("dim0", 0), op.args.get("dim1", -1)
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


def squeeze(op: Operation) -> Axes:
    """Axes of length 1 dropped."""
    axes, sizes = op.axes_of(op.first), op.first.shape
    asked = _dims(op) if "dim" in op.args else range(len(axes))
    gone = [i for i in asked if sizes[i] == 1]
    for i in gone:
        op.lock(axes[i], "drops the axis of this one channel")
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def unsqueeze(op: Operation) -> Axes:
    """An axis of length 1 added."""
    axes = list(op.axes_of(op.first))
    axes.insert(op.args["dim"] % (len(axes) + 1), None)
    return tuple(axes)


def expand(op: Operation) -> Axes:
    """Axes of length 1 repeated."""
    axes = (None,) * (op.out.dim() - op.first.dim()) + op.axes_of(op.first)
    sizes = (1,) * (op.out.dim() - op.first.dim()) + tuple(op.first.shape)
    pairs = zip(axes, sizes, op.out.shape, strict=True)
    return tuple(merged(op, [(axis, old)], new) if new != old else axis for axis, old, new in pairs)


def select(op: Operation) -> Axes:
    """One index of an axis."""
    axes = op.axes_of(op.first)
    i = op.args["dim"] % len(axes)
    op.lock(axes[i], "takes channels at fixed places")
    return axes[:i] + axes[i + 1 :]


def slice_(op: Operation) -> Axes:
    """Part of an axis."""
    axes = list(op.axes_of(op.first))
    i = op.args["dim"] % len(axes)
    labels, size = axes[i], op.first.shape[i]
    if labels is not None:
        start = slice(op.args["start"], op.args["end"]).indices(size)[0]
        axes[i] = cut(op, labels, start, op.out.shape[i], op.args["step"])
    return tuple(axes)


def split(op: Operation) -> list[Axes]:
    """An axis cut into parts."""
    axes = op.axes_of(op.first)
    i, start = op.args["dim"] % len(axes), 0
    parts = []
    for out in op.out:
        labels = axes[i]
        part = None if labels is None else cut(op, labels, start, out.shape[i])
        parts.append((*axes[:i], part, *axes[i + 1 :]))
        start += out.shape[i]
    return parts


def gated(op: Operation) -> Axes:
    """The first half of an axis times the sigmoid of the second half."""
    axes = list(op.axes_of(op.first))
    i = op.args["dim"] % len(axes)
    labels = axes[i]
    axes[i] = None if labels is None else cut(op, labels, 0, len(labels) // 2)
    return tuple(axes)


def unbind(op: Operation) -> list[Axes]:
    """An axis cut into its indices."""
    axes = op.axes_of(op.first)
    i = op.args["dim"] % len(axes)
    op.lock(axes[i], "takes channels at fixed places")
    return [axes[:i] + axes[i + 1 :] for _ in op.out]


def cat(op: Operation) -> Axes:
    """Tensors one after the other."""
    tensors = [t for t in op.operands if t.dim() == op.out.dim()]
    i = op.args["dim"] % op.out.dim()
    every = [op.axes_of(t) for t in tensors]
    result = []
    for place in range(op.out.dim()):
        here = [(axes[place], t.shape[place]) for axes, t in zip(every, tensors, strict=True)]
        if place != i:
            result.append(merged(op, here, op.out.shape[place]))
            continue
        parts = [np.full(length, FIXED) if axis is None else axis for axis, length in here]
        joined = np.concatenate(parts)
        result.append(None if (joined == FIXED).all() else joined)
    return tuple(result)


def stack(op: Operation) -> Axes:
    """Tensors along a new axis."""
    tensors = [(op.axes_of(t), tuple(t.shape)) for t in op.operands]
    axes = list(_broadcast(op, tensors, tensors[0][1]))
    axes.insert(op.args["dim"] % (len(axes) + 1), None)
    return tuple(axes)


def pad(op: Operation) -> Axes:
    """Values added around the last axes."""
    axes = list(op.axes_of(op.first))
    for k, (before, after) in enumerate(zip(op.args["pad"][::2], op.args["pad"][1::2], strict=True)):
        labels = axes[-1 - k]
        if labels is None or before == after == 0:
            continue
        if min(before, after) < 0 or op.args.get("mode", "constant") != "constant":
            op.lock(labels, "pads or cuts channels at fixed places")
            axes[-1 - k] = None
            continue
        axes[-1 - k] = np.pad(labels, (before, after), constant_values=FIXED)
    return tuple(axes)


def pixel_shuffle(op: Operation) -> Axes:
    """Runs of channels become positions."""
    axes = op.axes_of(op.first)
    for axis in axes[-2:]:
        op.lock(axis, "mixes these channels, as it takes them for positions")
    labels = axes[-3]
    if labels is None:
        return (*axes[:-2], None, None)
    units = op.tie(labels.reshape(-1, op.args["upscale_factor"] ** 2))
    return (*axes[:-3], units, None, None)


def pixel_unshuffle(op: Operation) -> Axes:
    """Positions become runs of channels."""
    axes = op.axes_of(op.first)
    for axis in axes[-2:]:
        op.lock(axis, "mixes these channels, as it takes them for positions")
    labels = axes[-3]
    runs = None if labels is None else np.repeat(labels, op.args["downscale_factor"] ** 2)
    return (*axes[:-3], runs, None, None)


def channel_shuffle(op: Operation) -> Axes:
    """Channels of several groups alternate; the n-th channel of every group goes with the others'."""
    axes = op.axes_of(op.first)
    if axes[1] is None:
        return axes
    units = op.tie(axes[1].reshape(op.args["groups"], -1), along=1)
    return (axes[0], np.repeat(units, op.args["groups"]), *axes[2:])


def indexed(op: Operation) -> Axes:
    """Indices looked up in some axes: those must stay."""
    axes, indices = op.axes_of(op.first), op.args["indices"]
    looked_up = [i for i, index in enumerate(indices) if index is not None]
    if len(looked_up) != 1 or indices[looked_up[0]].dtype == torch.bool:
        return opaque(op)[0]
    i = looked_up[0]
    num_axes: int = indices[i].dim()
    op.lock(axes[i], "takes channels at fixed places")
    return axes[:i] + (None,) * num_axes + axes[i + 1 :]


def _dims(op: Operation) -> list[int]:
    """The axes an operation names, all of them when it names none."""
    count, dims = op.first.dim(), op.args.get("dim", op.args.get("dims"))
    if dims is None or dims == []:
        return list(range(count))
    return [i % count for i in (dims if isinstance(dims, (list, tuple)) else [dims])]
