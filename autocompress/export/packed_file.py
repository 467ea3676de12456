"""Weights on disk in as many bits as the plan gives them: numbers of a codebook, or integers of a grid.

A safetensors file: packed codes of each layer, its codebook or its scales, every other tensor as it is, and
a checksum. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError, ExportError
from autocompress.zoo import read_safetensors, write_tensors

MAX_BITS = 8

_FORMAT = "autocompress-packed-1"
_CODES, _CODEBOOK, _SCALE = "codes", "codebook", "scale"


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """A weight as numbers of shared values.

    Args:
        indices: integers from 0 below the size of the codebook, in the weight's shape.
        codebook: the values, float32, shape (at most 256,).
    """

    indices: Tensor
    codebook: Tensor

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return max(1, (len(self.codebook) - 1).bit_length())

    @property
    def values(self) -> Tensor:
        """The weight, float32."""
        return self.codebook[self.indices.long()]


@dataclass(frozen=True, eq=False)
class GridWeight:
    """A weight as integers times a scale.

    Args:
        integers: symmetric around 0, of so many bits, in the weight's shape; -1 and 1 only for one bit.
        scale: float32, one number or one per output channel in a shape that broadcasts.
        bits: from 1 to 8.
    """

    integers: Tensor
    scale: Tensor
    bits: int

    @property
    def values(self) -> Tensor:
        """The weight, float32."""
        return self.integers.float() * self.scale


def packed_weights(model: nn.Module) -> dict[str, CodebookWeight | GridWeight]:
    """The weights of a network's Brevitas layers that have at most 8 bits, by layer.

    Args:
        model: not changed.
    """
    found: dict[str, CodebookWeight | GridWeight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) or not hasattr(module, "weight_quant"):
            continue
        with torch.no_grad():
            weight: Any = module.quant_weight()  # type: ignore[operator]
        bits = int(weight.bit_width)
        if bits <= MAX_BITS:
            integers = torch.round(weight.value / weight.scale).to(torch.int8)
            found[name] = GridWeight(integers.cpu(), weight.scale.detach().cpu(), bits)
    return found


def write_packed(
    path: Path, weights: Mapping[str, CodebookWeight | GridWeight], rest: Mapping[str, Tensor]
) -> Path:
    """Write a state_dict with packed weights.

    The file takes ``ceil(n * bits / 8)`` bytes for the n weights of a layer, 4 for each number of its
    codebook or scale, the tensors of ``rest`` as they are, and a header of less than 300 bytes per tensor.

    Args:
        path: of the file.
        weights: layer -> its weight; stored for the name ``<layer>.weight``.
        rest: every other tensor of the state_dict, under its own name; names in ``weights`` are left out.

    Raises:
        ExportError: codes that do not fit their bits, values that are not finite, all named.
        RunDirectoryError: the file cannot be written.
    """
    faults = [fault for layer, weight in weights.items() for fault in _faults(layer, weight)]
    if faults:
        raise ExportError("\n".join(faults))
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for layer, weight in weights.items():
        codes, table = _coded(weight)
        kind = _CODEBOOK if isinstance(weight, CodebookWeight) else _SCALE
        layers[layer] = {"bits": weight.bits, "shape": list(codes.shape)}
        tensors[f"{layer}.weight.{_CODES}"] = torch.from_numpy(_pack(codes.ravel(), weight.bits))
        tensors[f"{layer}.weight.{kind}"] = table
    packed = {f"{layer}.weight" for layer in weights}
    tensors |= {name: t.detach().cpu().contiguous() for name, t in rest.items() if name not in packed}
    description = json.dumps(layers, separators=(",", ":"))
    metadata = {"format": _FORMAT, "layers": description, "sha256": _digest(tensors, description)}
    write_tensors(path, tensors, metadata=metadata)
    return path


def read_packed(path: Path) -> dict[str, Tensor]:
    """The state_dict of a packed file: weights as the float32 numbers that were packed, to the last bit.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not a packed file, or contradicts itself.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no file of packed weights; write it with write_packed")
    description = metadata.get("layers", "")
    if metadata.get("sha256") != _digest(tensors, description):
        raise CheckpointError(f"{path} was altered: its checksum differs; write or fetch it again")
    try:
        layers = {
            str(layer): (int(entry["bits"]), tuple(int(size) for size in entry["shape"]))
            for layer, entry in json.loads(description).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise CheckpointError(f"{path} does not describe its layers: {fault}; write it again") from fault
    state: dict[str, Tensor] = {}
    for layer, (bits, shape) in layers.items():
        name = f"{layer}.weight"
        state[name] = _decoded(path, name, tensors, bits, shape)
    parts = {f"{layer}.weight.{part}" for layer in layers for part in (_CODES, _CODEBOOK, _SCALE)}
    return state | {name: tensor for name, tensor in tensors.items() if name not in parts}


def _faults(layer: str, weight: CodebookWeight | GridWeight) -> list[str]:
    if isinstance(weight, CodebookWeight):
        codes, table, low, high = weight.indices, weight.codebook, 0, len(weight.codebook) - 1
        what = "indices"
    else:
        codes, table, what = weight.integers, weight.scale, "integers"
        low, high = _limits(weight.bits)
    if not 1 <= weight.bits <= MAX_BITS:
        return [f"layer {layer!r}: packed weights have from 1 to {MAX_BITS} bits, got {weight.bits}"]
    found = []
    smallest, largest = (int(codes.min()), int(codes.max())) if codes.numel() else (low, high)
    if not low <= smallest <= largest <= high:
        found.append(f"layer {layer!r}: {what} must be from {low} to {high}, got {smallest} to {largest}")
    if weight.bits == 1 and isinstance(weight, GridWeight) and bool((codes == 0).any()):
        found.append(f"layer {layer!r}: integers of one bit are -1 and 1, got 0")
    if not bool(torch.isfinite(table).all()):
        found.append(f"layer {layer!r} has a codebook or scale that is not finite")
    return found


def _limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed grid; one bit stands for -1 and 1."""
    return (-1, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _coded(weight: CodebookWeight | GridWeight) -> tuple[NDArray[np.uint8], Tensor]:
    """Codes from 0 up, in the weight's shape, and the table that they are read with."""
    if isinstance(weight, CodebookWeight):
        codes, table = weight.indices.cpu().numpy(), weight.codebook
    else:
        integers = weight.integers.cpu().numpy().astype(np.int16)
        codes = (integers > 0) if weight.bits == 1 else integers - _limits(weight.bits)[0]
        table = weight.scale
    return codes.astype(np.uint8), table.detach().cpu().float().contiguous()


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes one after the other, the lowest bit first, without gaps."""
    return np.packbits(
        np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little"), bitorder="little"
    )


def _unpack(packed: NDArray[np.uint8], bits: int, number: int) -> NDArray[np.uint8]:
    rows = np.unpackbits(packed, count=number * bits, bitorder="little").reshape(number, bits)
    return np.packbits(rows, axis=1, bitorder="little")[:, 0]


def _decoded(
    path: Path, name: str, tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, ...]
) -> Tensor:
    """The float32 weight of a layer, after its parts are found to fit each other."""
    packed = tensors.get(f"{name}.{_CODES}")
    codebook, scale = tensors.get(f"{name}.{_CODEBOOK}"), tensors.get(f"{name}.{_SCALE}")
    number = math.prod(shape) if all(size >= 0 for size in shape) else -1
    fits = (
        packed is not None
        and packed.dtype == torch.uint8
        and 1 <= bits <= MAX_BITS
        and number >= 0
        and packed.shape == (math.ceil(number * bits / 8),)
        and (codebook is None) != (scale is None)
    )
    table = codebook if codebook is not None else scale
    if not fits or packed is None or table is None or table.dtype != torch.float32:
        raise CheckpointError(f"{path}: the parts of {name!r} do not fit each other; write the file again")
    codes = torch.from_numpy(_unpack(packed.numpy(), bits, number)).reshape(shape)
    if codebook is not None:
        if codebook.ndim != 1 or (number and int(codes.max()) >= len(codebook)):
            raise CheckpointError(f"{path}: {name!r} has indices beyond its codebook; write the file again")
        return codebook[codes.long()]
    integers = codes.float() * 2 - 1 if bits == 1 else codes.float() + _limits(bits)[0]
    try:
        made = integers * table
    except RuntimeError:
        made = table
    if made.shape != shape:
        raise CheckpointError(f"{path}: the scale of {name!r} does not fit its shape {shape}; write it again")
    return made


def _digest(tensors: Mapping[str, Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()
