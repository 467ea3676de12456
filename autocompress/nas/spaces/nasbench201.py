"""NAS-Bench-201's space: one cell of six edges, stacked in three stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from autocompress.core.errors import RecipeError
from autocompress.core.graph import LayerGraph
from autocompress.nas.spaces.cells import CellPlan, Edge, Edges, Wiring, decision_of, edge_key
from autocompress.nas.spaces.operations import (
    CELL_OPERATIONS,
    Operation,
    Place,
    Zeros,
    relu_conv_bn,
    sketch_relu_conv_bn,
)
from autocompress.nas.spaces.sketch import Signal, Sketch
from autocompress.nas.spaces.space import Arch, Make, Space, check_sizes, frozen
from autocompress.zoo.chains import initialise

_OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
_WIRING = Wiring(num_inputs=1, num_nodes=3, concatenates=False)
_KIND = "cell"
_NUM_STAGES = 3
# "|op~source|" per edge and "+" between nodes.
_TERM = re.compile(r"([a-z_0-9]+)~(\d)")


class ReductionBlock(nn.Module):
    """Two 3x3 convolutions, the first of stride 2; the shortcut is average pooling and a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_a = relu_conv_bn(in_channels, out_channels, 3, 2)
        self.conv_b = relu_conv_bn(out_channels, out_channels, 3)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / 2, W / 2)."""
        out: Tensor = self.conv_b(self.conv_a(x)) + self.downsample(x)
        return out

    @staticmethod
    def sketch(sketch: Sketch, path: str, x: Signal, channels: int) -> Signal:
        """The same as layers of a graph."""
        a = sketch_relu_conv_bn(sketch, f"{path}.conv_a", x, channels, kernel=3, stride=2)
        b = sketch_relu_conv_bn(sketch, f"{path}.conv_b", a, channels, kernel=3)
        return sketch.add(b, sketch.conv(f"{path}.downsample.1", sketch.pool(x, 2), channels))


class CellNetwork(nn.Module):
    """Stem, stages of cells with reduction blocks between them, and a classifier."""

    def __init__(self, space: NASBench201, cells: list[Edges]) -> None:
        super().__init__()
        width = space.channels
        self.stem = nn.Sequential(
            nn.Conv2d(space.input_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        parts: list[nn.Module] = []
        for stage in range(_NUM_STAGES):
            if stage:
                parts.append(ReductionBlock(width * 2 ** (stage - 1), width * 2**stage))
            start = stage * space.cells_per_stage
            parts += cells[start : start + space.cells_per_stage]
        self.parts = nn.ModuleList(parts)
        last = width * 2 ** (_NUM_STAGES - 1)
        self.last = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, space.num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, C, H, W)."""
        x = self.stem(x)
        for part in self.parts:
            x = part({0: x})[0] if isinstance(part, Edges) else part(x)
        out: Tensor = self.classifier(torch.flatten(self.pool(self.last(x)), 1))
        return out


