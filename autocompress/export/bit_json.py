"""Bit-widths and scales of a quantised network as plain JSON, for tools without ONNX and PyTorch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core.errors import ExportError
from autocompress.core.files import write_atomically
from autocompress.export.brevitas_calls import record_calls

FORMAT = 1


def write_bit_json(model: nn.Module, path: Path, *, input_shape: tuple[int, int, int]) -> Path:
    """Write :func:`describe_bits` as a JSON file.

    Args:
        model: Brevitas layers; not changed.
        path: of the file.
        input_shape: (C, H, W) of one image.

    Raises:
        ExportError: nothing in the network is quantised.
        RunDirectoryError: the file cannot be written.
    """
    content = json.dumps(describe_bits(model, input_shape=input_shape), indent=1)
    return write_atomically(path, content.encode())


def describe_bits(model: nn.Module, *, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """How every tensor of a network is quantised.

    A grid is a dictionary of ``bits``, ``signed``, ``low`` and ``high`` (smallest and largest integer),
    ``scale`` and ``zero_point`` (lists of one number, or of one per output channel) and ``range`` (smallest
    and largest value over all channels). The value of an integer q is ``scale * (q - zero_point)``; signed
    grids of one bit hold only -1 and 1. Numbers are float32 written out in full, so they survive the text.

    Args:
        model: Brevitas layers; not changed.
        input_shape: (C, H, W) of one image.

    Returns:
        ``format``; ``layers``: name -> grids of ``weight``, ``input`` and ``bias``, None where a tensor is a
        float; ``quantisers``: name -> grid of the activations it makes. Both in execution order.

    Raises:
        ExportError: nothing in the network is quantised.
    """
    network = copy.deepcopy(model).cpu().eval()
    layers: dict[str, Any] = {}
    quantisers: dict[str, Any] = {}
    for call in record_calls(network, torch.zeros(1, *input_shape)):
        if call.kind == "layer":
            layers[call.name] = _layer(call.module, call.reads)
        else:
            made = call.module(torch.zeros(1))
            quantisers[call.name] = _grid(made, call.module.is_narrow_range)
    if not quantisers and not any(layer["weight"] for layer in layers.values()):
        raise ExportError("no tensor of this network is quantised; give layers fewer than 32 bits")
    return {"format": FORMAT, "layers": layers, "quantisers": quantisers}


def _layer(module: Any, reads: Any) -> dict[str, Any]:
    grids: dict[str, Any] = {"weight": None, "input": None, "bias": None}
    if not isinstance(reads, Tensor):
        grids["input"] = _grid(reads, narrow=False)
    if not hasattr(module, "weight_quant"):
        return grids
    with torch.no_grad():
        weight = module.quant_weight(reads)
        grids["weight"] = _grid(weight, module.weight_quant.is_narrow_range)
        if module.bias is not None and module.bias_quant.is_quant_enabled:
            grids["bias"] = _grid(module.bias_quant(module.bias, reads, weight), narrow=False)
    return grids


def _grid(tensor: Any, narrow: bool) -> dict[str, Any]:
    """Of Brevitas' quantised tensor; ``narrow`` leaves out the most negative integer."""
    bits, signed = int(tensor.bit_width), bool(tensor.signed)
    binary = signed and bits == 1
    low = -1 if binary else int(narrow) - (1 << (bits - 1)) if signed else 0
    high = 1 if binary else (1 << (bits - int(signed))) - 1
    scale, zero = tensor.scale.detach().flatten(), tensor.zero_point.detach().flatten()
    return {
        "bits": bits,
        "signed": signed,
        "low": low,
        "high": high,
        "scale": scale.tolist(),
        "zero_point": [int(value) for value in zero],
        "range": [float((scale * (low - zero)).min()), float((scale * (high - zero)).max())],
    }
