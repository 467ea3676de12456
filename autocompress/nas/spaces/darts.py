"""DARTS' space: a normal and a reduction cell of 14 edges each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import RecipeError
from autocompress.core.graph import LayerGraph
from autocompress.nas.spaces.cells import (
    CellPlan,
    Edge,
    Edges,
    Wiring,
    decision_of,
    edge_key,
    random_edges,
    strongest_edges,
)
from autocompress.nas.spaces.operations import (
    CELL_OPERATIONS,
    FactorizedReduce,
    Operation,
    Place,
    Zeros,
    relu_conv_bn,
    sketch_relu_conv_bn,
)
from autocompress.nas.spaces.sketch import Signal, Sketch
from autocompress.nas.spaces.space import Arch, Make, Space, check_sizes, frozen
from autocompress.zoo.chains import initialise

_OPERATIONS = (
    *("none", "skip_connect", "avg_pool_3x3", "max_pool_3x3"),
    *("dil_conv_3x3", "dil_conv_5x5", "sep_conv_3x3", "sep_conv_5x5"),
)
_WIRING = Wiring(num_inputs=2, num_nodes=4, concatenates=True)
KINDS = ("normal", "reduce")
_STEM_MULTIPLIER = 3


@dataclass(frozen=True, slots=True)
class CellSite:
    """One cell of a network.

    Args:
        number: from 0.
        kind: ``normal`` or ``reduce``.
        width: channels of each node.
        hw: size of the previous cell's output.
    """

    number: int
    kind: str
    width: int
    hw: tuple[int, int]

    def place(self, edge: Edge) -> Place:
        """Where the operation of an edge runs."""
        stride = 2 if self.kind == "reduce" and edge[0] < _WIRING.num_inputs else 1
        hw = self.hw if edge[0] < _WIRING.num_inputs or self.kind == "normal" else _halved(self.hw)
        path = f"cells.{self.number}.edges.operations.{edge_key(edge)}"
        return Place(decision_of(self.kind, edge), path, self.width, self.width, stride, hw)


class Cell(nn.Module):
    """Inputs brought to one width and size, and the edges between the nodes.

    Args:
        site: which cell of the network.
        edges: its operations.
        in_channels: channels of the output of the cell before the last, and of the last.
        halves: whether the output of the cell before the last is twice as large.
    """

    def __init__(self, site: CellSite, edges: Edges, in_channels: tuple[int, int], halves: bool) -> None:
        super().__init__()
        used = edges.plan.inputs
        older = FactorizedReduce if halves else relu_conv_bn
        self.older = older(in_channels[0], site.width) if 0 in used else None
        self.last = relu_conv_bn(in_channels[1], site.width) if 1 in used else None
        self.edges = edges

    def forward(self, older: Tensor | None, last: Tensor | None) -> Tensor:
        """Outputs of the two cells before, each (N, C, H, W) or None where not read, to this cell's."""
        states = {}
        if self.older is not None:
            states[0] = self.older(older)
        if self.last is not None:
            states[1] = self.last(last)
        nodes = self.edges(states)
        return nodes[0] if len(nodes) == 1 else torch.cat(nodes, 1)


