"""What every hardware model shares: arrays of layers in, arrays of costs out, totals by one rule.

A model gives one method, :meth:`HardwareModel.layer_costs`, on a :class:`LayerTable`; single networks,
batches of graphs and whole populations of plans are priced by it. A model whose layers do not stand alone
(shared resources, blocks measured as one) also overrides :meth:`HardwareModel.network_costs`, one whose
total is not the sum over layers (a pipeline) :meth:`HardwareModel.totals`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Cost, Metric
from autocompress.core.errors import AutocompressError
from autocompress.core.graph import LayerGraph, LayerSpec
from autocompress.hardware_sim.table import Floats, LayerTable

LISTED = 20


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


@dataclass(frozen=True)
class LayerCosts:
    """Costs of N layers, one sample each unless said otherwise; every array has shape (N,).

    Args:
        latency_ms: time of the layer on its own.
        energy_pj: component (e.g. ``mac``, ``sram``, ``dram``) -> picojoules; empty when the model has none.
        utilisation: share of the peak multiply rate that is reached, in [0, 1].
        memory_bound: whether memory, not arithmetic, decides the latency.
        extra: other figures by name, e.g. ``compute_cycles``, ``dram_bits``, ``luts``.
    """

    latency_ms: Floats
    energy_pj: Mapping[str, Floats] = field(default_factory=dict)
    utilisation: Floats = field(default_factory=lambda: np.zeros(0))
    memory_bound: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    extra: Mapping[str, Floats] = field(default_factory=dict)


class HardwareModel(ABC):
    """A cost model of one machine; deterministic, and never cheaper for a larger network.

    Subclasses are frozen dataclasses whose fields are the machine's constants, with the unit in the name
    (``clock_mhz``, ``dram_gb_per_s``, ``sram_kib``, ``pj_per_bit``), so that a target file can give them.

    Attributes:
        kind: name of the model in target files.
        metrics: what it prices.
        mapping: how layers are laid onto the machine, in words.
        energy_table: which constants the energy comes from, in words; energies of different tables must not
            be compared.
        additive: whether a layer costs the same in every network, and a network the sum of its layers.
        plans_at_once: plans priced together, so that arrays stay in the processor's cache.
        name: of the target.
        batch: samples priced together; figures are per sample.
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    mapping: ClassVar[str]
    energy_table: ClassVar[str] = "none"
    additive: ClassVar[bool] = True
    plans_at_once: ClassVar[int] = 2000
    name: str
    batch: int

    @abstractmethod
    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer of a table.

        Raises:
            UnsupportedLayerError: a layer the machine cannot run.
        """

    def network_costs(self, table: LayerTable, num_layers: int) -> LayerCosts:
        """Costs of every layer of networks of ``num_layers`` layers each, one network after the other.

        Raises:
            UnsupportedLayerError: a layer the machine cannot run.
        """
        if num_layers != len(table) and not self.additive:
            raise NotImplementedError(f"{type(self).__name__} must say what several networks cost")
        return self.layer_costs(table)

    def graph_costs(self, graph: LayerGraph) -> LayerCosts:
        """Costs of every layer of one network.

        Raises:
            UnsupportedLayerError: layers the machine cannot run, by name.
        """
        return self._named_costs(LayerTable.of(graph.layers), graph)

    def _named_costs(self, table: LayerTable, graph: LayerGraph) -> LayerCosts:
        try:
            return self.network_costs(table, len(graph.layers))
        except UnsupportedLayerError as fault:
            raise fault.named(graph.layers) from None

    def totals(self, costs: LayerCosts, num_layers: int) -> dict[Metric, Floats]:
        """Costs of whole networks: metric -> array of shape (N / num_layers,).

        Args:
            costs: of P networks of ``num_layers`` layers each, one after the other.
            num_layers: layers per network.
        """
        shape = (-1, num_layers)
        totals: dict[Metric, Floats] = {"latency_ms": costs.latency_ms.reshape(shape).sum(axis=1)}
        if costs.energy_pj:
            picojoules = sum(part.reshape(shape).sum(axis=1) for part in costs.energy_pj.values())
            totals["energy_mj"] = np.asarray(picojoules) * 1e-9
        return totals

    def __call__(self, graph: LayerGraph) -> Cost:
        """The cost of one network, with the share of every layer."""
        costs = self.graph_costs(graph)
        totals = {metric: float(v[0]) for metric, v in self.totals(costs, len(graph.layers)).items()}
        picojoules = sum(costs.energy_pj.values()) if costs.energy_pj else None
        layers: dict[str, dict[Metric, float]] = {}
        for i, layer in enumerate(graph.layers):
            layers[layer.name] = {"latency_ms": float(costs.latency_ms[i])}
            if picojoules is not None:
                layers[layer.name]["energy_mj"] = float(np.asarray(picojoules)[i]) * 1e-9
        return Cost(totals, layers)

    def price_many(self, graphs: Sequence[LayerGraph]) -> dict[Metric, Floats]:
        """Totals of many graphs: metric -> array of shape (len(graphs),)."""
        lengths = {len(graph.layers) for graph in graphs}
        if self.additive and len(lengths) == 1:
            table = LayerTable.of([layer for graph in graphs for layer in graph.layers])
            return self.totals(self.layer_costs(table), lengths.pop())
        priced = [self(graph) for graph in graphs]
        return {m: np.array([cost[m] for cost in priced]) for m in (priced[0].totals if priced else ())}

    def price_plans(
        self, graph: LayerGraph, **choices: Mapping[str, NDArray[np.int64]]
    ) -> dict[Metric, Floats]:
        """Totals of P variants of one graph; arguments as for :meth:`LayerTable.of_plans`."""
        num_plans = next((len(v) for group in choices.values() for v in group.values()), 1)
        parts = []
        for start in range(0, num_plans, self.plans_at_once):
            part = {
                kind: {name: values[start : start + self.plans_at_once] for name, values in group.items()}
                for kind, group in choices.items()
            }
            table = LayerTable.of_plans(graph, **part)
            parts.append(self.totals(self._named_costs(table, graph), len(graph.layers)))
        return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}
