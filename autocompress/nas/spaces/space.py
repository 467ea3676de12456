"""What every search space is: decisions, and for each assignment a graph and a network."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.core.errors import RecipeError
from autocompress.core.graph import LayerGraph
from autocompress.core.wording import did_you_mean
from autocompress.nas.spaces.operations import Operation, Place

Arch = Mapping[str, str]
"""Decision -> operation: the part ``arch`` of a plan."""
Make = Callable[[Place], nn.Module | None]
"""Gives the module for a place, or None to leave the place out."""
ABSENT = ("none", "skip")
"""Operations that leave their place out of the network: an edge without one, a block without one."""


class Space(ABC):
    """Networks that differ in the operations at some places of a fixed skeleton.

    Plain immutable data: subclasses are frozen dataclasses. An assignment of one operation to every decision
    is a member. A member's graph comes without making the network, so that any hardware target can price it
    before it is trained; its network is a plain module, in which a layer has the same name in every member.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: what was derived from them holds views that cannot be pickled."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    @abstractmethod
    def operations(self) -> Mapping[str, Operation]:
        """Every operation of the space by name."""

    @property
    @abstractmethod
    def decisions(self) -> Mapping[str, tuple[str, ...]]:
        """Decision -> names of its operations, in the order in which data flows."""

    @property
    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """Where operations run, in the order of execution; a decision can have several."""

    @abstractmethod
    def assemble(self, make: Make) -> nn.Module:
        """The skeleton with the given modules at its places, with fresh weights from the global generator.

        Args:
            make: called once per place, in the order of execution.
        """

    @abstractmethod
    def graph(self, arch: Arch) -> LayerGraph:
        """The graph of a member, equal to what ``trace`` finds in its network.

        Raises:
            RecipeError: not a member.
        """

    def operation(self, choice: str, place: Place) -> nn.Module:
        """An operation with fresh weights; those that leave their place out as a module that gives zeros."""
        return self.operations[choice].module(place)

    def derive(self, probabilities: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
        """The member that a distribution over every decision's operations stands for: each one's likeliest.

        Args:
            probabilities: decision -> shape (operations,).
        """
        return {name: ops[int(np.argmax(probabilities[name]))] for name, ops in self.decisions.items()}

    def random(self, generator: np.random.Generator) -> dict[str, str]:
        """A member drawn uniformly."""
        return {name: ops[int(generator.integers(len(ops)))] for name, ops in self.decisions.items()}

    @property
    def num_members(self) -> int:
        """How many members there are."""
        return math.prod(len(ops) for ops in self.decisions.values())

    def members(self) -> Iterator[dict[str, str]]:
        """Every member, the last decision varying fastest."""
        for choice in itertools.product(*self.decisions.values()):
            yield dict(zip(self.decisions, choice, strict=True))

    def check(self, arch: Arch) -> None:
        """Raise unless an assignment is a member.

        Raises:
            RecipeError: decisions that are missing or unknown, operations not offered; all of them.
        """
        faults = [
            f"no decision named {name!r}{did_you_mean(name, self.decisions)}"
            for name in arch
            if name not in self.decisions
        ]
        for name, ops in self.decisions.items():
            if name not in arch:
                faults.append(f"decision {name!r} is missing; it offers {', '.join(ops)}")
            elif arch[name] not in ops:
                faults.append(f"decision {name!r} offers {', '.join(ops)}, got {arch[name]!r}")
        if faults:
            raise RecipeError(faults)

    def build(self, arch: Arch, *, seed: int) -> nn.Module:
        """A member's network with fresh weights.

        Args:
            arch: one operation per decision.
            seed: of the weights; the global generator is left as it was.

        Raises:
            RecipeError: not a member.
        """
        self.check(arch)

        def make(place: Place) -> nn.Module | None:
            choice = arch[place.decision]
            return None if choice in ABSENT else self.operation(choice, place)

        return seeded(lambda: self.assemble(make), seed)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What a function builds with torch's global generator at a seed; the generator is set back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def frozen(decisions: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    """A read-only view."""
    return MappingProxyType(dict(decisions))


def check_sizes(name: str, input_shape: tuple[int, int, int], num_classes: int, *, num_halvings: int) -> None:
    """Raise unless images can be halved that often, exactly.

    Raises:
        RecipeError: an axis or the number of classes below 1, or a size that is no multiple of 2 to the
            number of halvings.
    """
    faults = []
    if min(input_shape) < 1:
        faults.append(f"{name}: input_shape must be (channels, height, width), each >= 1, got {input_shape}")
    if num_classes < 1:
        faults.append(f"{name}: num_classes must be >= 1, got {num_classes}")
    factor = 2**num_halvings
    if any(size % factor for size in input_shape[1:]):
        faults.append(
            f"{name} halves its input {num_halvings} times, so height and width must be multiples of "
            f"{factor}, got {input_shape[1]}x{input_shape[2]}; use a layout with fewer strides of 2, or "
            "resize the images"
        )
    if faults:
        raise RecipeError(faults)
