"""Sizes of every executed layer, found by one forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import LayerSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
PER_CHANNEL = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.PReLU,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@dataclass(frozen=True)
class Call:
    """One execution of a layer module, in execution order."""

    name: str
    module: nn.Module
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def num_channels(module: nn.Module, side: Literal["in", "out"]) -> int:
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


def spatial_axes(module: nn.Module, num_axes: int) -> int:
    """How many axes follow that of the channels in the input of a layer or per-channel module."""
    if isinstance(module, nn.Linear):
        return 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size)
    for count, kind in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), start=1):
        if isinstance(module, kind):
            return count  # these also take an input without a batch axis
    return max(0, num_axes - 2)


def is_computed(module: nn.Module) -> bool:
    """Whether a layer's weight is no parameter of its own but computed, by a parametrisation or a hook."""
    return module._parameters.get("weight") is None


def run_once(model: nn.Module, example: Tensor) -> tuple[list[Call], int]:
    """One forward pass in evaluation mode on an example batch of one sample.

    Returns:
        The calls of all convolution and linear layers, and the number of MACs counted by
        ``torch.utils.flop_counter`` (which also sees functional calls and attention).

    Raises:
        UnsupportedModelError: the network does not run on such an input.
    """
    calls: list[Call] = []
    counter = FlopCounterMode(display=False)
    with _recording(model, calls), every_module_called(), torch.no_grad(), counter:
        try:
            output = model(example)
        except Exception as fault:
            shape = "x".join(map(str, example.shape[1:]))
            raise UnsupportedModelError(
                f"the network does not run on one input of shape {shape}: {fault}. "
                "Check the image size and the number of channels the network expects."
            ) from fault
    if not tensors_in(output):
        raise UnsupportedModelError(
            f"the network returns {type(output).__name__}, which holds no tensor; let it return a tensor, or "
            "tensors in a tuple, list or dict"
        )
    return calls, counter.get_total_flops() // 2


@contextmanager
def every_module_called() -> Iterator[None]:
    """Without the fused paths of attention modules, which skip the modules inside."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _recording(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
                source = tensors_in([args, kwargs])[0]
                calls.append(Call(name, module, tuple(source.shape), tuple(output.shape)))

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_specs(calls: list[Call]) -> list[LayerSpec]:
    """Facts about each call, without channel groups."""
    seen: dict[str, int] = {}
    specs = []
    for call in calls:
        count = seen[call.name] = seen.get(call.name, 0) + 1
        again = {"name": f"{call.name}@{count}", "reuses": call.name} if count > 1 else {"name": call.name}
        specs.append(LayerSpec(**(_facts(call) | again)))
    return specs


def _facts(call: Call) -> dict[str, Any]:
    module = call.module
    if isinstance(module, nn.Linear):
        tokens = (math.prod(call.in_shape[:-1]), 1)
        widths = {"in_channels": module.in_features, "out_channels": module.out_features}
        return {
            "kind": "linear",
            "in_hw": tokens,
            "out_hw": tokens,
            "bias": module.bias is not None,
            **widths,
        }
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return {
        "kind": "conv",
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel": _two(module.kernel_size),
        "stride": _two(module.stride),
        "groups": module.groups,
        "in_hw": _positions(module, call.in_shape),
        "out_hw": _positions(module, call.out_shape),
        "bias": module.bias is not None,
        "transposed": isinstance(module, TRANSPOSED),
    }


def _positions(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Positions of a feature map; several images that a network makes of one sample are stacked in height."""
    first = len(shape) - spatial_axes(module, len(shape))
    height, width = _two(shape[first:])
    return math.prod(shape[: first - 1]) * height, width


def _two(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Fold 1-d and 3-d extents into (height, width); products, and so MACs, stay exact."""
    if len(sizes) == 1:
        return sizes[0], 1
    return math.prod(sizes[:-1]), sizes[-1]
