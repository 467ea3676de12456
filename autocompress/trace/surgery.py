"""What removing channels means: a smaller copy, and the masked copy it must equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.trace.layers import TRANSPOSED

if TYPE_CHECKING:
    from autocompress.trace.coupling import Slot, TensorSlot
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
    sides: dict[str, dict[str, Tensor]] = {}  # module -> side -> indices that stay
    for (name, side), gone in positions_removed(traced, kept).items():
        sides.setdefault(name, {})[side] = torch.from_numpy(np.flatnonzero(~gone))
    smaller: dict[int, Any] = {}  # deepcopy takes these for copies it has made, so no weight is copied whole
    for name, stay in sides.items():
        for tensor, cuts in _cuts(model.get_submodule(name), stay):
            smaller[id(tensor)] = _cut(tensor, cuts)
    stays = _stays(traced, kept)
    for slot in traced.tensors:
        tensor = _tensor(model, slot.tensor)
        smaller[id(tensor)] = _cut(
            smaller.get(id(tensor), tensor),
            {slot.axis: torch.from_numpy(np.flatnonzero(~_gone(slot, stays)))},
        )
    small = copy.deepcopy(model, smaller)
    for name, stay in sides.items():
        _resize(small.get_submodule(name), {side: len(indices) for side, indices in stay.items()})
    return small


def mask(model: nn.Module, traced: Trace, kept: Kept) -> nn.Module:
    """A copy of full size in which the removed channels are zero and nothing reads them.

    Its outputs in evaluation mode equal those of :func:`shrink`.
    """
    masked = copy.deepcopy(model)
    mask_in_place(masked, traced, kept)
    return masked


def mask_in_place(model: nn.Module, traced: Trace, kept: Kept) -> None:
    """Zero the removed channels of the network itself."""
    with torch.no_grad():
        for (name, side), gone in positions_removed(traced, kept).items():
            if gone.any():
                _zero(model.get_submodule(name), side, torch.from_numpy(np.flatnonzero(gone)))


def positions_removed(traced: Trace, kept: Kept) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """For every side of a module, which of its channels go: (module, side) -> bool array (channels,)."""
    stays = _stays(traced, kept)
    return {(slot.module, slot.side): _gone(slot, stays) for slot in traced.slots}


def _stays(traced: Trace, kept: Kept) -> list[NDArray[np.bool_]]:
    """Which units of every group stay."""
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
    return stays


def _gone(slot: Slot | TensorSlot, stays: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    gone = np.zeros(len(slot.group), dtype=np.bool_)
    for index in np.unique(slot.group[slot.group >= 0]):
        here = slot.group == index
        gone[here] = ~stays[index][slot.unit[here]]
    return gone


def _cuts(module: nn.Module, stay: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """The tensors of a module that get smaller: axis -> indices that stay."""
    out, inputs = stay.get("out"), stay.get("in")
    cuts: dict[str, dict[int, Tensor | None]]
    if isinstance(module, nn.Linear):
        cuts = {"weight": {0: out, 1: inputs}, "bias": {0: out}}
    elif isinstance(module, TRANSPOSED):
        # A grouped weight holds all groups one after the other along one axis; whole groups go.
        cuts = {"weight": {0: inputs, 1: out if module.groups == 1 else None}, "bias": {0: out}}
    elif isinstance(module, nn.modules.conv._ConvNd):
        cuts = {"weight": {0: out, 1: inputs if module.groups == 1 else None}, "bias": {0: out}}
    else:
        cuts = {name: {0: out} for name in ("weight", "bias", "running_mean", "running_var")}
    for name, axes in cuts.items():
        value = getattr(module, name, None)
        here = {axis: indices for axis, indices in axes.items() if indices is not None}
        if value is not None and here:
            yield value, here


def _cut(value: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    part = value.detach()
    for axis, indices in cuts.items():
        if len(indices) != part.shape[axis]:
            part = part.index_select(axis, indices.to(part.device))
    part = part.clone() if part.data_ptr() == value.data_ptr() else part
    return nn.Parameter(part, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else part


def _resize(module: nn.Module, size: Mapping[str, int]) -> None:
    """Write the number of channels that stay into a module."""
    match module:
        case nn.Linear():
            module.out_features = size.get("out", module.out_features)
            module.in_features = size.get("in", module.in_features)
        case nn.modules.conv._ConvNd():
            if module.groups > 1:
                module.groups = module.groups * size["in"] // module.in_channels
            module.out_channels = size.get("out", module.out_channels)
            module.in_channels = size.get("in", module.in_channels)
        case nn.PReLU():
            module.num_parameters = size["out"]
        case _:
            module.num_features = size["out"]  # type: ignore[assignment]


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, _, key = name.rpartition(".")
    value = getattr(model.get_submodule(owner), key)
    assert isinstance(value, Tensor)
    return value


def _zero(module: nn.Module, side: str, indices: Tensor) -> None:
    """Zero what a module holds for some of its channels."""
    weight = module.weight
    assert isinstance(weight, Tensor) or weight is None
    indices = indices if weight is None else indices.to(weight.device)
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
            indices_in = (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()
            weight.index_fill_(0, indices_in, 0.0)
        else:
            weight.index_fill_(axis, indices, 0.0)
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.index_fill_(0, indices, 0.0)