class DartsNetwork(nn.Module):
    """Stem, cells that read the two before them, and a classifier.

    Args:
        stem: first convolution and BatchNorm.
        cells: by number; those that nothing reads are absent.
        width: channels of the last cell's output.
        num_classes: number of outputs.
    """

    def __init__(self, stem: nn.Module, cells: Mapping[int, Cell], width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.cells = nn.ModuleDict({str(number): cell for number, cell in cells.items()})
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, C, H, W)."""
        x = self.stem(x)
        outputs: dict[int, Tensor] = {-2: x, -1: x}
        for name, cell in self.cells.items():
            number = int(name)
            outputs[number] = x = cell(outputs.get(number - 2), outputs.get(number - 1))
        out: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return out


@dataclass(frozen=True)
class Darts(Space):
    """DARTS: 8 operations on the 14 edges of a normal and of a reduction cell.

    Liu, Simonyan, Yang, arXiv 1806.09055, section 2.1. Every assignment of operations to edges is a member,
    so a decision is one edge, such as ``normal.0_2``. The paper's members are those with two edges per node
    that are not ``none``; :meth:`random` and :meth:`derive` give only these.

    Args:
        input_shape: of one image, (channels, height, width); height and width are halved twice.
        num_classes: number of outputs.
        channels: width of the first cells; the paper searches with 16 and evaluates with 36.
        num_cells: at least 3; the reduction cells are those at a third and at two thirds. The paper searches
            with 8 and evaluates with 20.

    Raises:
        RecipeError: settings out of range, all faults at once.
    """

    input_shape: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    channels: int = 16
    num_cells: int = 8
    name: str = "darts"

    def __post_init__(self) -> None:
        faults = []
        if self.channels < 2:
            faults.append(f"{self.name}: channels must be >= 2, got {self.channels}")
        if self.num_cells < 3:
            faults.append(f"{self.name}: num_cells must be >= 3 to hold both cells, got {self.num_cells}")
        if faults:
            raise RecipeError(faults)
        check_sizes(self.name, self.input_shape, self.num_classes, num_halvings=2)

    @property
    def operations(self) -> Mapping[str, Operation]:
        """See :class:`Space`."""
        return {name: CELL_OPERATIONS[name] for name in _OPERATIONS}

    @cached_property
    def decisions(self) -> Mapping[str, tuple[str, ...]]:
        """See :class:`Space`."""
        return frozen({decision_of(kind, edge): _OPERATIONS for kind in KINDS for edge in _WIRING.edges})

    @cached_property
    def sites(self) -> tuple[CellSite, ...]:
        """The cells, first to last."""
        found, width, hw = list[CellSite](), self.channels, self.input_shape[1:]
        for number in range(self.num_cells):
            reduces = number in (self.num_cells // 3, 2 * self.num_cells // 3)
            width = 2 * width if reduces else width
            found.append(CellSite(number, "reduce" if reduces else "normal", width, hw))
            hw = _halved(hw) if reduces else hw
        return tuple(found)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """See :class:`Space`."""
        return tuple(site.place(edge) for site in self.sites for edge in _WIRING.edges)

    @property
    def edges_into_nodes(self) -> tuple[tuple[str, ...], ...]:
        """The decisions of the edges into each node, of which the paper's members keep two."""
        return tuple(
            tuple(decision_of(kind, (source, target)) for source in range(target))
            for kind in KINDS
            for target in _WIRING.nodes
        )

    def _needed(self, plans: Mapping[str, CellPlan]) -> set[int]:
        """Numbers of the cells that the output depends on; -1 and -2 are the stem."""
        needed = {self.num_cells - 1}
        for site in reversed(self.sites):
            if site.number in needed:
                needed |= {site.number - 2 + state for state in plans[site.kind].inputs}
        return needed

    def assemble(self, make: Make) -> nn.Module:
        """See :class:`Space`."""
        made = {s.number: {edge: make(s.place(edge)) for edge in _WIRING.edges} for s in self.sites}
        plans = {
            s.kind: CellPlan(_WIRING, _WIRING.live([e for e, m in made[s.number].items() if m is not None]))
            for s in self.sites
        }
        needed, width = self._needed(plans), _STEM_MULTIPLIER * self.channels
        stem = nn.Sequential(
            nn.Conv2d(self.input_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        widths, cells, was_reduction = {-2: width, -1: width}, dict[int, Cell](), False
        for site in self.sites:
            plan = plans[site.kind]
            widths[site.number] = site.width * max(1, len(plan.outputs))
            if site.number in needed:
                operations = {e: m for e in plan.live if (m := made[site.number][e]) is not None}
                edges = Edges(plan, operations, Zeros(2 if site.kind == "reduce" else 1))
                before = (widths[site.number - 2], widths[site.number - 1])
                cells[site.number] = Cell(site, edges, before, was_reduction)
            was_reduction = site.kind == "reduce"
        return DartsNetwork(stem, cells, widths[self.num_cells - 1], self.num_classes)

    def graph(self, arch: Arch) -> LayerGraph:
        """See :class:`Space`."""
        self.check(arch)
        plans = {kind: CellPlan(_WIRING, _WIRING.live(_present(kind, arch))) for kind in KINDS}
        needed, sketch = self._needed(plans), Sketch(self.input_shape)
        stem = sketch.conv("stem.0", sketch.input, _STEM_MULTIPLIER * self.channels, kernel=3)
        stem = sketch.norm("stem.1", stem)
        outputs: dict[int, Signal] = {-2: stem, -1: stem}
        for site in self.sites:
            if site.number in needed:
                outputs[site.number] = self._sketch_cell(sketch, site, plans[site.kind], arch, outputs)
        sketch.linear("classifier", outputs[self.num_cells - 1], self.num_classes)
        return sketch.graph()

    def _sketch_cell(
        self, sketch: Sketch, site: CellSite, plan: CellPlan, arch: Arch, outputs: Mapping[int, Signal]
    ) -> Signal:
        path, states = f"cells.{site.number}", dict[int, Signal]()
        if 0 in plan.inputs:
            older = outputs[site.number - 2]
            if older.hw == site.hw:
                states[0] = sketch_relu_conv_bn(sketch, f"{path}.older", older, site.width)
            else:
                states[0] = FactorizedReduce.sketch(sketch, f"{path}.older", older, site.width)
        if 1 in plan.inputs:
            states[1] = sketch_relu_conv_bn(sketch, f"{path}.last", outputs[site.number - 1], site.width)

        def apply(edge: Edge, x: Signal) -> Signal:
            place = site.place(edge)
            return self.operations[arch[place.decision]].sketch(sketch, place, x)

        nodes = plan.run(dict(states), apply, sketch.add)
        if not nodes:
            return sketch.pool(states[1], 2 if site.kind == "reduce" else 1)
        return nodes[0] if len(nodes) == 1 else sketch.concat(nodes)

    def random(self, generator: np.random.Generator) -> dict[str, str]:
        """A member of the paper's space: per node two edges and an operation on each, drawn uniformly."""
        return random_edges(self.edges_into_nodes, _OPERATIONS, generator)

    def derive(self, probabilities: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
        """Per node the two edges with the likeliest operations other than ``none``, and these operations.

        Liu et al., section 2.4.

        Args:
            probabilities: decision -> shape (operations,).
        """
        return strongest_edges(self.edges_into_nodes, _OPERATIONS, probabilities)


def _present(kind: str, arch: Arch) -> list[Edge]:
    return [edge for edge in _WIRING.edges if arch[decision_of(kind, edge)] != "none"]


def _halved(hw: tuple[int, int]) -> tuple[int, int]:
    return hw[0] // 2, hw[1] // 2
