"""Which channels can only be removed together.

Following a network once (see :mod:`autocompress.trace.follow`) gives, for every side of every module, the
units its channels belong to. Units that touch the same places equally often form a
:class:`~autocompress.core.ChannelGroup`.

Grouped convolutions, depthwise ones among them, lose whole convolution groups: all input and output channels
of one convolution group are one unit.

Differs from torch-pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023), which reads
the autograd graph, in that operations are followed as they run, index by index, so that an operation without
a rule locks what it reads instead of being taken for element-wise.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import ChannelGroup
from autocompress.trace.follow import Follower
from autocompress.trace.layers import LAYERS
from autocompress.trace.units import FIXED, Labels, Place, Resolved, Side, Units

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Slot:
    """The channels on one side of one module.

    Args:
        module: dotted name.
        side: ``in`` for what a layer reads, ``out`` for what it produces or normalises.
        group: shape (channels,): index into ``LayerGraph.groups``, -1 for channels of no group.
        unit: shape (channels,): which unit of that group a channel belongs to.
    """

    module: str
    side: Side
    group: NDArray[np.int64]
    unit: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TensorSlot:
    """The channels along one axis of a parameter or buffer that is used outside layers.

    Args:
        tensor: dotted name.
        axis: which axis.
        group, unit: as in :class:`Slot`.
    """

    tensor: str
    axis: int
    group: NDArray[np.int64]
    unit: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Coupling:
    """The channel groups of a network and where their units are.

    Args:
        groups: in execution order of their first producer.
        slots: sides of modules.
        tensors: axes of parameters and buffers.
        splits: operations that split an axis of channels where it was not clear which part shrinks.
    """

    groups: tuple[ChannelGroup, ...]
    slots: tuple[Slot, ...]
    tensors: tuple[TensorSlot, ...]
    splits: tuple[str, ...]


def couple(model: nn.Module, example: Tensor, order: list[str], *, split_inside: bool = True) -> Coupling:
    """Find the channel groups of a network.

    Args:
        model: in evaluation mode; a copy, as its statistics change where layers run in training only.
        example: one input batch.
        order: names of the executed layers, in execution order.
        split_inside: see :class:`~autocompress.trace.axes.Context`.

    Raises:
        UnsupportedModelError: the network cannot be followed.
    """
    units = Units()
    follower = Follower(model, units, split_inside=split_inside)
    try:
        follower.run(example)
    except Exception as fault:
        raise UnsupportedModelError(
            f"the channels of this network cannot be followed {follower.place} "
            f"({type(fault).__name__}: {fault}). Rewrite that part with plain torch operations, or pass the "
            "sub-network that can be pruned."
        ) from fault
    _follow_training(model, example, units, follower)
    _lock_shared_parameters(model, units)
    return _Groups(units.resolve(), order, dict(model.named_modules())).coupling(follower.splits)


def _follow_training(model: nn.Module, example: Tensor, units: Units, follower: Follower) -> None:
    """Follow layers that run in training only, such as auxiliary heads, as far as what they read."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    unseen = [name for name in layers if (name, "in") not in units.places]
    if not unseen:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            model.train()
            follower.run(torch.cat([example, example]))
    except Exception as fault:
        log.warning(
            "in training this network does not run on such images (%s), so layers that only run then keep "
            "their size and may not fit a pruned network: %s",
            fault,
            ", ".join(unseen),
        )
    finally:
        model.eval()
    for name in unseen:
        units.lock(units.places.get((name, "out")), f"{name!r} makes these channels in training only")


