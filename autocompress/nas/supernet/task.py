"""What the networks of a space are searched for: how their outputs answer a data set's question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from autocompress.nas.spaces import Space
from autocompress.training import Data


class Task(Protocol):
    """A question with one right answer among several; plain settings, told apart by their ``repr``."""

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """The network's answers (N, answers) for a batch of the data set's samples (N, C, H, W)."""
        ...

    def faults(self, space: Space, data: Data) -> list[str]:
        """Why the networks of a space cannot be asked this about some data; empty when they can."""
        ...


@dataclass(frozen=True, slots=True)
class Classification:
    """Which class an image is of; networks answer with one logit per class."""

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """See :class:`Task`."""
        out: Tensor = network(x)
        return out

    def faults(self, space: Space, data: Data) -> list[str]:
        """See :class:`Task`."""
        faults = []
        if data.input_shape != space.input_shape:
            faults.append(
                f"images of {data.name!r} are {data.input_shape}, the space is for {space.input_shape}"
            )
        if data.num_classes != space.num_classes:
            faults.append(f"{data.name!r} has {data.num_classes} classes, the space {space.num_classes}")
        return faults


CLASSIFICATION = Classification()
