"""Architecture, channels and bits of a chain of blocks as the knobs of one problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from autocompress.core import Knob, LayerGraph, LayerSpec, Plan
from autocompress.core.errors import RecipeError
from autocompress.nas.spaces import MBConvChain, Place, mbconv_chain
from autocompress.nas.spaces.mbconv import SKIP
from autocompress.nas.spaces.operations import inverted_residual
from autocompress.nas.spaces.space import seeded
from autocompress.quant.knobs import FirstLast, bit_knobs, reference_bits

Part = Literal["arch", "channels", "bits"]
PARTS: tuple[Part, ...] = get_args(Part)
FEATURES = ("index", "c_in", "c_out", "height", "stride", "kernel", "depthwise", "weights", "macs")
"""What the features of a joint knob are, in order; each scaled to [0, 1] over the knobs."""


@dataclass(frozen=True)
class Block:
    """One searched block.

    Args:
        place: where it is; its decision's name is the block's.
        group: the channel group inside it.
        layers: names of its convolutions: expansion, depthwise, projection.
        operations: the choices of its architecture, the cheapest first.
        widths: the sizes its group can have, ascending.
    """

    place: Place
    group: str
    layers: tuple[str, ...]
    operations: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the decision."""
        return self.place.decision


@dataclass(frozen=True)
class JointSpace:
    """What can be decided about a chain of inverted residuals: kernels, depth, widths and bits.

    Per block: its operation (a kernel, or skip where the shape allows), the channels between its expansion
    and its projection, and the bits of its pointwise and of its depthwise layers, weights and activations
    each. In this space the expansion *is* the channel pruning. The layers outside the blocks keep their width
    and have bits of their own, but for what ``first_last`` pins. Plans are ordinary ones, since a layer has
    one name in every member; :meth:`effective` drops from a plan what its own architecture leaves out.

    Wang et al., "APQ: Joint Search for Network Architecture, Pruning and Quantization Policy", CVPR 2020,
    section 3.1. Differs from the paper in the blocks that can be skipped (any whose shape does not change,
    not the last ones of a stage) and in the layers outside the blocks, which have bits of their own.

    Args:
        space: the chain; its one expansion is the widest a block can be.
        round_to: hidden widths are multiples of it, and the widest.
        min_expand: the narrowest hidden width, relative to the block's input.
        weight_bits, act_bits, first_last: see :func:`~autocompress.quant.bit_knobs`.

    Raises:
        RecipeError: several expansions or one below 2, or settings out of range; all faults at once.

    Example:
        >>> joint = joint_chain((1, 8, 8), 10)
        >>> [(knob.kind, knob.name) for knob in joint.knobs()[4:8]]  # doctest: +NORMALIZE_WHITESPACE
        [('arch', 'block01'), ('channels', 'features.block01.conv.0'), ('weight_bits', 'block01.pointwise'),
        ('act_bits', 'block01.pointwise')]
    """

    space: MBConvChain
    round_to: int = 8
    min_expand: float = 2.0
    weight_bits: tuple[int, ...] = (4, 6, 8)
    act_bits: tuple[int, ...] = (4, 6, 8)
    first_last: FirstLast = "pin"

    def __post_init__(self) -> None:
        faults = []
        expansions = self.space.expansions
        if len(expansions) != 1 or expansions[0] < 2:
            faults.append(
                f"the chain needs one expansion >= 2, the widest, got {expansions}; hidden widths below it "
                "are choices of the channels"
            )
        if self.round_to < 1:
            faults.append(f"round_to must be >= 1, got {self.round_to}")
        if not 0 < self.min_expand <= max(expansions):
            faults.append(f"min_expand must be in (0, {max(expansions)}], got {self.min_expand}")
        if not faults:
            try:
                reference_bits(self.graph(self.largest), **self._bit_choices)
            except ValueError as fault:
                faults.append(str(fault))
        if faults:
            raise RecipeError([f"joint space: {fault}" for fault in faults])

    @property
    def _bit_choices(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "first_last": self.first_last}

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The searched blocks, in the order of execution."""
        found = []
        for place in self.space.places:
            expand, depthwise, project = (f"{place.path}.{index}" for index in (0, 3, 6))
            widest = place.in_channels * self.space.expansions[0]
            least = max(1, -(-round(self.min_expand * place.in_channels) // self.round_to)) * self.round_to
            widths = (*range(least, widest, self.round_to), widest)
            layers, operations = (expand, depthwise, project), self.space.decisions[place.decision]
            found.append(Block(place, expand, layers, operations, widths))
        return tuple(found)

    @property
    def largest(self) -> Plan:
        """Every block at its largest kernel and width; no bits."""
        return self._at(-1)

    @property
    def smallest(self) -> Plan:
        """Every block skipped, or at its smallest kernel and width; no bits."""
        return self.effective(self._at(0))

    def _at(self, index: int) -> Plan:
        return Plan(
            arch={block.name: block.operations[index] for block in self.blocks},
            channels={block.group: block.widths[index] for block in self.blocks},
        )

    def random(self, generator: np.random.Generator) -> Plan:
        """Architecture and channels drawn uniformly; no bits."""
        arch = {b.name: b.operations[int(generator.integers(len(b.operations)))] for b in self.blocks}
        channels = {b.group: b.widths[int(generator.integers(len(b.widths)))] for b in self.blocks}
        return self.effective(Plan(arch, channels))

    @cached_property
    def reference(self) -> Plan:
        """The largest member at its most bits: 8 where they are pinned, else the last choices."""
        bits = reference_bits(self.graph(self.largest), **self._bit_choices)
        return replace(self.largest, bits=bits)

    def effective(self, plan: Plan) -> Plan:
        """The plan without channels and bits of blocks that its architecture skips.

        The result names only what its member has, so that ``plan.apply(space.graph(plan.arch))`` and every
        other reader of plans takes it, and plans that make equal networks are equal. Names that no member has
        stay, for the reader to refuse.
        """
        skipped = [block for block in self.blocks if plan.arch.get(block.name) == SKIP]
        if not skipped:
            return plan
        gone = set(chain.from_iterable((block.group, *block.layers) for block in skipped))
        return Plan(
            plan.arch,
            {name: size for name, size in plan.channels.items() if name not in gone},
            {name: bits for name, bits in plan.bits.items() if name not in gone},
        )

    def graph(self, plan: Plan) -> LayerGraph:
        """The graph of the network that a plan makes.

        Raises:
            RecipeError: the plan's architecture is not a member.
            ValueError: the plan names a group or layer that no member has, or a size out of range.
        """
        return self.effective(plan).apply(self.space.graph(plan.arch))

    def build(self, plan: Plan, *, seed: int) -> nn.Module:
        """The float network of a plan's architecture and channels with fresh weights.

        Layers have the names of ``space.build(plan.arch)``; blocks have the plan's hidden widths.

        Raises:
            RecipeError: the plan's architecture is not a member.
            ValueError: the plan names channels that are not inside a block of its member, or out of range.
        """
        plan = self.effective(plan)
        self.graph(Plan(plan.arch, plan.channels))  # checks names and ranges
        if outside := sorted(set(plan.channels) - {block.group for block in self.blocks}):
            raise ValueError(
                f"channels of {outside} are not inside a block; shrink the built network instead"
            )
        kernels = {name: op.kernel for name, op in self.space.operations.items() if name != SKIP}  # type: ignore[attr-defined]
        blocks = {block.name: block for block in self.blocks}

        def make(place: Place) -> nn.Module | None:
            block, choice = blocks[place.decision], plan.arch[place.decision]
            if choice == SKIP:
                return None
            return inverted_residual(place, kernels[choice], plan.channels.get(block.group, block.widths[-1]))

        return seeded(lambda: self.space.assemble(make), seed)

    def knobs(self, decide: Sequence[Part] = PARTS) -> tuple[Knob, ...]:
        """The decisions in the order of execution; of a block first its operation, then channels, then bits.

        Whatever has a single choice is no decision. The order of choices is that of every cost: a member with
        a smaller kernel, fewer channels or fewer bits is part of the larger one.

        Args:
            decide: which kinds of decisions there are.

        Raises:
            RecipeError: nothing to decide, or an unknown kind.
        """
        if unknown := [part for part in decide if part not in PARTS]:
            raise RecipeError(f"knobs are of {', '.join(PARTS)}, got {', '.join(map(str, unknown))}")
        layers = {layer.name: layer for layer in self.graph(self.largest).layers}
        bits = self._bit_knobs() if "bits" in decide else []
        knobs: list[Knob] = []
        for block in self.blocks:
            if "arch" in decide:
                knobs.append(Knob("arch", block.name, block.operations, layers=block.layers))
            if "channels" in decide:
                knobs.append(Knob("channels", block.group, block.widths, layers=block.layers))
        order = {name: index for index, name in enumerate(layers)}
        knobs = sorted([*knobs, *bits], key=lambda knob: self._position(knob, order))
        knobs = [knob for knob in knobs if len(knob.choices) > 1]
        if not knobs:
            raise RecipeError(
                f"nothing to decide: no choice of {', '.join(decide)} is left open in this space"
            )
        rows = [_facts([layers[name] for name in knob.layers], order[knob.layers[0]]) for knob in knobs]
        return tuple(
            replace(knob, features=features, layers=knob.layers if knob.is_bits else ())
            for knob, features in zip(knobs, _scaled(rows), strict=True)
        )

    def _position(self, knob: Knob, order: Mapping[str, int]) -> tuple[int, int, int, int]:
        """Blocks in order; in a block: operation, channels, then layers in order, weights first."""
        first = min(order[name] for name in knob.layers)
        inside = [block for block in self.blocks if knob.layers[0] in block.layers]
        start = order[inside[0].layers[0]] if inside else first
        kind = ("arch", "channels", "weight_bits", "act_bits").index(knob.kind)
        return start, min(kind, 2), first, kind

    def _bit_knobs(self) -> list[Knob]:
        """One knob for the pointwise and one for the depthwise layers of a block; others have their own."""
        singles = bit_knobs(self.graph(self.largest), **self._bit_choices)
        kinds = {
            layer: f"{block.name}.{'depthwise' if layer == block.layers[1] else 'pointwise'}"
            for block in self.blocks
            for layer in block.layers
        }
        merged: dict[tuple[str, str], Knob] = {}
        for knob in singles:
            key = (knob.kind, kinds.get(knob.name, knob.name))
            before = merged[key].layers if key in merged else ()
            merged[key] = replace(knob, name=key[1], layers=(*before, knob.name))
        return list(merged.values())


def joint_chain(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    kernels: tuple[int, ...] = (3, 5, 7),
    expansion: int = 6,
    width: float = 1.0,
    round_to: int = 8,
    min_expand: float = 2.0,
    bits: tuple[int, ...] = (4, 6, 8),
) -> JointSpace:
    """The joint space over :func:`~autocompress.nas.spaces.mbconv_chain`.

    Args:
        input_shape: of one image, (channels, height, width).
        num_classes: number of outputs.
        kernels: odd, ascending.
        expansion: the widest.
        width: multiplies the channels of the skeleton.
        round_to, min_expand: see :class:`JointSpace`.
        bits: choices of weights and of activations.

    Raises:
        RecipeError: images smaller than every layout, or settings out of range.
    """
    fixed = mbconv_chain(input_shape, num_classes, width=width)
    space = replace(fixed, kernels=kernels, expansions=(expansion,))
    return JointSpace(space, round_to, min_expand, bits, bits)


def _facts(layers: Sequence[LayerSpec], index: int) -> tuple[float, ...]:
    """One row of :data:`FEATURES`."""
    return (
        index,
        layers[0].in_channels,
        layers[-1].out_channels,
        layers[0].in_hw[0],
        max(layer.stride[0] for layer in layers),
        max(layer.kernel[0] for layer in layers),
        sum(layer.is_depthwise for layer in layers) / len(layers),
        sum(layer.num_weights for layer in layers),
        sum(layer.macs for layer in layers),
    )


def _scaled(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Every column from 0 to 1; a column of one value becomes 0."""
    table = np.array(rows, dtype=np.float64)
    low, span = table.min(axis=0), np.ptp(table, axis=0)
    scaled = np.where(span > 0, (table - low) / np.where(span > 0, span, 1), 0.0)
    return [tuple(row) for row in scaled.tolist()]