def _lock_shared_parameters(model: nn.Module, units: Units) -> None:
    """Layers that share a parameter would have to lose the same channels: they lose none."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(f"{name}.{key}")
    for names in owners.values():
        if len(names) > 1:
            modules = {name.rpartition(".")[0] for name in names}
            for (owner, side), labels in units.places.items():
                if owner in modules or (isinstance(side, int) and owner in names):
                    units.lock(labels, f"{', '.join(map(repr, names))} are one parameter; give each its own")


class _Groups:
    """Forms groups of units."""

    def __init__(self, resolved: Resolved, order: list[str], modules: Mapping[str, nn.Module]) -> None:
        self._units, self._locks, self._modules = resolved.units, resolved.locks, modules
        self._rank = {name: i for i, name in enumerate(dict.fromkeys(order))}

    def coupling(self, splits: Iterable[str]) -> Coupling:
        groups: list[ChannelGroup] = []
        where: dict[int, tuple[int, int]] = {}
        for places, lock, units in self._members():
            producers, consumers = (self._layers_in(places, side) for side in ("out", "in"))
            if not producers and not consumers:
                continue
            name = _free_name((producers or consumers)[0], {group.name for group in groups})
            where |= {unit: (len(groups), i) for i, unit in enumerate(units)}
            locked = lock or _lock_of(producers, consumers, len(units), dict(places))
            groups.append(ChannelGroup(name, len(units), producers, consumers, locked))
        sides, tensors = [], []
        for (owner, side), labels in self._units.items():
            group, unit = _slot(labels, where)
            if isinstance(side, int):
                tensors.append(TensorSlot(owner, side, group, unit))
            else:
                sides.append(Slot(owner, side, group, unit))
        kept = tuple(slot for slot in tensors if (slot.group >= 0).any())
        return Coupling(_one_axis_each(groups, kept), tuple(sides), kept, tuple(dict.fromkeys(splits)))

    def _members(self) -> list[tuple[tuple[tuple[Place, int], ...], str | None, list[int]]]:
        """Units that touch the same places equally often and share a lock, by their first layer."""
        touched: dict[int, list[tuple[Place, int]]] = defaultdict(list)
        for place, labels in self._units.items():
            found, counts = np.unique(labels[labels != FIXED], return_counts=True)
            for unit, count in zip(found.tolist(), counts.tolist(), strict=True):
                touched[unit].append((place, count))
        members: dict[tuple[tuple[tuple[Place, int], ...], str | None], list[int]] = defaultdict(list)
        for unit in sorted(touched):
            members[tuple(touched[unit]), self._locks.get(unit)].append(unit)

        def first(item: tuple[tuple[tuple[Place, int], ...], str | None, list[int]]) -> tuple[int, int]:
            last = len(self._rank)
            return min(self._rank.get(owner, last) for (owner, _), _ in item[0]), item[2][0]

        return sorted(((places, lock, units) for (places, lock), units in members.items()), key=first)

    def _layers_in(self, places: tuple[tuple[Place, int], ...], side: str) -> tuple[str, ...]:
        """Layers touched on one side, in execution order."""
        found = {owner for (owner, s), _ in places if s == side and isinstance(self._modules[owner], LAYERS)}
        return tuple(sorted(found & set(self._rank), key=lambda name: self._rank[name]))


def _lock_of(
    producers: tuple[str, ...], consumers: tuple[str, ...], size: int, places: Mapping[Place, int]
) -> str | None:
    if not producers:
        return "its channels are made by no layer"
    if not set(consumers) - set(producers):
        return "its channels are read by no layer"
    if size == 1 and any(count > 1 for count in places.values()):
        return "its channels are tied together so that they could only go all at once"
    return None


def _one_axis_each(groups: list[ChannelGroup], tensors: Iterable[TensorSlot]) -> tuple[ChannelGroup, ...]:
    """Parameters with two axes of channels keep all but the first whole, so that sizes add up."""
    seen: dict[str, int] = {}
    for slot in tensors:
        if seen.setdefault(slot.tensor, slot.axis) != slot.axis:
            for i in np.unique(slot.group[slot.group >= 0]):
                reason = f"parameter {slot.tensor!r} holds these channels beside others; make it a layer"
                groups[i] = replace(groups[i], locked=groups[i].locked or reason)
    return tuple(groups)


def _free_name(base: str, taken: set[str]) -> str:
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    return name


def _slot(labels: Labels, where: Mapping[int, tuple[int, int]]) -> tuple[Labels, Labels]:
    places = [where.get(unit, (-1, -1)) for unit in labels.tolist()]
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()
