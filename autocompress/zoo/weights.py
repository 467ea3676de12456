"""Weights of a network: load them into it, save them from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError
from autocompress.zoo.tensor_file import read_pickle, read_safetensors, write_tensors

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile
_SHOWN = 8
# Optimiser state beside the weights is common: Adam makes it three times the weights.
_SIZE_FACTOR, _SIZE_SLACK = 4, 64 * 2**20
# Counters that BatchNorm layers did not have before torch 0.4.1 and that evaluation does not read.
_OPTIONAL = "num_batches_tracked"


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load weights into a network in place; a network that cannot take all of them stays as it was.

    Args:
        model: the network; every tensor of its state_dict must be in the file, and no other, save for
            BatchNorm's counters.
        path: ``.safetensors``, or a file of ``torch.save`` with a state_dict, also inside ``state_dict`` or
            ``model``, with or without the prefix of DataParallel.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, of another network or not finite.
    """
    path = Path(path)
    own = named_tensors(model)
    max_bytes = _SIZE_FACTOR * sum(t.numel() * t.element_size() for t in own.values()) + _SIZE_SLACK
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.stat().st_size > max_bytes:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, more than the {max_bytes} this network could need; "
            "save only its state_dict"
        )
    if path.suffix == ".safetensors":
        content: Any = read_safetensors(path)[0]
    else:
        content = read_pickle(path, max_bytes=max_bytes)
    stored = _state_dict(content, path)
    counters = {name: own[name] for name in own if name.endswith(_OPTIONAL) and name not in stored}
    merged = counters | stored
    _refuse(path, "does not fit the network", _mismatches(own, merged))
    ready = {name: merged[name].to(own[name].dtype) for name in own}
    bad = [f"{name} has values that are not finite" for name, t in ready.items() if not _finite(t)]
    _refuse(path, "is damaged or comes from a diverged training", bad)
    model.load_state_dict(ready)


def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write the network's state_dict as safetensors, whole or not at all.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    write_tensors(Path(path), named_tensors(model), metadata={"format": "pt"})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network's state_dict; other state that a module may keep in it is left out."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} must hold a state_dict (name -> tensor), got {type(content).__name__}")
    faults = [
        f"{name!r} is {type(value).__name__}, not a tensor"
        for name, value in content.items()
        if not (isinstance(name, str) and _is_dense(value))
    ]
    _refuse(path, "holds more than named dense tensors; save only the state_dict", faults)
    tensors: dict[str, Tensor] = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _mismatches(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    faults = [f"{name} is missing" for name in own if name not in stored]
    faults += [f"{name} is not in the network" for name in stored if name not in own]
    for name in own.keys() & stored.keys():
        mine, theirs = own[name], stored[name]
        if mine.shape != theirs.shape:
            faults.append(f"{name} has shape {tuple(theirs.shape)}, the network's is {tuple(mine.shape)}")
        elif mine.is_floating_point() != theirs.is_floating_point() or theirs.is_complex():
            faults.append(f"{name} is {theirs.dtype}, the network's is {mine.dtype}")
    return faults


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _refuse(path: Path, what: str, faults: Sequence[str]) -> None:
    if faults:
        shown = sorted(faults)[:_SHOWN]
        more = [f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise CheckpointError("\n  ".join([f"{path} {what}:", *shown, *more]))
