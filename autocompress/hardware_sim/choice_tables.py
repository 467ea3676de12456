"""Costs of every layer at every choice plans have for it, so that a plan is a sum of entries.

A layer's cost depends on its input width, its output width and its bits, and each width on a few channel
groups. So a layer has few different costs however many plans there are; layers of equal facts share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from autocompress.core.cost import Metric
from autocompress.core.graph import Bits, LayerGraph, LayerSpec, Width
from autocompress.core.plan import Plan
from autocompress.hardware_sim.table import Floats, Ints, LayerTable

Parts = Callable[[LayerTable], dict[Metric, Floats]]
"""Costs of each layer of a table by metric, NaN where the layer cannot be priced."""

_ROWS_AT_ONCE = 100_000
_WIDEST = 1 << 22  # widths are looked up in an array as long as the widest


class TooManyEntriesError(Exception):
    """The tables would be larger than asked for."""


@dataclass(frozen=True)
class Choices:
    """What plans may choose; groups and layers that are not named stay as they are.

    Args:
        sizes: channel group -> sizes, ascending.
        weight_bits, act_bits: layer -> bit-widths, ascending; of a reused layer, its first call.
    """

    sizes: Mapping[str, Ints]
    weight_bits: Mapping[str, Ints]
    act_bits: Mapping[str, Ints]


@dataclass(frozen=True, eq=False)
class _Ranks:
    """The values that one width has in plans, ascending, and which of them it has in a given plan."""

    width: Width
    values: Ints

    @cached_property
    def by_value(self) -> Ints:
        ranks = np.full(int(self.values[-1]) + 1, -1, dtype=np.int64)
        ranks[self.values] = np.arange(len(self.values))
        return ranks

    @cached_property
    def of_value(self) -> dict[int, int]:
        return {value: rank for rank, value in enumerate(self.values.tolist())}

    def in_plans(self, sizes: Mapping[str, Ints]) -> Ints:
        """Shape (P,), or (1,) where no plan changes the width."""
        value = np.full(1, self.width.fixed, dtype=np.int64)
        for group, times in self.width.terms:
            value = value + times * sizes[group]
        return self.by_value.take(value)

    def in_plan(self, sizes: Mapping[str, int]) -> int:
        """Raises KeyError where the plan leaves the choices."""
        value = self.width.fixed
        for group, times in self.width.terms:
            value += times * sizes[group]
        return self.of_value[value]


@dataclass(frozen=True, eq=False)
class _Layer:
    """Where one layer's entries are: at ``place of its pair of widths + weight step + activation step``.

    Args:
        name: whose bits it takes.
        bits: what it has where a plan does not say.
        inputs, outputs: its widths, by number.
        num_outputs: how many values the output width has.
        places: by input rank times ``num_outputs`` plus output rank; -1 for pairs that no plan has.
        weight_steps, act_steps: by bit-width; -1 for bits that no plan has.
    """

    name: str
    bits: Bits
    inputs: int
    outputs: int
    num_outputs: int
    places: Ints
    weight_steps: Ints
    act_steps: Ints

    @cached_property
    def quick(self) -> tuple[str, Bits, int, int, int, list[int], dict[int, int], dict[int, int]]:
        """The same for one plan at a time: lists and dictionaries are faster than arrays there."""
        weight, act = (
            {bits: step for bits, step in enumerate(steps.tolist()) if step >= 0}
            for steps in (self.weight_steps, self.act_steps)
        )
        sizes = (self.inputs, self.outputs, self.num_outputs, self.places.tolist())
        return (self.name, self.bits, *sizes, weight, act)


class ChoiceTables:
    """Entries for every choice of every layer of one network.

    Args:
        graph: the network.
        choices: what plans may choose.
        max_entries: of all layers together.

    Raises:
        TooManyEntriesError: there are more, or widths too large to look up.
    """

    def __init__(self, graph: LayerGraph, choices: Choices, *, max_entries: int) -> None:
        self._graph, self._choices, self._max_entries = graph, choices, max_entries
        self._sizes = {g.name: np.array([g.size]) for g in graph.groups} | dict(choices.sizes)
        self._numbers: dict[Width, int] = {}
        self._widths: list[_Ranks] = []
        self._layers: list[_Layer] = []
        self._distinct: list[tuple[LayerSpec, Ints, Ints, Ints]] = []
        self._first: dict[tuple[object, ...], int] = {}
        self._entries: dict[Metric, Floats] = {}
        self.num_entries = 0
        for layer in graph.layers:
            self._add(layer)

    def fill(self, parts: Parts) -> None:
        """Price every entry."""
        found = [parts(rows) for rows in self._row_blocks()]
        self._entries = {metric: np.concatenate([part[metric] for part in found]) for metric in found[0]}

    def _row_blocks(self) -> Iterator[LayerTable]:
        """The layers that entries are costs of, in order, some at a time."""
        block: list[LayerTable] = []
        for layer, pairs, weight, act in self._distinct:
            at_once = max(1, _ROWS_AT_ONCE // (len(weight) * len(act)))
            for start in range(0, len(pairs), at_once):
                block.append(_rows(layer, pairs[start : start + at_once], weight, act))
                if sum(map(len, block)) >= _ROWS_AT_ONCE:
                    yield LayerTable.joined(block)
                    block = []
        if block:
            yield LayerTable.joined(block)

    def of_plans(
        self,
        *,
        sizes: Mapping[str, Ints] | None = None,
        weight_bits: Mapping[str, Ints] | None = None,
        act_bits: Mapping[str, Ints] | None = None,
    ) -> dict[Metric, Floats]:
        """Costs of every layer in P plans, shape (P, layers), or (1, layers) where nothing is named.

        Args:
            sizes, weight_bits, act_bits: each of shape (P,), all among the choices.
        """
        all_sizes, weight, act = self._sizes | dict(sizes or {}), weight_bits or {}, act_bits or {}
        ranks = [width.in_plans(all_sizes) for width in self._widths]
        rows = [
            layer.places.take(ranks[layer.inputs] * layer.num_outputs + ranks[layer.outputs])
            + layer.weight_steps.take(weight.get(layer.name, layer.bits.weight))
            + layer.act_steps.take(act.get(layer.name, layer.bits.act))
            for layer in self._layers
        ]
        numbers = np.stack(np.broadcast_arrays(*rows))
        return {metric: entries.take(numbers).T for metric, entries in self._entries.items()}

    def of_plan(self, plan: Plan) -> tuple[dict[Metric, Floats], Floats]:
        """Costs of every layer in one plan, shape (1, layers), and its other parameters, shape (1,).

        Raises:
            KeyError: the plan leaves the choices.
        """
        if not plan.bits.keys() <= self._named or any(
            size not in self._allowed[group] for group, size in plan.channels.items()
        ):
            raise KeyError("a layer or size that is no choice")
        sizes = {**self._graph.sizes, **plan.channels}
        ranks = [width.in_plan(sizes) for width in self._widths]
        chosen, rows = plan.bits, []
        for layer in self._layers:
            name, bits, i, o, num_outputs, places, weight, act = layer.quick
            bits = chosen.get(name, bits)
            rows.append(places[ranks[i] * num_outputs + ranks[o]] + weight[bits.weight] + act[bits.act])
        numbers = np.array(rows)
        parts = {metric: entries.take(numbers)[None] for metric, entries in self._entries.items()}
        return parts, np.array([self._graph.other_params.at(sizes)], dtype=np.float64)

    @cached_property
    def _allowed(self) -> dict[str, frozenset[int]]:
        return {group: frozenset(sizes.tolist()) for group, sizes in self._choices.sizes.items()}

    @cached_property
    def _named(self) -> frozenset[str]:
        return frozenset({*self._choices.weight_bits, *self._choices.act_bits})

    def _add(self, layer: LayerSpec) -> None:
        """Find a layer's choices, and give it entries unless an equal layer has them."""
        name, bits = layer.reuses or layer.name, layer.bits
        sides = ((layer.in_width, layer.in_channels), (layer.out_width, layer.out_channels))
        widths = [width if width.terms else Width(channels) for width, channels in sides]
        inputs, outputs = (self._number(width) for width in widths)
        weight = self._choices.weight_bits.get(name, np.array([bits.weight]))
        act = self._choices.act_bits.get(name, np.array([bits.act]))
        pairs = self._pairs(*widths)
        facts = replace(layer, name="", in_width=Width(), out_width=Width(), bits=Bits())
        key = (facts, *((values.tobytes(), values.shape) for values in (pairs, weight, act)))
        if key not in self._first:
            self._first[key] = self.num_entries
            self.num_entries += len(pairs) * len(weight) * len(act)
            self._limit(self.num_entries)
            self._distinct.append((layer, pairs, weight, act))
        num_outputs = len(self._widths[outputs].values)
        ranks = [self._widths[n].by_value.take(pairs[:, k]) for k, n in enumerate((inputs, outputs))]
        places = np.full(len(self._widths[inputs].values) * num_outputs, -1, dtype=np.int64)
        per_pair = len(weight) * len(act)
        places[ranks[0] * num_outputs + ranks[1]] = self._first[key] + per_pair * np.arange(len(pairs))
        steps = (_steps(weight, len(act)), _steps(act, 1))
        self._layers.append(_Layer(name, bits, inputs, outputs, num_outputs, places, *steps))

    def _number(self, width: Width) -> int:
        if width not in self._numbers:
            self._numbers[width] = len(self._widths)
            values = self._pairs(width, Width())[:, 0]
            if values[-1] >= _WIDEST:
                raise TooManyEntriesError
            self._widths.append(_Ranks(width, values))
        return self._numbers[width]

    def _pairs(self, inputs: Width, outputs: Width) -> Ints:
        """The different (input, output) widths that plans can have, shape (pairs, 2), ascending."""
        pairs = np.array([[inputs.fixed, outputs.fixed]], dtype=np.int64)
        times_in, times_out = dict(inputs.terms), dict(outputs.terms)
        for group in times_in | times_out:
            times = np.array([times_in.get(group, 0), times_out.get(group, 0)])
            pairs = (pairs[:, None] + self._sizes[group][None, :, None] * times).reshape(-1, 2)
            pairs = _distinct(pairs)
            self._limit(len(pairs))
        return pairs

    def _limit(self, num_entries: int) -> None:
        if num_entries > self._max_entries:
            raise TooManyEntriesError