@dataclass(frozen=True)
class NASBench201(Space):
    """NAS-Bench-201: 5 operations on the 6 edges of one cell, 15,625 members.

    Dong and Yang, arXiv 2001.00326, section 2. Differs from the released networks in that dead edges are not
    built. Decisions are named ``cell.0_1`` for the edge from state 0 to state 1.

    Args:
        input_shape: of one image, (channels, height, width); height and width are halved twice.
        num_classes: number of outputs.
        channels: width of the first stage; the benchmark has 16.
        cells_per_stage: the benchmark has 5.

    Raises:
        RecipeError: settings out of range, all faults at once.
    """

    input_shape: tuple[int, int, int] = (3, 32, 32)
    num_classes: int = 10
    channels: int = 16
    cells_per_stage: int = 5
    name: str = "nasbench201"

    def __post_init__(self) -> None:
        faults = [
            f"{self.name}: {key} must be >= 1, got {value}"
            for key, value in (("channels", self.channels), ("cells_per_stage", self.cells_per_stage))
            if value < 1
        ]
        if faults:
            raise RecipeError(faults)
        check_sizes(self.name, self.input_shape, self.num_classes, num_halvings=_NUM_STAGES - 1)

    @property
    def operations(self) -> Mapping[str, Operation]:
        """See :class:`Space`."""
        return {name: CELL_OPERATIONS[name] for name in _OPERATIONS}

    @cached_property
    def decisions(self) -> Mapping[str, tuple[str, ...]]:
        """See :class:`Space`."""
        return frozen({decision_of(_KIND, edge): _OPERATIONS for edge in _WIRING.edges})

    def _cells(self) -> list[tuple[str, int, tuple[int, int]]]:
        """Path, width and input size of every cell."""
        found = []
        for stage in range(_NUM_STAGES):
            hw = (self.input_shape[1] // 2**stage, self.input_shape[2] // 2**stage)
            for index in range(self.cells_per_stage):
                number = stage * (self.cells_per_stage + 1) + index
                found.append((f"parts.{number}", self.channels * 2**stage, hw))
        return found

    def _place(self, cell: tuple[str, int, tuple[int, int]], edge: Edge) -> Place:
        path, width, hw = cell
        return Place(decision_of(_KIND, edge), f"{path}.operations.{edge_key(edge)}", width, width, 1, hw)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """See :class:`Space`."""
        return tuple(self._place(cell, edge) for cell in self._cells() for edge in _WIRING.edges)

    def assemble(self, make: Make) -> nn.Module:
        """See :class:`Space`."""
        cells = []
        for cell in self._cells():
            made = {edge: make(self._place(cell, edge)) for edge in _WIRING.edges}
            plan = CellPlan(_WIRING, _WIRING.live([e for e, module in made.items() if module is not None]))
            cells.append(
                Edges(plan, {edge: m for edge in plan.live if (m := made[edge]) is not None}, Zeros())
            )
        return CellNetwork(self, cells)

    def graph(self, arch: Arch) -> LayerGraph:
        """See :class:`Space`."""
        self.check(arch)
        present = [edge for edge in _WIRING.edges if arch[decision_of(_KIND, edge)] != "none"]
        plan, sketch = CellPlan(_WIRING, _WIRING.live(present)), Sketch(self.input_shape)
        x = sketch.norm("stem.1", sketch.conv("stem.0", sketch.input, self.channels, kernel=3))
        for index, cell in enumerate(self._cells()):
            if index and index % self.cells_per_stage == 0:
                number = index + index // self.cells_per_stage - 1
                x = ReductionBlock.sketch(sketch, f"parts.{number}", x, cell[1])

            def apply(edge: Edge, signal: Signal, cell: tuple[str, int, tuple[int, int]] = cell) -> Signal:
                place = self._place(cell, edge)
                return self.operations[arch[place.decision]].sketch(sketch, place, signal)

            x = (plan.run({0: x}, apply, sketch.add) or [x])[-1]
        sketch.linear("classifier", sketch.norm("last.0", x), self.num_classes)
        return sketch.graph()

    def to_text(self, arch: Arch) -> str:
        """The member in the benchmark's notation.

        Example:
            >>> space = NASBench201()
            >>> space.to_text({name: "skip_connect" for name in space.decisions})[:34]
            '|skip_connect~0|+|skip_connect~0|s'
        """
        self.check(arch)
        nodes = []
        for target in _WIRING.nodes:
            terms = [f"{arch[decision_of(_KIND, (source, target))]}~{source}" for source in range(target)]
            nodes.append(f"|{'|'.join(terms)}|")
        return "+".join(nodes)

    def from_text(self, text: str) -> dict[str, str]:
        """The member written in the benchmark's notation.

        Raises:
            RecipeError: not that notation, or not a member.
        """
        arch: dict[str, str] = {}
        for offset, node in enumerate(text.split("+")):
            for operation, source in _TERM.findall(node):
                arch[decision_of(_KIND, (int(source), offset + 1))] = operation
        self.check(arch)
        if self.to_text(arch) != text:
            raise RecipeError(
                f"{text!r} is not the notation of NAS-Bench-201, which is {self.to_text(arch)!r}"
            )
        return arch
