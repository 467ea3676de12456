"""Which channels can only be removed together, from torch-pruning's dependency graph.

torch-pruning says, for every channel a layer produces, which positions of which other layers hold the same
channel. Those statements are joined here into classes of positions (units), and units that touch the same
layers in the same way form a :class:`~autocompress.core.ChannelGroup`.

Grouped convolutions, depthwise ones among them, lose whole convolution groups: all input and output
channels of one convolution group are one unit.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (the dependency graph).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import ChannelGroup
from autocompress.trace.layers import LAYERS
from autocompress.trace.padding import map_channel_padding

Side = Literal["in", "out"]

PER_CHANNEL = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.PReLU,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


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


class _Classes:
    """Union-find over units; every position of a layer's side belongs to at most one."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.sides: dict[tuple[str, Side], NDArray[np.int64]] = {}
        self.locks: dict[int, str] = {}

    def new(self, count: int) -> range:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return range(start, start + count)

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        self.parent[max(self.find(a), self.find(b))] = min(self.find(a), self.find(b))

    def put(self, key: tuple[str, Side], size: int, pairs: Iterable[tuple[int, int]]) -> None:
        """Say that position ``p`` of a side belongs to unit ``u`` for each pair (p, u)."""
        owner = self.sides.setdefault(key, np.full(size, -1, dtype=np.int64))
        for position, unit in pairs:
            if owner[position] < 0:
                owner[position] = unit
            else:
                self.join(int(owner[position]), unit)


def couple(model: nn.Module, example: Tensor, order: list[str]) -> tuple[list[ChannelGroup], list[Slot]]:
    """Find the channel groups of a network.

    Args:
        model: in evaluation mode, with parameters that require gradients; not changed.
        example: one input batch.
        order: names of the executed layers, in execution order.

    Raises:
        UnsupportedModelError: torch-pruning cannot follow the network.
    """
    modules = dict(model.named_modules())
    classes = _Classes()
    _follow(model, example, [name for name in order if name in modules], modules, classes)
    for name in order:
        _tie_convolution_groups(name, modules[name], classes)
    return _groups(classes, order, modules)


def _follow(
    model: nn.Module, example: Tensor, order: list[str], modules: dict[str, nn.Module], classes: _Classes
) -> None:
    """Ask torch-pruning for the positions coupled to every produced channel."""
    import torch_pruning as tp

    at = "while its operations are listed"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            warnings.simplefilter("ignore")
            dependency = tp.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)
            map_channel_padding(dependency)
            recorder = _Recorder(model, dependency, classes)
            for name in dict.fromkeys(order):
                at = f"at layer {name!r}"
                module = modules[name]
                if module not in dependency.module2node or _complete(classes, name):
                    continue
                pruner = dependency.get_pruner_of_module(module)
                channels = _channels(module, "out")
                items = dependency.get_pruning_group(module, pruner.prune_out_channels, list(range(channels)))
                units = classes.new(channels)
                for item in items:
                    recorder.record(item, units)
    except Exception as fault:
        raise UnsupportedModelError(
            f"the channels of this network cannot be followed {at} ({type(fault).__name__}: {fault}). "
            "Rewrite what follows it with plain torch operations, or pass the sub-network that can be pruned."
        ) from fault


def _complete(classes: _Classes, name: str) -> bool:
    """Whether every output channel already belongs to a unit; coupling is symmetric, so nothing is new."""
    owner = classes.sides.get((name, "out"))
    return owner is not None and bool((owner >= 0).all())


class _Recorder:
    """Writes torch-pruning's statements into the classes."""

    def __init__(self, model: nn.Module, dependency: Any, classes: _Classes) -> None:
        self._dependency, self._classes = dependency, classes
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(p): name for name, p in model.named_parameters()}

    def record(self, item: Any, units: range) -> None:
        """One statement: these positions of this module hold the channels ``units[root]``."""
        module, handler = item.dep.target.module, item.dep.handler
        roots = [units[root] for root in item.root_idxs]
        if isinstance(module, nn.Parameter):
            name = self._parameters.get(id(module), "?")
            self._lock(roots, f"it meets the bare parameter {name!r}, which is no layer; wrap it in one")
        elif module in self._names:  # else an operation without parameters: the verification judges it
            self._record_module(module, handler, item.idxs, roots)

    def _record_module(self, module: nn.Module, handler: Any, positions: list[int], roots: list[int]) -> None:
        name = self._names[module]
        if not isinstance(module, (*LAYERS, *PER_CHANNEL)):
            kind = type(module).__name__
            self._lock(roots, f"{name!r} ({kind}) mixes channels, so removing some changes the others")
            return
        outgoing = not isinstance(module, LAYERS) or self._dependency.is_out_channel_pruning_fn(handler)
        side: Side = "out" if outgoing else "in"
        channels = _channels(module, side)
        if max(positions, default=0) >= channels:
            self._lock(
                roots, f"an operation before {name!r} changes the number of channels in a way not known"
            )
            return
        self._classes.put((name, side), channels, zip(positions, roots, strict=True))

    def _lock(self, units: list[int], reason: str) -> None:
        for unit in units:
            self._classes.locks.setdefault(unit, reason)


