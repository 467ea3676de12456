"""The state of a training between two epochs, on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError
from autocompress.training.data import Data
from autocompress.training.settings import EpochReport, TrainSettings
from autocompress.zoo import named_tensors, read_safetensors, write_tensors

_MODEL, _MOMENTUM = "model.", "momentum."
_HEADER = "autocompress.training"
_TO_REDO = "remove it to start over, or choose another path"


def identity_of(
    model: nn.Module, data: Data, *, settings: TrainSettings, seed: int, teacher: nn.Module | None
) -> dict[str, Any]:
    """What a checkpoint must share with the call that continues from it, as JSON values.

    The network counts by the names, shapes and types of its tensors, for its weights change; the teacher by
    its weights; the data by name and sizes.
    """
    tensors = [(name, tuple(t.shape), str(t.dtype)) for name, t in named_tensors(model).items()]
    return {
        "settings": asdict(settings),
        "seed": seed,
        "network": hashlib.sha256(repr(tensors).encode()).hexdigest(),
        "teacher": None if teacher is None else weights_digest(teacher),
        "data": [data.name, len(data.train), len(data.search), list(data.input_shape)],
    }


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights and momentum, with the reports so far in its header.

    Args:
        path: the file.
        identity: see :func:`identity_of`.
    """

    path: Path
    identity: dict[str, Any]

    def write(self, model: nn.Module, optimizer: torch.optim.SGD, reports: tuple[EpochReport, ...]) -> None:
        """Replace the file by the state after the last report.

        Raises:
            RunDirectoryError: it cannot be written; the previous one is intact.
        """
        tensors = {_MODEL + name: tensor for name, tensor in named_tensors(model).items()}
        tensors |= {_MOMENTUM + name: buffer for name, buffer in _buffers(model, optimizer).items()}
        header = {"identity": self.identity, "reports": [asdict(report) for report in reports]}
        write_tensors(self.path, tensors, metadata={_HEADER: json.dumps(header)})

    def restore(self, model: nn.Module, optimizer: torch.optim.SGD) -> tuple[EpochReport, ...]:
        """Load the file, if there is one, into the network and its momentum; give the reports so far.

        Raises:
            CheckpointError: damaged, or of another training; nothing was changed.
        """
        if not self.path.exists():
            return ()
        stored, metadata = read_safetensors(self.path)
        header, reports = self._header(metadata)
        self._same_training(header)
        targets = {_MODEL + name: tensor for name, tensor in named_tensors(model).items()}
        targets |= {_MOMENTUM + name: buffer for name, buffer in _buffers(model, optimizer).items()}
        wrong = [n for n in targets.keys() | stored.keys() if _shape(targets, n) != _shape(stored, n)]
        if wrong:
            raise CheckpointError(f"{self.path} lacks or alters {sorted(wrong)[0]}; {_TO_REDO}")
        with torch.no_grad():
            for name, tensor in targets.items():
                tensor.copy_(stored[name])
        return reports

    def _header(self, metadata: dict[str, str]) -> tuple[dict[str, Any], tuple[EpochReport, ...]]:
        try:
            header = json.loads(metadata[_HEADER])
            reports = tuple(EpochReport(**report) for report in header["reports"])
            return dict(header["identity"]), reports
        except (KeyError, TypeError, ValueError) as fault:
            raise CheckpointError(f"{self.path} is not a training checkpoint; {_TO_REDO}") from fault

    def _same_training(self, found: dict[str, Any]) -> None:
        faults = []
        for key, wanted in self.identity.items():
            if found.get(key) == wanted:
                continue
            if key == "network":
                faults.append("network: its layers differ")
            elif key == "teacher":
                faults.append("teacher: its weights differ")
            elif key == "settings":
                theirs = found.get(key, {})
                faults += [
                    f"{name}: {theirs.get(name)} there, {value} here"
                    for name, value in wanted.items()
                    if theirs.get(name) != value
                ]
            else:
                faults.append(f"{key}: {found.get(key)} there, {wanted} here")
        if faults:
            raise CheckpointError(f"{self.path} is of another training ({'; '.join(faults)}); {_TO_REDO}")


def weights_digest(model: nn.Module) -> str:
    """Hash of the names, shapes, types and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _buffers(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    return {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if "momentum_buffer" in optimizer.state.get(parameter, {})
    }


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
