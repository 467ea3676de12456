"""What removing channels means: a smaller copy, and the masked copy it must equal."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.trace.layers import TRANSPOSED

if TYPE_CHECKING:
    from autocompress.trace.coupling import Slot
    from autocompress.trace.tracer import Trace

Kept = Mapping[str, NDArray[np.int64]]
"""Channel group -> ascending indices of the units that stay; groups not named stay whole."""


def keep_first(traced: Trace, channels: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """The first n units of each group: enough to build a network of the right shape for stored weights."""
    traced.graph.with_channels(channels)  # checks names and ranges
    return {name: np.arange(count, dtype=np.int64) for name, count in channels.items()}


def shrink(model: nn.Module, traced: Trace, kept: Kept) -> nn.Module:
    """A physically smaller copy of the network; the input is not changed.

    Args:
        model: the network that was traced (or a copy with other weights).
        traced: its trace.
        kept: units to keep per group.

    Raises:
        ValueError: unknown or locked group, or indices that are empty, repeated or out of range.
    """
    removed = positions_removed(traced, kept)
    modules = dict(model.named_modules())
    small = copy.deepcopy(model)
    for name, module in small.named_modules():
        sides = {side: removed[name, side] for side in ("in", "out") if (name, side) in removed}
        if any(gone.any() for gone in sides.values()):
            _slice(module, modules[name], {s: torch.from_numpy(np.flatnonzero(~g)) for s, g in sides.items()})
    return small


def mask(model: nn.Module, traced: Trace, kept: Kept) -> nn.Module:
    """A copy of full size in which the removed channels are zero and nothing reads them.

    Its outputs in evaluation mode equal those of :func:`shrink`.
    """
    removed = positions_removed(traced, kept)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in masked.named_modules():
            for side in ("in", "out"):
                gone = removed.get((name, side))
                if gone is not None and gone.any():
                    _zero(module, side, torch.from_numpy(np.flatnonzero(gone)))
    return masked


def positions_removed(traced: Trace, kept: Kept) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """For every side of a module, which of its channels go: (module, side) -> bool array (channels,)."""
    sizes = traced.graph.sizes
    traced.graph.with_channels({name: len(indices) for name, indices in kept.items()})
    stays = []
    for name, size in sizes.items():
        flags = np.ones(size, dtype=np.bool_)
        if name in kept:
            indices = np.asarray(kept[name])
            if len(np.unique(indices)) != len(indices) or indices.min() < 0 or indices.max() >= size:
                raise ValueError(
                    f"kept units of {name!r} must be distinct and in 0..{size - 1}, got {indices}"
                )
            flags[:] = False
            flags[indices] = True
        stays.append(flags)
    return {(slot.module, slot.side): _gone(slot, stays) for slot in traced.slots}


def _gone(slot: Slot, stays: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    gone = np.zeros(len(slot.group), dtype=np.bool_)
    for index in np.unique(slot.group[slot.group >= 0]):
        here = slot.group == index
        gone[here] = ~stays[index][slot.unit[here]]
    return gone


def _slice(module: nn.Module, original: nn.Module, stay: Mapping[str, Tensor]) -> None:
    out, inputs = stay.get("out"), stay.get("in")
    if isinstance(module, nn.Linear):
        _take(module, "weight", out, 0)
        _take(module, "weight", inputs, 1)
        _take(module, "bias", out, 0)
        module.out_features, module.in_features = module.weight.shape
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        _slice_convolution(module, out, inputs)
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        _take(module, name, out, 0)
    size = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    setattr(module, size, len(out) if out is not None else getattr(original, size))


def _slice_convolution(module: nn.modules.conv._ConvNd, out: Tensor | None, inputs: Tensor | None) -> None:
    out_axis, in_axis = (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)
    _take(module, "bias", out, 0)
    if module.groups == 1:
        _take(module, "weight", out, out_axis)
        _take(module, "weight", inputs, in_axis)
    elif inputs is not None and out is not None:
        # Whole convolution groups go; the axis that runs over all groups holds them one after the other.
        _take(module, "weight", inputs if isinstance(module, TRANSPOSED) else out, 0)
        module.groups = module.groups * len(inputs) // module.in_channels
    if out is not None:
        module.out_channels = len(out)
    if inputs is not None:
        module.in_channels = len(inputs)


def _take(module: nn.Module, name: str, indices: Tensor | None, axis: int) -> None:
    value = getattr(module, name, None)
    if value is None or indices is None:
        return
    part = value.detach().index_select(axis, indices.to(value.device)).clone()
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(part, requires_grad=value.requires_grad))
    else:
        setattr(module, name, part)


def _zero(module: nn.Module, side: str, indices: Tensor) -> None:
    """Zero what a module holds for some of its channels."""
    weight = module.weight
    assert isinstance(weight, Tensor) or weight is None
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if side == "in":
        if convolution and module.groups != 1:
            return  # the same convolution groups are zeroed on the output side
        axis = 0 if isinstance(module, TRANSPOSED) else 1
        weight.index_fill_(axis, indices, 0.0)
        return
    if weight is not None:
        axis = 1 if isinstance(module, TRANSPOSED) and module.groups == 1 else 0
        if isinstance(module, TRANSPOSED) and module.groups != 1:
            per_group = module.out_channels // module.groups
            groups = torch.unique(indices // per_group)
            width = module.in_channels // module.groups
            indices_in = (groups[:, None] * width + torch.arange(width)).flatten()
            weight.index_fill_(0, indices_in, 0.0)
        else:
            weight.index_fill_(axis, indices, 0.0)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.index_fill_(0, indices, 0.0)