def _channels(module: nn.Module, side: Side) -> int:
    """Number of channels on one side of a layer or per-channel module."""
    match module:
        case nn.Linear():
            return module.out_features if side == "out" else module.in_features
        case nn.PReLU():
            return module.num_parameters
        case _ if isinstance(module, LAYERS):
            return int(module.out_channels if side == "out" else module.in_channels)  # type: ignore[arg-type]
        case _:
            return int(module.num_features)  # type: ignore[arg-type]


def _tie_convolution_groups(name: str, module: nn.Module, classes: _Classes) -> None:
    """All input and output channels of one convolution group are one unit."""
    count = int(getattr(module, "groups", 1))
    if count <= 1:
        return
    units = classes.new(count)
    for side in ("in", "out"):
        size = _channels(module, side)
        pairs = ((p, units[p * count // size]) for p in range(size))
        classes.put((name, side), size, pairs)


def _groups(
    classes: _Classes, order: list[str], modules: dict[str, nn.Module]
) -> tuple[list[ChannelGroup], list[Slot]]:
    """Units that touch the same sides equally often form one group, named by its first producer."""
    place = {name: i for i, name in enumerate(dict.fromkeys(order))}
    touched: dict[int, dict[tuple[str, Side], int]] = defaultdict(lambda: defaultdict(int))
    for key, owner in classes.sides.items():
        for unit in owner[owner >= 0]:
            touched[classes.find(int(unit))][key] += 1
    locks: dict[int, str] = {}
    for unit, reason in classes.locks.items():
        locks.setdefault(classes.find(unit), reason)

    members: dict[Any, list[int]] = defaultdict(list)
    for unit in sorted(touched):
        members[(frozenset(touched[unit].items()), locks.get(unit))].append(unit)

    def first(item: tuple[Any, list[int]]) -> tuple[int, int]:
        return min(place.get(name, len(place)) for (name, _), _ in item[0][0]), item[1][0]

    groups: list[ChannelGroup] = []
    position: dict[int, tuple[int, int]] = {}
    for (signature, lock), units in sorted(members.items(), key=first):
        producers = _layers_in(signature, "out", place, modules)
        consumers = _layers_in(signature, "in", place, modules)
        name = _free_name((producers or consumers)[0], {group.name for group in groups})
        position |= {unit: (len(groups), i) for i, unit in enumerate(units)}
        locked = lock or _lock_at_the_ends(producers, consumers)
        groups.append(ChannelGroup(name, len(units), producers, consumers, locked))
    return groups, [_slot(key, owner, position, classes) for key, owner in classes.sides.items()]


def _layers_in(
    signature: frozenset[tuple[tuple[str, str], int]],
    side: str,
    place: dict[str, int],
    modules: dict[str, nn.Module],
) -> tuple[str, ...]:
    """Layers touched on one side, in execution order."""
    found = {name for (name, s), _ in signature if s == side and isinstance(modules[name], LAYERS)}
    return tuple(sorted(found, key=lambda name: place.get(name, len(place))))


def _lock_at_the_ends(producers: tuple[str, ...], consumers: tuple[str, ...]) -> str | None:
    if not producers:
        return "its channels come from the network's input"
    if not set(consumers) - set(producers):
        return "its channels are the network's output"
    return None


def _free_name(base: str, taken: set[str]) -> str:
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    return name


def _slot(
    key: tuple[str, Side], owner: NDArray[np.int64], position: dict[int, tuple[int, int]], classes: _Classes
) -> Slot:
    places = [position[classes.find(int(u))] if u >= 0 else (-1, -1) for u in owner]
    table = np.array(places, dtype=np.int64).reshape(-1, 2)
    return Slot(key[0], key[1], table[:, 0].copy(), table[:, 1].copy())