def _distinct(pairs: Ints) -> Ints:
    """The different rows, ascending; by one whole number per row, which sorts faster."""
    span = int(pairs[:, 1].max()) + 1
    keys = np.unique(pairs[:, 0] * span + pairs[:, 1])
    return np.stack([keys // span, keys % span], axis=1)


def _steps(bits: Ints, entries: int) -> Ints:
    """By bit-width up to 32: entries before those of the bit-width, -1 where no plan has it."""
    steps = np.full(33, -1, dtype=np.int64)
    steps[bits] = entries * np.arange(len(bits))
    return steps


def _rows(layer: LayerSpec, pairs: Ints, weight_bits: Ints, act_bits: Ints) -> LayerTable:
    """A layer at every pair of widths, then weight bits, then activation bits."""
    base = LayerTable.of([layer])
    pair, weight, act = (
        grid.ravel() for grid in np.meshgrid(np.arange(len(pairs)), weight_bits, act_bits, indexing="ij")
    )
    inputs = pairs[pair, 0]
    groups = layer.groups * inputs // layer.in_channels if layer.groups > 1 else np.ones_like(inputs)
    changed = {
        "in_channels": inputs,
        "out_channels": pairs[pair, 1],
        "groups": groups,
        "weight_bits": weight,
        "act_bits": act,
    }
    same = {f.name: np.full(len(pair), getattr(base, f.name)[0]) for f in fields(LayerTable)}
    return LayerTable(**(same | changed))
