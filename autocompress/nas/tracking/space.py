"""CHASE's space: the one cell between a frozen backbone and a matching head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count

import numpy as np
from numpy.typing import NDArray
from torch import nn

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
from autocompress.nas.spaces.operations import Operation, Place, Zeros
from autocompress.nas.spaces.sketch import Signal, Sketch
from autocompress.nas.spaces.space import Arch, Make, Space, check_sizes, frozen, seeded
from autocompress.nas.tracking.backbone import FrozenBackbone
from autocompress.nas.tracking.necks import OPERATIONS, Adapters, CellNeck, ConvNeck, FrameNetwork

_WIRING = Wiring(num_inputs=2, num_nodes=4, concatenates=True)
_KIND = "cell"
_PATH = "neck.edges.operations"


@dataclass(frozen=True)
class TrackingCell(Space):
    """CHASE's space: DARTS' eight operations on the 14 edges of one cell that reads two features.

    Marvasti-Zadeh et al., arXiv 2107.03463, and its released code: stride 1, convolution before BatchNorm
    before LeakyReLU, adapters with bias and nothing behind them. Differs from the code in that pooling has no
    BatchNorm in the supernet, as members there have none either, and in a 1x1 where DiMP's head begins with a
    3x3 convolution.

    A member maps a frame to the features that are correlated; the graph is that of one frame. Which members
    there are, and how they are derived, is as in :class:`~autocompress.nas.spaces.Darts`, with one cell.

    Args:
        backbone: what every member begins with.
        input_shape: of one frame, (1, height, width), both even.
        channels: of each node; the paper has 256.
        embedding: channels that are correlated.
        derives_none: whether ``none`` counts in deriving a member, so that a node may end up with one edge or
            no edge; the released code differs from DARTS in counting it.

    Raises:
        RecipeError: settings out of range, all faults at once.
    """

    backbone: FrozenBackbone
    input_shape: tuple[int, int, int]
    channels: int = 16
    embedding: int = 16
    derives_none: bool = True
    name: str = "tracking_cell"
    num_classes: int = 1  # the output is a feature map

    def __post_init__(self) -> None:
        faults = [
            f"{self.name}: {key} must be >= 1, got {value}"
            for key, value in (("channels", self.channels), ("embedding", self.embedding))
            if value < 1
        ]
        if self.input_shape[0] != 1:
            faults.append(f"{self.name}: frames are grey, (1, height, width), got {self.input_shape}")
        if faults:
            raise RecipeError(faults)
        check_sizes(self.name, self.input_shape, self.num_classes, num_halvings=1)

    @property
    def operations(self) -> Mapping[str, Operation]:
        """See :class:`Space`."""
        return OPERATIONS

    @cached_property
    def decisions(self) -> Mapping[str, tuple[str, ...]]:
        """See :class:`Space`."""
        return frozen({decision_of(_KIND, edge): tuple(OPERATIONS) for edge in _WIRING.edges})

    def _place(self, edge: Edge) -> Place:
        path, hw = f"{_PATH}.{edge_key(edge)}", (self.input_shape[1] // 2, self.input_shape[2] // 2)
        return Place(decision_of(_KIND, edge), path, self.channels, self.channels, 1, hw)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """See :class:`Space`."""
        return tuple(self._place(edge) for edge in _WIRING.edges)

    @property
    def edges_into_nodes(self) -> tuple[tuple[str, ...], ...]:
        """The decisions of the edges into each node."""
        return tuple(
            tuple(decision_of(_KIND, (source, target)) for source in range(target))
            for target in _WIRING.nodes
        )

    def assemble(self, make: Make) -> nn.Module:
        """See :class:`Space`."""
        made = {edge: make(self._place(edge)) for edge in _WIRING.edges}
        plan = CellPlan(_WIRING, _WIRING.live([edge for edge, module in made.items() if module is not None]))
        operations = {edge: module for edge in plan.live if (module := made[edge]) is not None}
        adapters = Adapters(self.backbone.widths, self.channels, plan.inputs)
        neck = CellNeck(adapters, Edges(plan, operations, Zeros()))
        width = self.channels * max(1, len(plan.outputs))
        return FrameNetwork(self.backbone.copy(coarse=1 in plan.inputs), neck, width, self.embedding)

    def graph(self, arch: Arch) -> LayerGraph:
        """See :class:`Space`."""
        self.check(arch)
        present = [edge for edge in _WIRING.edges if arch[decision_of(_KIND, edge)] != "none"]
        plan, sketch = CellPlan(_WIRING, _WIRING.live(present)), Sketch(self.input_shape)
        features = self.backbone.sketch(sketch, "backbone", coarse=1 in plan.inputs)
        states = dict[int, Signal]()
        for number, (name, size) in enumerate((("fine", 3), ("coarse", 1))):
            if number in plan.inputs:
                states[number] = sketch.conv(
                    f"neck.adapters.{name}",
                    features[number],
                    self.channels,
                    kernel=size,
                    stride=2 if name == "fine" else 1,
                    bias=True,
                )

        def apply(edge: Edge, x: Signal) -> Signal:
            place = self._place(edge)
            return OPERATIONS[arch[place.decision]].sketch(sketch, place, x)

        nodes = plan.run(dict(states), apply, sketch.add) or [states[max(states)]]
        sketch.conv("embed", nodes[0] if len(nodes) == 1 else sketch.concat(nodes), self.embedding)
        return sketch.graph()

    def random(self, generator: np.random.Generator) -> dict[str, str]:
        """A member with two edges per node and an operation other than ``none`` on each, drawn uniformly."""
        return random_edges(self.edges_into_nodes, tuple(OPERATIONS), generator)

    def derive(self, probabilities: Mapping[str, NDArray[np.float64]]) -> dict[str, str]:
        """Per node the two edges with the likeliest operations, and these operations.

        Args:
            probabilities: decision -> shape (operations,).
        """
        return strongest_edges(
            self.edges_into_nodes, tuple(OPERATIONS), probabilities, none_counts=self.derives_none
        )

    def hand_made(self, depth: int, *, seed: int, at_least: int = 0) -> FrameNetwork:
        """A network with a neck of 3x3 convolutions, the narrowest with so many trained parameters.

        Args:
            depth: convolutions on each of the two features, >= 1.
            seed: of the weights.
            at_least: trained parameters.

        Raises:
            RecipeError: a depth below 1.
        """
        if depth < 1:
            raise RecipeError(f"depth must be >= 1, got {depth}")

        def build(width: int) -> FrameNetwork:
            adapters = Adapters(self.backbone.widths, self.channels, (0, 1))
            neck = ConvNeck(adapters, self.channels, width, depth)
            return FrameNetwork(self.backbone.copy(), neck, 2 * width, self.embedding)

        networks = (seeded(partial(build, width), seed) for width in count(1))
        return next(n for n in networks if isinstance(n, FrameNetwork) and n.num_trained >= at_least)
