"""What joint plans cost: layers priced once per variant where a machine adds up, whole networks elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from autocompress.core import Bits, Cost, CostModel, LayerGraph, LayerSpec, Metric, Plan
from autocompress.hardware_sim import LayerTable, UnsupportedLayerError
from autocompress.hardware_sim.layerwise import LayerwiseModel
from autocompress.nas.joint import Block, JointSpace
from autocompress.nas.spaces.mbconv import SKIP

_MOST_GRAPHS = 1024  # architectures whose graphs are kept


class Variant(NamedTuple):
    """What decides the cost of a layer.

    Args:
        layer: its name.
        op, width: of its block: operation and hidden channels; ``""`` and 0 outside of blocks.
        weight, act: its bits.
    """

    layer: str
    op: str
    width: int
    weight: int
    act: int


class JointPricer:
    """What plans of a joint space cost: a ``Problem.price`` for searches.

    Where a model adds up over layers, each :class:`Variant` of a layer is priced once, when a plan first has
    it, and plans combine them. Other models (pipelines, tables of measured blocks) are asked for whole
    networks. Totals equal what the models say of the plan's graph. Layers that a plan gives no bits have
    those of the space's reference, as machines without floating point need.

    Args:
        joint: the space.
        models: cost models; where two give one metric, the later one counts.

    Attributes:
        num_priced: variants in the tables of models that add up.

    Example:
        >>> from autocompress.hardware_sim import MacsModel
        >>> from autocompress.nas import joint_chain
        >>> joint = joint_chain((1, 8, 8), 10)
        >>> price = JointPricer(joint, [MacsModel()])
        >>> price(joint.smallest)["weight_bytes"] < price(joint.largest)["weight_bytes"] / 3
        True
    """

    def __init__(self, joint: JointSpace, models: Sequence[CostModel]) -> None:
        self._joint, self._models = joint, tuple(models)
        self._variants = _Variants(joint)
        self._tables = [
            _Table(m, self._variants) if isinstance(m, LayerwiseModel) and m.additive else None
            for m in models
        ]
        self._graphs: OrderedDict[tuple[tuple[str, str], ...], LayerGraph] = OrderedDict()

    @property
    def num_priced(self) -> int:
        """See the class."""
        return sum(len(table.parts) for table in self._tables if table is not None)

    def __call__(self, plan: Plan) -> Cost:
        """The totals of one plan, with the share of every layer.

        Raises:
            RecipeError: the plan's architecture is not a member.
            ValueError: the plan names a group or layer its member lacks, or a size out of range.
            UnsupportedLayerError: layers that a model refuses, by name.
        """
        variants = self._variants.of(plan)
        if variants is None or None in self._tables:
            graph = self._graph_of(plan)
        totals: dict[Metric, float] = {}
        layers: list[Mapping[str, Mapping[Metric, float]]] = []
        for model, table in zip(self._models, self._tables, strict=True):
            if variants is None or table is None:
                cost = model(graph)
            else:
                cost = table.cost(variants, self._variants.other_params(plan))
            totals |= cost.totals
            layers.append(cost.layers)
        return Cost(totals, _Joined(layers))

    def _graph_of(self, plan: Plan) -> LayerGraph:
        plan = self._joint.effective(plan)
        key = tuple(sorted(plan.arch.items()))
        if key not in self._graphs:
            self._graphs[key] = self._joint.space.graph(plan.arch)
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        graph = self._graphs[key]
        present = {layer.name for layer in graph.layers}
        reference = {n: bits for n, bits in self._joint.reference.bits.items() if n in present}
        return replace(plan, bits={**reference, **plan.bits}).apply(graph)


class _Joined(Mapping[str, Mapping[Metric, float]]):
    """Shares of layers according to several models, put together when they are asked for."""

    def __init__(self, parts: Sequence[Mapping[str, Mapping[Metric, float]]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Mapping[Metric, float]:
        found: dict[Metric, float] = {}
        for part in self._parts:
            found.update(part.get(name, {}))
        if not found:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self._parts for name in part))

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Variants:
    """The variants of layers that plans of a space have."""

    def __init__(self, joint: JointSpace) -> None:
        self._joint, self._specs = joint, _specs(joint)
        full = joint.graph(joint.largest)
        self._sizes, self._blocks = full.sizes, {block.group: block for block in joint.blocks}
        owner = {name: block for block in joint.blocks for name in block.layers}
        self._layers = [(layer.name, owner.get(layer.name)) for layer in full.layers]
        self._owner = owner
        self._bits = {name: (bits.weight, bits.act) for name, bits in joint.reference.bits.items()}
        self._outside, self._inside = _other_params(joint)

    def of(self, plan: Plan) -> list[Variant] | None:
        """Those of a plan; None when it changes channels outside the blocks."""
        self._joint.space.check(plan.arch)
        if not self._blocks.keys() >= plan.channels.keys():
            return None
        if unknown := plan.bits.keys() - self._bits.keys():
            raise ValueError(f"no layer named {sorted(unknown)} in any member of {self._joint.space.name}")
        found = []
        for name, block in self._layers:
            op, width = ("", 0) if block is None else (plan.arch[block.name], self._width(plan, block))
            if op != SKIP:
                bits = plan.bits.get(name)
                found.append(
                    Variant(name, op, width, *((bits.weight, bits.act) if bits else self._bits[name]))
                )
        return found

    @staticmethod
    def _width(plan: Plan, block: Block) -> int:
        width = plan.channels.get(block.group, block.widths[-1])
        if not 1 <= width <= block.widths[-1]:
            raise ValueError(
                f"group {block.group!r} keeps from 1 to {block.widths[-1]} channels, got {width}"
            )
        return width

    def spec(self, variant: Variant) -> LayerSpec:
        """The layer as facts."""
        spec = self._specs[variant.layer, variant.op]
        if variant.op:
            spec = spec.resized({**self._sizes, self._owner[variant.layer].group: variant.width})
        return replace(spec, bits=Bits(variant.weight, variant.act))

    def other_params(self, plan: Plan) -> int:
        """Parameters outside the layers (normalisation)."""
        total = self._outside
        for group, (fixed, each) in self._inside.items():
            block = self._blocks[group]
            if plan.arch[block.name] != SKIP:
                total += fixed + each * plan.channels.get(group, block.widths[-1])
        return total


class _Table:
    """What a model that adds up over layers says of variants."""

    def __init__(self, model: LayerwiseModel, variants: _Variants) -> None:
        self._model, self._variants = model, variants
        self.parts: dict[Variant, dict[Metric, float]] = {}
        self._rows: dict[Variant, tuple[float, ...]] = {}

    def cost(self, variants: Sequence[Variant], other_params: int) -> Cost:
        """Of the network that has these variants."""
        self._price([variant for variant in variants if variant not in self._rows])
        table = np.array([self._rows[variant] for variant in variants]).T
        metrics = self.parts[variants[0]]
        columns = {metric: table[i : i + 1] for i, metric in enumerate(metrics)}
        totals = self._model.combined(columns, np.array([float(other_params)]))
        layers = {variant.layer: self.parts[variant] for variant in variants}
        return Cost({metric: float(values[0]) for metric, values in totals.items()}, layers)

    def _price(self, variants: Sequence[Variant]) -> None:
        if not variants:
            return
        layers = [self._variants.spec(variant) for variant in variants]
        try:
            parts = self._model.layer_parts(LayerTable.of(layers))
        except UnsupportedLayerError as fault:
            raise fault.named(layers) from None
        for index, variant in enumerate(variants):
            self.parts[variant] = {metric: float(part[index]) for metric, part in parts.items()}
            self._rows[variant] = tuple(self.parts[variant].values())


def _other_params(joint: JointSpace) -> tuple[int, dict[str, tuple[int, int]]]:
    """Parameters outside the layers: of the skeleton, and of each block that is there.

    Returns:
        Those of the skeleton; group of a block -> those that go with the block, and those per hidden channel.
    """
    full = joint.space.graph(joint.largest.arch)
    total, times = full.other_params.at(full.sizes), dict(full.other_params.terms)
    blocks, inside = {}, 0
    for block in joint.blocks:
        hidden, fixed = times[block.group] * block.widths[-1], 0
        if SKIP in block.operations:
            without = joint.space.graph({**joint.largest.arch, block.name: SKIP})
            fixed = total - without.other_params.at(without.sizes) - hidden
        blocks[block.group] = fixed, times[block.group]
        inside += fixed + hidden
    return total - inside, blocks


def _specs(joint: JointSpace) -> dict[tuple[str, str], LayerSpec]:
    """Every layer at full width under every operation of its block; outside of blocks under ``""``."""
    found: dict[tuple[str, str], LayerSpec] = {}
    inside = {name for block in joint.blocks for name in block.layers}
    for op in joint.space.operations:
        if op != SKIP:
            for layer in joint.space.graph(dict.fromkeys(joint.space.decisions, op)).layers:
                found[layer.name, op if layer.name in inside else ""] = layer
    return found
