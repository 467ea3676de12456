"""The state of a training between two epochs, on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.core.errors import CheckpointError
from autocompress.training.data import Data
from autocompress.training.evaluate import Scores
from autocompress.training.settings import EpochReport, TrainSettings
from autocompress.zoo import named_tensors, read_safetensors, write_tensors

_MODEL, _MOMENTUM, _BEST = "model.", "momentum.", "best."
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


@dataclass
class Best:
    """The best weights so far.

    Attributes:
        epoch: after which they were reached; -1 for those of the start.
        rank: accuracy and negative loss on the search split.
        tensors: name -> copy.
    """

    epoch: int = -1
    rank: tuple[float, float] = (-1.0, 0.0)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, model: nn.Module, scores: Scores, epoch: int) -> None:
        """Take a copy of the weights if they are better."""
        rank = (scores.accuracy, -scores.loss)
        if not self.tensors or rank > self.rank:
            self.epoch, self.rank = epoch, rank
            self.tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}

    def restore(self, model: nn.Module) -> None:
        """Put the copy back into the network."""
        _fill(named_tensors(model), self.tensors)


def _fill(targets: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(stored[name])


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights and momentum, with the reports so far in its header.

    Args:
        path: the file.
        identity: see :func:`identity_of`.
    """

    path: Path
    identity: dict[str, Any]

    def write(
        self,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        reports: tuple[EpochReport, ...],
        best: Best | None = None,
    ) -> None:
        """Replace the file by the state after the last report.

        Raises:
            RunDirectoryError: it cannot be written; the previous one is intact.
        """
        tensors = {_MODEL + name: tensor for name, tensor in named_tensors(model).items()}
        tensors |= {_MOMENTUM + name: buffer for name, buffer in _buffers(model, optimizer).items()}
        header: dict[str, Any] = {
            "identity": self.identity,
            "reports": [asdict(report) for report in reports],
        }
        if best is not None:
            tensors |= {_BEST + name: tensor for name, tensor in best.tensors.items()}
            header["best"] = [best.epoch, *best.rank]
        write_tensors(self.path, tensors, metadata={_HEADER: json.dumps(header)})

    def restore(
        self, model: nn.Module, optimizer: torch.optim.SGD, best: Best | None = None
    ) -> tuple[EpochReport, ...]:
        """Load the file, if there is one, into network, momentum and ``best``; give the reports so far.

        Raises:
            CheckpointError: damaged, or of another training; nothing was changed.
        """
        if not self.path.exists():
            return ()
        stored, metadata = read_safetensors(self.path)
        header, reports, epoch_and_rank = self._header(metadata)
        self._same_training(header)
        kept = {name.removeprefix(_BEST): t for name, t in stored.items() if name.startswith(_BEST)}
        stored = {name: t for name, t in stored.items() if not name.startswith(_BEST)}
        targets = {_MODEL + name: tensor for name, tensor in named_tensors(model).items()}
        targets |= {_MOMENTUM + name: buffer for name, buffer in _buffers(model, optimizer).items()}
        wrong = [n for n in targets.keys() | stored.keys() if _shape(targets, n) != _shape(stored, n)]
        if wrong:
            raise CheckpointError(f"{self.path} lacks or alters {sorted(wrong)[0]}; {_TO_REDO}")
        own = named_tensors(model)
        if best is not None:
            if wrong := [n for n in own.keys() | kept.keys() if _shape(own, n) != _shape(kept, n)]:
                raise CheckpointError(f"{self.path} lacks or alters the best {sorted(wrong)[0]}; {_TO_REDO}")
            best.epoch, best.rank = int(epoch_and_rank[0]), (epoch_and_rank[1], epoch_and_rank[2])
            best.tensors = {name: tensor.to(own[name].device) for name, tensor in kept.items()}
        _fill(targets, stored)
        return reports

    def _header(
        self, metadata: dict[str, str]
    ) -> tuple[dict[str, Any], tuple[EpochReport, ...], list[float]]:
        try:
            header = json.loads(metadata[_HEADER])
            reports = tuple(EpochReport(**report) for report in header["reports"])
            return dict(header["identity"]), reports, [float(v) for v in header.get("best", (-1, -1, 0))]
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
