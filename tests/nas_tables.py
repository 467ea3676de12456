"""Search spaces whose best members are known: tables without networks, and NAS-Bench-201's measured one."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core import Budget, Cost, Knob, LayerGraph, Plan, Problem
from autocompress.nas.spaces import Arch, NASBench201, OperationCosts, Place, Space
from autocompress.nas.spaces.space import Make
from autocompress.nas.supernet import Adam, CostTerm, Method, Step, Supernet


class Constant(nn.Module):
    """Gives one number whatever it reads."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 + self.value


class Total(nn.Module):
    """The sum of its parts' outputs."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)


@dataclass(frozen=True)
class TableSpace(Space):
    """Decisions ``d0``, ``d1``, ... whose operations add the entries of a table, one row each."""

    table: tuple[tuple[float, ...], ...]
    name: str = "table"
    input_shape: tuple[int, int, int] = (1, 1, 1)
    num_classes: int = 1

    @property
    def operations(self) -> Mapping[str, object]:
        return {}

    @property
    def decisions(self) -> Mapping[str, tuple[str, ...]]:
        return {f"d{i}": tuple(f"o{j}" for j in range(len(row))) for i, row in enumerate(self.table)}

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(Place(f"d{i}", f"parts.{i}", 1, 1, 1, (1, 1)) for i in range(len(self.table)))

    def operation(self, choice: str, place: Place) -> nn.Module:
        return Constant(self.table[int(place.decision[1:])][int(choice[1:])])

    def assemble(self, make: Make) -> nn.Module:
        return Total([part for place in self.places if (part := make(place)) is not None])

    def graph(self, arch: Arch) -> LayerGraph:
        raise NotImplementedError

    def value(self, arch: Arch) -> float:
        """The sum of a member's entries."""
        return sum(row[int(arch[f"d{i}"][1:])] for i, row in enumerate(self.table))


def random_table(shape: tuple[int, int], seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(size=shape)


def table_space(values: NDArray[np.float64]) -> TableSpace:
    return TableSpace(tuple(tuple(float(v) for v in row) for row in values))


def table_costs(values: NDArray[np.float64], fixed: float = 0.0) -> OperationCosts:
    return OperationCosts("latency_ms", {f"d{i}": row for i, row in enumerate(values)}, fixed)


def mean_output(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss: what the network adds up to."""
    return logits.mean()


def search_table(
    space: TableSpace,
    method: Method,
    *,
    num_steps: int,
    seed: int,
    alpha: Adam | None = None,
    cost: CostTerm | None = None,
) -> Supernet:
    """A supernet whose logits were updated that many times."""
    supernet = Supernet(space, seed=seed)
    optimizer = (alpha or method.alpha).optimizer(supernet)
    batch = (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for index in range(num_steps):
        step = Step(
            batch,
            batch,
            optimizer,
            unused,
            generator,
            progress=index / num_steps,
            cost=cost,
            loss=mean_output,
        )
        method.architecture_step(supernet, step)
    return supernet


@dataclass(frozen=True)
class CellTable:
    """NAS-Bench-201's cells with measured accuracy and latencies, in one order.

    ``accuracy`` is in percent, at least :data:`FLOOR`; ``latency`` is in the unit of each device's column.
    """

    texts: tuple[str, ...]
    accuracy: NDArray[np.float64]
    latency: Mapping[str, NDArray[np.float64]]

    def problem(self, device: str, limit: float) -> Problem:
        """The best accuracy within a latency; a knob's operations ascend in their cells' mean latency."""
        space, latency = NASBench201(), self.latency[device]
        archs = [space.from_text(text) for text in self.texts]
        index = {Plan(arch): i for i, arch in enumerate(archs)}
        knobs = []
        for name, ops in space.decisions.items():
            chosen = np.array([ops.index(arch[name]) for arch in archs])
            means = [latency[chosen == i].mean() for i in range(len(ops))]
            knobs.append(Knob("arch", name, tuple(ops[i] for i in np.argsort(means, kind="stable"))))
        return Problem(
            tuple(knobs),
            (Budget("latency_ms", limit, relative=False),),
            lambda plan: Cost({"latency_ms": float(latency[index[plan]])}),
            lambda plan: float(self.accuracy[index[plan]]),
            identity=f"nasbench201-{device}",
        )


FLOOR = 89.0
"""What cells below 90 % count, whose accuracy the table leaves out."""


def read_cells(path: Path) -> CellTable:
    """The table in ``nasbench201_acc_latency.csv``."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    accuracies = [row["cifar10_test_acc_200ep_if_ge_90"] for row in rows]
    devices = [
        name for name in rows[0] if name not in ("index", "arch_str", "cifar10_test_acc_200ep_if_ge_90")
    ]
    return CellTable(
        tuple(row["arch_str"] for row in rows),
        np.array([float(a) if a else FLOOR for a in accuracies]),
        {device: np.array([float(row[device]) for row in rows]) for device in devices},
    )
