"""What every hardware model shares: arrays of layers in, arrays of costs out, totals by one rule.

A model gives one method, :meth:`HardwareModel.layer_costs`, on a :class:`LayerTable`; single networks,
batches of graphs and whole populations of plans are priced by it. A model whose layers do not stand alone
(shared resources, blocks measured as one) also overrides :meth:`HardwareModel.network_costs`, one whose
total is not the sum over layers (a pipeline) :meth:`HardwareModel.totals`. Both say so: ``additive = False``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Cost, Metric
from autocompress.core.graph import LayerGraph
from autocompress.hardware_sim.layerwise import LayerwiseModel, UnsupportedLayerError, refuse
from autocompress.hardware_sim.table import Floats, LayerTable

__all__ = ["HardwareModel", "LayerCosts", "UnsupportedLayerError", "refuse"]


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


class HardwareModel(LayerwiseModel):
    """A cost model of one machine; deterministic, and never cheaper for a larger network.

    Subclasses are frozen dataclasses whose fields are the machine's constants, with the unit in the name
    (``clock_mhz``, ``dram_gb_per_s``, ``sram_kib``, ``pj_per_bit``), so that a target file can give them.

    Attributes:
        kind: name of the model in target files.
        metrics: what it prices.
        mapping: how layers are laid onto the machine, in words.
        energy_table: which constants the energy comes from, in words; energies of different tables must not
            be compared.
        channel_step: channels that it works on at once, so that fewer than a multiple of them save nothing.
        name: of the target.
        batch: samples priced together; figures are per sample.
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    mapping: ClassVar[str]
    energy_table: ClassVar[str] = "none"
    channel_step: ClassVar[int] = 8
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

    @property
    def resources(self) -> dict[Metric, float]:
        """What the machine itself takes, the same for every network."""
        return {}

    def layer_parts(self, table: LayerTable) -> dict[Metric, Floats]:
        """Latency and, where the model has it, energy of every layer, shape (N,)."""
        return _parts(self.layer_costs(table))

    def combined(self, parts: Mapping[Metric, Floats], other_params: Floats) -> dict[Metric, Floats]:
        """Sums over the layers, and the machine's resources."""
        totals = {metric: part.sum(axis=1) for metric, part in parts.items()}
        num_networks = len(totals["latency_ms"])
        return totals | {metric: np.full(num_networks, value) for metric, value in self.resources.items()}

    def totals(self, costs: LayerCosts, num_layers: int) -> dict[Metric, Floats]:
        """Costs of whole networks: metric -> array of shape (N / num_layers,).

        Args:
            costs: of P networks of ``num_layers`` layers each, one after the other.
            num_layers: layers per network.
        """
        parts = {metric: part.reshape(-1, num_layers) for metric, part in _parts(costs).items()}
        return self.combined(parts, np.zeros(1))

    def _priced(self, graph: LayerGraph, table: LayerTable, other_params: Floats) -> dict[Metric, Floats]:
        if not self.additive:
            return self.totals(self._named_costs(table, graph), len(graph.layers))
        try:
            parts = self.layer_parts(table)
        except UnsupportedLayerError as fault:
            raise fault.named(graph.layers) from None
        shape = (-1, len(graph.layers))
        return self.combined({metric: part.reshape(shape) for metric, part in parts.items()}, other_params)

    def __call__(self, graph: LayerGraph) -> Cost:
        """The cost of one network, with the share of every layer."""
        costs = self.graph_costs(graph)
        totals = {metric: float(v[0]) for metric, v in self.totals(costs, len(graph.layers)).items()}
        parts = _parts(costs)
        layers: dict[str, dict[Metric, float]] = {
            layer.name: {metric: float(part[i]) for metric, part in parts.items()}
            for i, layer in enumerate(graph.layers)
        }
        return Cost(totals, layers)

    def price_many(self, graphs: Sequence[LayerGraph]) -> dict[Metric, Floats]:
        """Totals of many graphs: metric -> array of shape (len(graphs),)."""
        lengths = {len(graph.layers) for graph in graphs}
        if self.additive and len(lengths) == 1:
            table = LayerTable.of([layer for graph in graphs for layer in graph.layers])
            parts, shape = self.layer_parts(table), (-1, lengths.pop())
            return self.combined({metric: part.reshape(shape) for metric, part in parts.items()}, np.zeros(1))
        priced = [self(graph) for graph in graphs]
        return {m: np.array([cost[m] for cost in priced]) for m in (priced[0].totals if priced else ())}


def _parts(costs: LayerCosts) -> dict[Metric, Floats]:
    parts: dict[Metric, Floats] = {"latency_ms": costs.latency_ms}
    if costs.energy_pj:
        parts["energy_mj"] = np.asarray(sum(costs.energy_pj.values())) * 1e-9
    return parts
