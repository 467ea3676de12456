"""The state of a search between two epochs, on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.core.errors import CheckpointError
from autocompress.nas.supernet.network import Supernet
from autocompress.nas.supernet.reports import SearchEpoch
from autocompress.zoo import named_tensors, read_safetensors, write_tensors

_HEADER = "autocompress.nas"
_TO_REDO = "remove it to start over, or choose another path"


@dataclass(frozen=True)
class SearchState:
    """Everything that a search changes.

    Args:
        supernet: weights, logits and the mean of rewards.
        weight_optimizer: its momentum.
        alpha_optimizer: its averages and number of steps.
    """

    supernet: Supernet
    weight_optimizer: torch.optim.SGD
    alpha_optimizer: torch.optim.Adam

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as they are and not copied."""
        found = {f"model.{name}": tensor for name, tensor in named_tensors(self.supernet).items()}
        for name, parameter in self.supernet.named_parameters():
            found[f"momentum.{name}"] = self.weight_optimizer.state[parameter]["momentum_buffer"]
        for name, alpha in self.supernet.alphas.items():
            found[f"alpha.{name}"] = alpha
            for key, value in self.alpha_optimizer.state[alpha].items():
                found[f"adam.{key}.{name}"] = value
        return found

    def all_finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors().values() if t.is_floating_point())


@dataclass(frozen=True)
class SearchCheckpoint:
    """A file with the state after an epoch, and the reports so far in its header.

    Args:
        path: the file.
        identity: what a search must share with the one that wrote the file, as JSON values.
    """

    path: Path
    identity: dict[str, Any]

    def write(self, state: SearchState, reports: tuple[SearchEpoch, ...]) -> None:
        """Replace the file by the state after the last report.

        Raises:
            RunDirectoryError: it cannot be written; the previous one is intact.
        """
        header = {
            "identity": self.identity,
            "reward_mean": state.supernet.reward_mean,
            "reports": [asdict(report) for report in reports],
        }
        write_tensors(self.path, state.tensors(), metadata={_HEADER: json.dumps(header)})

    def restore(self, state: SearchState) -> tuple[SearchEpoch, ...]:
        """Load the file, if there is one; gives the reports so far.

        Raises:
            CheckpointError: damaged, or of another search; nothing was changed.
        """
        if not self.path.exists():
            return ()
        stored, metadata = read_safetensors(self.path)
        try:
            header = json.loads(metadata[_HEADER])
            reports = tuple(SearchEpoch(**report) for report in header["reports"])
            found, reward_mean = dict(header["identity"]), header["reward_mean"]
        except (KeyError, TypeError, ValueError) as fault:
            raise CheckpointError(f"{self.path} is not a checkpoint of a search; {_TO_REDO}") from fault
        wanted = json.loads(json.dumps(self.identity))
        if faults := [f"{k}: {found.get(k)} there, {v} here" for k, v in wanted.items() if found.get(k) != v]:
            raise CheckpointError(f"{self.path} is of another search ({'; '.join(faults)}); {_TO_REDO}")
        targets = state.tensors()
        wrong = [
            name
            for name in targets.keys() | stored.keys()
            if name not in targets or name not in stored or targets[name].shape != stored[name].shape
        ]
        if wrong:
            raise CheckpointError(f"{self.path} lacks or alters {sorted(wrong)[0]}; {_TO_REDO}")
        with torch.no_grad():
            for name, tensor in targets.items():
                tensor.copy_(stored[name])
        state.supernet.reward_mean = reward_mean
        return reports


def load_supernet(path: Path, supernet: Supernet) -> None:
    """Fill a supernet with the weights and logits that a search left, whatever its target was.

    Args:
        path: the checkpoint of a search over the same space.
        supernet: made with the same ``affine``; changed in place.

    Raises:
        CheckpointError: damaged, missing, or of another space; nothing was changed.
    """
    stored, _ = read_safetensors(path)
    targets = {f"model.{name}": tensor for name, tensor in named_tensors(supernet).items()}
    targets |= {f"alpha.{name}": alpha for name, alpha in supernet.alphas.items()}
    for name, tensor in targets.items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is not of a search over this {supernet.space.name} space: it lacks or alters "
                f"{name.partition('.')[2]}"
            )
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(stored[name])
