"""Cells: small directed graphs of feature maps whose edges are chosen, stacked to a network.

Both spaces here are one idea. A cell has input states and nodes; a node is the sum of its incoming edges,
each an operation on an earlier state. What no data reaches, or what no output needs, is not built: a member
with a dead edge costs nothing for it, unlike in the released code of NAS-Bench-201.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Edge = tuple[int, int]
EDGES_PER_NODE = 2
"""Of a DARTS cell."""
_T = TypeVar("_T")


def edge_key(edge: Edge) -> str:
    """The name of an edge within a cell: ``SOURCE_TARGET``."""
    return f"{edge[0]}_{edge[1]}"


@dataclass(frozen=True, slots=True)
class Wiring:
    """The states of a cell: ``num_inputs`` inputs, numbered from 0, and then nodes fed by all states before.

    Args:
        num_inputs: 1 or 2.
        num_nodes: states that are computed.
        concatenates: whether the output is all nodes side by side; else it is the last node.
    """

    num_inputs: int
    num_nodes: int
    concatenates: bool

    @property
    def nodes(self) -> range:
        """Numbers of the computed states."""
        return range(self.num_inputs, self.num_inputs + self.num_nodes)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """(source, target), by target and then by source: the order of execution."""
        return tuple((source, target) for target in self.nodes for source in range(target))

    def live(self, present: Sequence[Edge]) -> tuple[Edge, ...]:
        """Those of the present edges through which data flows from an input to the output."""
        reached = set(range(self.num_inputs))
        for target in self.nodes:
            if any((source, target) in present for source in reached):
                reached.add(target)
        needed = set(self.nodes) if self.concatenates else {self.nodes[-1]}
        for source in reversed(self.nodes):
            if any((source, target) in present for target in needed):
                needed.add(source)
        return tuple((s, t) for s, t in self.edges if (s, t) in present and s in reached and t in needed)


@dataclass(frozen=True)
class CellPlan:
    """Which parts of a cell are built.

    Args:
        wiring: of the full cell.
        live: its live edges, in order of execution.
    """

    wiring: Wiring
    live: tuple[Edge, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The input states that are read. A cell without edges gives zeros of its last input's shape."""
        used = sorted({source for source, _ in self.live if source < self.wiring.num_inputs})
        return tuple(used) if used else (self.wiring.num_inputs - 1,)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The nodes that make up the output; empty when the cell gives zeros."""
        reached = sorted({target for _, target in self.live})
        return tuple(reached) if self.wiring.concatenates else tuple(reached[-1:])

    def run(
        self,
        states: dict[int, _T],
        edge: Callable[[Edge, _T], _T],
        add: Callable[[_T, _T], _T],
    ) -> list[_T]:
        """The output nodes, computed with given operations; empty when the cell gives zeros.

        Args:
            states: the inputs that are read; nodes are added to it.
            edge: applies the operation of an edge to its source.
            add: the sum of two states.
        """
        for source, target in self.live:
            value = edge((source, target), states[source])
            states[target] = add(states[target], value) if target in states else value
        return [states[node] for node in self.outputs]


class Edges(nn.Module):
    """The operations of a cell, as its nodes' sums.

    Args:
        plan: what is built.
        operations: one module per live edge, in order of execution.
        zeros: gives the output of a cell without live edges from its last input.
    """

    def __init__(self, plan: CellPlan, operations: Mapping[Edge, nn.Module], zeros: nn.Module) -> None:
        super().__init__()
        self.plan = plan
        self.operations = nn.ModuleDict({edge_key(edge): module for edge, module in operations.items()})
        self.zeros = None if plan.live else zeros

    def forward(self, states: dict[int, Tensor]) -> list[Tensor]:
        """Input states by number, each (N, C, H, W), to the output nodes."""
        if self.zeros is not None:
            return [self.zeros(states[self.plan.wiring.num_inputs - 1])]
        return self.plan.run(
            dict(states), lambda edge, x: self.operations[edge_key(edge)](x), lambda a, b: a + b
        )


def random_edges(
    edges_into_nodes: Sequence[Sequence[str]], operations: Sequence[str], generator: np.random.Generator
) -> dict[str, str]:
    """A cell as DARTS has them: per node two edges and an operation on each, all drawn uniformly.

    Args:
        edges_into_nodes: per node, the decisions of the edges into it.
        operations: of every decision; the first leaves the edge out.
        generator: draws.
    """
    arch = {edge: operations[0] for edges in edges_into_nodes for edge in edges}
    for edges in edges_into_nodes:
        for source in generator.choice(len(edges), EDGES_PER_NODE, replace=False):
            arch[edges[int(source)]] = operations[1 + int(generator.integers(len(operations) - 1))]
    return arch


def strongest_edges(
    edges_into_nodes: Sequence[Sequence[str]],
    operations: Sequence[str],
    probabilities: Mapping[str, NDArray[np.float64]],
    *,
    none_counts: bool = False,
) -> dict[str, str]:
    """Per node the two edges with the likeliest operations, and these operations; the others are left out.

    Liu, Simonyan, Yang, arXiv 1806.09055, section 2.4.

    Args:
        edges_into_nodes: per node, the decisions of the edges into it.
        operations: of every decision; the first leaves the edge out.
        probabilities: decision -> shape (operations,).
        none_counts: whether leaving an edge out counts as an operation, also in ranking edges.
    """
    first = 0 if none_counts else 1
    arch = {edge: operations[0] for edges in edges_into_nodes for edge in edges}
    for edges in edges_into_nodes:
        strongest = sorted(edges, key=lambda name: -float(np.max(probabilities[name][first:])))
        for name in strongest[:EDGES_PER_NODE]:
            arch[name] = operations[first + int(np.argmax(probabilities[name][first:]))]
    return arch


def decision_of(kind: str, edge: Edge) -> str:
    """The name of the decision of an edge: ``KIND.SOURCE_TARGET``."""
    return f"{kind}.{edge_key(edge)}"
