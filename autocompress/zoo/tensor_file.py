"""Named tensors on disk: read with suspicion, written whole or not at all."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from autocompress.core.errors import CheckpointError
from autocompress.core.files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, sync it and rename it.

    A crash or a full disk leaves the previous file as it was.

    Args:
        path: the file; its folder is created when absent.
        tensors: name -> tensor on any device; tensors that share memory are stored once each.
        metadata: texts stored in the header.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    content = safetensors.torch.save(own, metadata=metadata)
    write_atomically(path, content)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (safetensors.SafetensorError, OSError) as fault:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {fault}") from fault


def read_pickle(path: Path, *, max_bytes: int) -> Any:
    """What a ``.pth`` file holds, loaded without running code from it.

    Args:
        path: a file written by ``torch.save``.
        max_bytes: what its members may add up to.

    Raises:
        CheckpointError: the file is missing, truncated, unsafe or larger than it should be.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_members(path, max_bytes)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except pickle.UnpicklingError as fault:
        raise CheckpointError(
            f"{path} is damaged or holds Python objects other than tensors, which could run code: "
            f"{_first_lines(fault)}. Save only the state_dict, best as safetensors."
        ) from fault
    # A damaged file can break the reader anywhere: torch raises RuntimeError, EOFError, KeyError, ...
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            f"{path} is truncated or not a PyTorch checkpoint: {_first_lines(fault)}"
        ) from fault
    except (zipfile.BadZipFile, MemoryError, AssertionError) as fault:
        raise CheckpointError(f"{path} is damaged: {_first_lines(fault)}") from fault


def _check_members(path: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    # torch.save never compresses; a deflated member can expand a thousandfold.
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path} has a compressed member ({packed[0]}), which torch.save never writes; "
            "load and save it again with torch"
        )
    total = sum(m.file_size for m in members)
    if total > max_bytes:
        raise CheckpointError(
            f"{path} holds {total} bytes, more than the {max_bytes} this network could need; "
            "save only its state_dict"
        )


def _first_lines(fault: BaseException) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__
