"""Models that price arrays of layers: populations of plans by formula, or by look-up where layers add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Metric
from autocompress.core.errors import AutocompressError
from autocompress.core.graph import Bits, LayerGraph, LayerSpec
from autocompress.hardware_sim.choice_tables import Choices, ChoiceTables, TooManyEntriesError
from autocompress.hardware_sim.table import Floats, Ints, LayerTable

LISTED = 20
_LOOKED_UP_AT_ONCE = 20_000  # plans; bounds the memory of large populations


class UnsupportedLayerError(AutocompressError):
    """A target cannot run some layers: their kind, bits or size; every fault is listed.

    Args:
        faults: pairs of the layers' indices and the rule they break, or a text about the whole network.
        names: what the layers are called; their indices when absent.
    """

    def __init__(self, faults: Sequence[tuple[Sequence[int], str]] | str, names: Sequence[str] = ()) -> None:
        self.faults = () if isinstance(faults, str) else tuple(faults)
        lines = [faults] if isinstance(faults, str) else []
        for indices, rule in self.faults:
            shown = [names[i] if names else str(i) for i in indices[:LISTED]]
            more = f", ... ({len(indices)} in all)" if len(indices) > LISTED else ""
            lines.append(f"layers {', '.join(shown)}{more}: {rule}")
        super().__init__("\n".join(lines))

    def named(self, layers: Sequence[LayerSpec]) -> UnsupportedLayerError:
        """The same faults with layers called by name; indices count over networks of these layers."""
        if not self.faults:
            return self
        names = [layer.name for layer in layers]
        faults = [(sorted({i % len(names) for i in indices}), rule) for indices, rule in self.faults]
        return UnsupportedLayerError(faults, names)


def refuse(*rules: tuple[NDArray[np.bool_], str]) -> None:
    """Check layers against rules.

    Args:
        rules: pairs of a bool array of shape (N,), true where the rule is broken, and the rule in words.

    Raises:
        UnsupportedLayerError: some layer breaks a rule; lists every fault.
    """
    faults = [(np.flatnonzero(broken).tolist(), rule) for broken, rule in rules if broken.any()]
    if faults:
        raise UnsupportedLayerError(faults)


class LayerwiseModel(ABC):
    """A model that prices arrays of layers, so that plans need no graph each.

    Attributes:
        name: of the model or target.
        additive: whether a layer costs the same in every network, so that plans combine tabulated layers.
        plans_at_once: plans priced together by formula, so that arrays stay in the processor's cache.
    """

    name: str
    additive: ClassVar[bool] = True
    plans_at_once: ClassVar[int] = 2000

    @abstractmethod
    def layer_parts(self, table: LayerTable) -> dict[Metric, Floats]:
        """What every layer of a table contributes to each metric, shape (N,).

        Raises:
            UnsupportedLayerError: a layer that cannot be priced.
        """

    @abstractmethod
    def combined(self, parts: Mapping[Metric, Floats], other_params: Floats) -> dict[Metric, Floats]:
        """Totals of P networks, shape (P,), from their layers.

        Args:
            parts: contributions of layers, each of shape (P, layers).
            other_params: parameters outside the layers, shape (P,) or (1,).
        """

    @abstractmethod
    def _priced(self, graph: LayerGraph, table: LayerTable, other_params: Floats) -> dict[Metric, Floats]:
        """Totals of variants of a graph by formula, from all their layers and their other parameters."""

    def price_plans(self, graph: LayerGraph, **choices: Mapping[str, Ints]) -> dict[Metric, Floats]:
        """Totals of P variants of one graph; arguments as for :meth:`.LayerTable.of_plans`.

        Where the layers add up and have fewer different costs than the plans have layers, each is priced
        once and looked up.

        Raises:
            UnsupportedLayerError: layers that cannot be priced, by name.
        """
        num_plans = _num_plans(choices)
        tables = self.tables(graph, _choices_of(choices), max_entries=num_plans * len(graph.layers) // 2)
        if tables is not None:
            totals = self.looked_up(graph, tables, choices)
            if not any(np.isnan(values).any() for values in totals.values()):
                return totals
        priced = [
            self._priced(graph, LayerTable.of_plans(graph, **part), _other_params(graph, part))
            for part in _blocks(choices, self.plans_at_once)
        ]
        return {metric: np.concatenate([part[metric] for part in priced]) for metric in priced[0]}

    def tables(self, graph: LayerGraph, choices: Choices, *, max_entries: int) -> ChoiceTables | None:
        """Costs of every layer at all its choices; None when they do not add up or are too many."""
        if not self.additive or not graph.layers:
            return None
        try:
            tables = ChoiceTables(graph, choices, max_entries=max_entries)
        except TooManyEntriesError:
            return None
        tables.fill(self._parts_or_nan)
        return tables

    def looked_up(
        self, graph: LayerGraph, tables: ChoiceTables, choices: Mapping[str, Mapping[str, Ints]]
    ) -> dict[Metric, Floats]:
        """Totals of P plans from tables, NaN for plans with a layer that cannot be priced.

        Args:
            graph, tables: the network and its tables.
            choices: arguments of :meth:`price_plans`, all values among those of the tables.
        """
        found = [
            self.combined(tables.of_plans(**part), _other_params(graph, part))
            for part in _blocks(choices, _LOOKED_UP_AT_ONCE)
        ]
        return {metric: np.concatenate([part[metric] for part in found]) for metric in found[0]}

    def layer_table(
        self, graph: LayerGraph, weight_choices: Sequence[int], act_choices: Sequence[int]
    ) -> dict[Metric, Floats]:
        """Cost of every layer at every pair of bit-widths, shape (layers, weight bits, activation bits).

        Has the metrics of which a network's total is the sum of its layers' entries and
        :meth:`beyond_layers`. Later calls of a reused layer have entries of their own.

        Args:
            graph: the network; the bits it has do not matter.
            weight_choices, act_choices: bit-widths.

        Raises:
            ValueError: the model is not additive.
            UnsupportedLayerError: bits that layers cannot have, by name.
        """
        if not self.additive:
            raise ValueError(
                f"{self.name} has no table of layers: what one costs there depends on the others; "
                "price whole plans instead"
            )
        pairs = [Bits(int(w), int(a)) for w in weight_choices for a in act_choices]
        table = LayerTable.of([replace(layer, bits=bits) for layer in graph.layers for bits in pairs])
        try:
            parts = self.layer_parts(table)
        except UnsupportedLayerError as fault:
            raise fault.named([layer for layer in graph.layers for _ in pairs]) from None
        shape = (len(graph.layers), len(weight_choices), len(act_choices))
        summed = self.beyond_layers(graph).keys() & parts.keys()
        return {metric: part.reshape(shape) for metric, part in parts.items() if metric in summed}

    def beyond_layers(self, graph: LayerGraph) -> dict[Metric, float]:
        """What a network costs beyond its layers, for every metric that is a sum over layers."""
        return {"latency_ms": 0.0, "energy_mj": 0.0}

    def _parts_or_nan(self, table: LayerTable) -> dict[Metric, Floats]:
        """Parts of every layer; NaN where a layer cannot be priced."""
        left = np.arange(len(table))
        while len(left):
            try:
                parts = self.layer_parts(table if len(left) == len(table) else table.take(left))
            except UnsupportedLayerError as fault:
                if not fault.faults:
                    raise
                refused = np.unique(np.concatenate([indices for indices, _ in fault.faults]))
                left = np.delete(left, refused)
                continue
            spread = {metric: np.full(len(table), np.nan) for metric in parts}
            for metric, part in parts.items():
                spread[metric][left] = part
            return spread
        return {"latency_ms": np.full(len(table), np.nan)}


def _num_plans(choices: Mapping[str, Mapping[str, Ints]]) -> int:
    return next((len(values) for group in choices.values() for values in group.values()), 1)


def _blocks(
    choices: Mapping[str, Mapping[str, Ints]], size: int
) -> Iterator[dict[str, dict[str, NDArray[np.int64]]]]:
    """The choices of ``size`` plans at a time."""
    for start in range(0, _num_plans(choices), size):
        yield {
            kind: {name: values[start : start + size] for name, values in group.items()}
            for kind, group in choices.items()
        }


def _choices_of(choices: Mapping[str, Mapping[str, Ints]]) -> Choices:
    """The different values that plans have; counting small numbers is faster than sorting them."""
    found = {
        kind: {name: np.flatnonzero(np.bincount(values)) for name, values in choices.get(kind, {}).items()}
        for kind in ("sizes", "weight_bits", "act_bits")
    }
    return Choices(**found)


def _other_params(graph: LayerGraph, choices: Mapping[str, Mapping[str, Ints]]) -> Floats:
    """Parameters outside the layers, shape (P,) or (1,)."""
    sizes = {name: np.array([size]) for name, size in graph.sizes.items()} | dict(choices.get("sizes", {}))
    total = np.array([graph.other_params.fixed])
    for group, times in graph.other_params.terms:
        total = total + times * sizes[group]
    return total.astype(np.float64)
