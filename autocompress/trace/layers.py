"""Sizes of every executed layer, found by one forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import LayerSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


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
    with _recording(model, calls), torch.no_grad(), counter:
        try:
            model(example)
        except Exception as fault:
            shape = "x".join(map(str, example.shape[1:]))
            raise UnsupportedModelError(
                f"the network does not run on one input of shape {shape}: {fault}. "
                "Check the image size and the number of channels the network expects."
            ) from fault
    return calls, counter.get_total_flops() // 2


@contextmanager
def _recording(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                calls.append(Call(name, module, tuple(args[0].shape), tuple(output.shape)))

            handles.append(module.register_forward_hook(hook))
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
        tokens = (math.prod(call.in_shape[1:-1]), 1)
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
        "in_hw": _two(call.in_shape[2:]),
        "out_hw": _two(call.out_shape[2:]),
        "bias": module.bias is not None,
        "transposed": isinstance(module, TRANSPOSED),
    }


def _two(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Fold 1-d and 3-d extents into (height, width); products, and so MACs, stay exact."""
    if len(sizes) == 1:
        return sizes[0], 1
    return math.prod(sizes[:-1]), sizes[-1]
