"""From an ``nn.Module`` to a :class:`~autocompress.core.LayerGraph` that has been checked to hold."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import ChannelGroup, LayerGraph, LayerSpec, Width
from autocompress.trace.coupling import PER_CHANNEL, Slot, couple
from autocompress.trace.layers import layer_specs, run_once, tensors_in
from autocompress.trace.surgery import Kept, mask, shrink

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trace:
    """A network's graph, and where each unit of each channel group lives.

    Args:
        graph: the layers and channel groups.
        slots: one entry per side of a module that holds channels of some group.
    """

    graph: LayerGraph
    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        self.graph.sizes  # noqa: B018  (computed once, before the trace is shared)


def trace(model: nn.Module, input_shape: Sequence[int]) -> Trace:
    """Find out what a network is made of and which of its channels can be pruned together.

    The coupling comes from torch-pruning, which guesses where it does not know an operation. So the answer
    is checked before it is used: on a copy with random weights, the network without half of its units must
    equal the network with those units masked. A group that fails is locked and says so.

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
    groups, slots = couple(model, example, [spec.reuses or spec.name for spec in specs])
    graph = _graph(model, specs, groups, slots, tuple(input_shape))
    missing = counted - sum(layer.macs for layer in specs)
    if missing:
        graph = replace(
            graph,
            uncounted=(f"{missing:,} MACs in matrix products or convolutions outside layer modules",),
        )
    traced = Trace(graph, tuple(slots))
    return _verified(model, traced)


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
    model = model.cpu().float().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _graph(
    model: nn.Module,
    specs: list[LayerSpec],
    groups: list[ChannelGroup],
    slots: list[Slot],
    input_shape: tuple[int, ...],
) -> LayerGraph:
    names = [group.name for group in groups]
    widths = {(slot.module, slot.side): _width(slot, names) for slot in slots}
    layers = tuple(
        replace(
            spec,
            in_width=widths.get((spec.reuses or spec.name, "in"), Width(spec.in_channels)),
            out_width=widths.get((spec.reuses or spec.name, "out"), Width(spec.out_channels)),
        )
        for spec in specs
    )
    in_layers = sum(spec.num_params for spec in specs)
    other = Width(sum(p.numel() for p in model.parameters()) - in_layers)
    for name, module in model.named_modules():
        if isinstance(module, PER_CHANNEL) and (name, "out") in widths:
            tensors = sum(1 for p in module.parameters(recurse=False))
            width = widths[name, "out"]
            current = width.at({g.name: g.size for g in groups})
            other = other + Width(-tensors * current) + tensors * width
    return LayerGraph(layers, tuple(groups), other, (), input_shape)


def _width(slot: Slot, names: list[str]) -> Width:
    terms = []
    for index in np.unique(slot.group[slot.group >= 0]):
        here = slot.unit[slot.group == index]
        terms.append((names[index], len(here) // len(np.unique(here))))
    return Width(int((slot.group < 0).sum()), tuple(terms))


def _verified(model: nn.Module, traced: Trace) -> Trace:
    """The trace with every group locked that fails shrunk = masked."""
    model = _randomised(model)
    example = torch.randn(2, *traced.graph.input_shape, generator=_generator(), dtype=torch.float64)
    if _holds(model, traced, _halves(traced), example) is None:
        return traced
    halves, accepted = _halves(traced), dict[str, Any]()
    groups = list(traced.graph.groups)
    for index, group in enumerate(groups):
        if group.name in halves:
            trial = {**accepted, group.name: halves[group.name]}
            fault = _holds(model, traced, {group.name: halves[group.name]}, example)
            fault = fault or _holds(model, traced, trial, example)
            if fault is None:
                accepted = trial
            else:
                groups[index] = replace(group, locked=fault)
    return replace(traced, graph=replace(traced.graph, groups=tuple(groups)))


def _holds(model: nn.Module, traced: Trace, kept: Kept, example: Tensor) -> str | None:
    """None when shrunk = masked for this choice, else what went wrong."""
    if not kept:
        return None
    try:
        with torch.no_grad():
            small = tensors_in(shrink(model, traced, kept)(example))
    except Exception as fault:
        return f"the network does not run without some of these channels ({_short(fault)})"
    with torch.no_grad():
        reference = tensors_in(mask(model, traced, kept)(example))
    for a, b in zip(small, reference, strict=True):
        if a.shape != b.shape:
            return "its channels are part of the network's output"
        if not torch.isfinite(b).all():
            return "the check gave values that are not finite"
        if (a - b).abs().max() > 1e-8 * max(1.0, float(b.abs().max())):
            return "its channels are re-ordered or mixed by an operation between its layers"
    return None


def _short(fault: Exception) -> str:
    return str(fault).splitlines()[0][:160] if str(fault) else type(fault).__name__


def _halves(traced: Trace) -> dict[str, np.typing.NDArray[np.int64]]:
    """A random half of the units of every prunable group that has at least two."""
    rng = np.random.default_rng(0)
    return {
        group.name: np.sort(rng.choice(group.size, (group.size + 1) // 2, replace=False))
        for group in traced.graph.prunable
        if group.size > 1
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _randomised(model: nn.Module) -> nn.Module:
    """A double-precision copy with generic weights: zero-initialised layers would hide faults."""
    model = copy.deepcopy(model).double()
    generator = _generator()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (1.6 / fan_in) ** 0.5 if parameter.dim() > 1 else 0.3 * noise)
        for module in model.modules():
            if isinstance(module, PER_CHANNEL) and not isinstance(module, nn.PReLU):
                for name in ("weight", "running_var"):
                    value = getattr(module, name, None)
                    if value is not None:
                        value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model
