"""From an ``nn.Module`` to a :class:`~autocompress.core.LayerGraph` that has been checked to hold."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import LayerGraph, LayerSpec, Width
from autocompress.trace.coupling import Coupling, Slot, TensorSlot, couple
from autocompress.trace.layers import LAYERS, PER_CHANNEL, layer_specs, run_once
from autocompress.trace.units import Side
from autocompress.trace.verify import Check

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trace:
    """A network's graph, and where each unit of each channel group lives.

    Args:
        graph: the layers and channel groups.
        slots: one entry per side of a module that holds channels of some group.
        tensors: one entry per axis of a parameter or buffer outside layers that holds channels of some group.
    """

    graph: LayerGraph
    slots: tuple[Slot, ...]
    tensors: tuple[TensorSlot, ...] = ()

    def __post_init__(self) -> None:
        self.graph.sizes  # noqa: B018  (computed once, before the trace is shared)


def trace(model: nn.Module, input_shape: Sequence[int]) -> Trace:
    """Find out what a network is made of and which of its channels can be pruned together.

    The channels are followed through one run, operation by operation. The answer is checked before it is
    used: on a copy with random weights, the network without some units of every group must equal the network
    with those units masked. A group that fails is locked and says so.

    Args:
        model: any network; it is copied, never changed.
        input_shape: shape of one sample, e.g. (3, 32, 32).

    Raises:
        UnsupportedModelError: the network does not run on such an input, has no convolution or linear
            layer, or its channels cannot be followed at all.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> [group.name for group in trace(net, (1, 4, 4)).graph.prunable]
        ['0']
    """
    model = _working_copy(model)
    example = torch.zeros(1, *input_shape)
    calls, counted = run_once(model, example)
    if not calls:
        raise UnsupportedModelError(
            "the network has no convolution or linear layer, so nothing can be pruned"
        )
    specs = layer_specs(calls)
    order = [spec.reuses or spec.name for spec in specs]
    missing = counted - sum(layer.macs for layer in specs)
    notes = (f"{missing:,} MACs in matrix products or convolutions outside layer modules",) if missing else ()

    def attempt(split_inside: bool) -> tuple[Trace, Coupling]:
        found = couple(model, example, order, split_inside=split_inside)
        graph = _graph(model, specs, found, tuple(input_shape))
        return Trace(replace(graph, uncounted=notes), found.slots, found.tensors), found

    inside, found = attempt(True)
    outside = attempt(False)[0] if found.splits else None
    best = _verified(model, inside)
    if outside is not None and _num_prunable(outside) > _num_prunable(best) and Check(model, outside).holds():
        return outside
    return best


def measure(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """MACs and parameters counted on the network as it is: ``{"macs": ..., "params": ...}``.

    Raises:
        UnsupportedModelError: the network does not run on such an input.
    """
    model = _working_copy(model)
    calls, _ = run_once(model, torch.zeros(1, *input_shape))
    macs = sum(layer.macs for layer in layer_specs(calls))
    return {"macs": macs, "params": sum(p.numel() for p in model.parameters())}


def _working_copy(model: nn.Module) -> nn.Module:
    try:
        model = copy.deepcopy(model)
    except Exception as fault:
        raise UnsupportedModelError(
            f"the network cannot be copied ({fault}); remove hooks and non-copyable attributes"
        ) from fault
    return model.cpu().float().eval()


def _graph(
    model: nn.Module,
    specs: list[LayerSpec],
    found: Coupling,
    input_shape: tuple[int, ...],
) -> LayerGraph:
    names = [group.name for group in found.groups]
    widths = {(slot.module, slot.side): _width(slot, names) for slot in found.slots}
    layers = tuple(
        replace(
            spec,
            in_width=widths.get((spec.reuses or spec.name, "in"), Width(spec.in_channels)),
            out_width=widths.get((spec.reuses or spec.name, "out"), Width(spec.out_channels)),
        )
        for spec in specs
    )
    other = _other_params(model, specs, found, widths)
    return LayerGraph(layers, found.groups, other, (), input_shape)


def _other_params(
    model: nn.Module, specs: list[LayerSpec], found: Coupling, widths: Mapping[tuple[str, Side], Width]
) -> Width:
    """Parameters outside the layers that run, as a function of the sizes of the groups."""
    names, sizes = [group.name for group in found.groups], {g.name: g.size for g in found.groups}
    counted = {spec.name for spec in specs}
    other = Width(sum(p.numel() for p in model.parameters()) - sum(spec.num_params for spec in specs))

    def add(width: Width, per_channel: int) -> None:
        nonlocal other
        other = other + Width(-per_channel * width.at(sizes)) + per_channel * width

    for name, module in model.named_modules():
        if isinstance(module, PER_CHANNEL) and (name, "out") in widths:
            add(widths[name, "out"], sum(1 for _ in module.parameters(recurse=False)))
        elif isinstance(module, LAYERS) and name not in counted and (name, "in") in widths:
            width = widths[name, "in"]  # what it makes is locked
            add(width, module.weight.numel() // width.at(sizes))
    parameters = dict(model.named_parameters())
    for slot in found.tensors:
        if slot.tensor in parameters:
            add(_width(slot, names), parameters[slot.tensor].numel() // len(slot.group))
    return other


def _width(slot: Slot | TensorSlot, names: list[str]) -> Width:
    terms = []
    for index in np.unique(slot.group[slot.group >= 0]):
        here = slot.unit[slot.group == index]
        terms.append((names[index], len(here) // len(np.unique(here))))
    return Width(int((slot.group < 0).sum()), tuple(terms))


def _num_prunable(traced: Trace) -> int:
    return sum(group.size * len(group.producers) for group in traced.graph.prunable)


def _verified(model: nn.Module, traced: Trace) -> Trace:
    """The trace with every group locked that fails shrunk = masked; spoils the model."""
    faults = Check(model, traced).faults()
    groups = tuple(replace(g, locked=g.locked or faults.get(g.name)) for g in traced.graph.groups)
    return replace(traced, graph=replace(traced.graph, groups=groups))
