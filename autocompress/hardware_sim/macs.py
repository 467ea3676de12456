"""The cost model that needs no machine: multiply-accumulates, parameters, bit operations and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Cost, Metric
from autocompress.core.graph import LayerGraph, LayerSpec
from autocompress.hardware_sim.layerwise import LayerwiseModel
from autocompress.hardware_sim.table import Floats, LayerTable


class MacsModel(LayerwiseModel):
    """Counts ``macs``, ``params``, ``bitops``, ``weight_bytes`` and ``peak_memory_bytes`` of one sample.

    ``macs`` counts convolution and linear layers (1 MAC = 2 FLOPs). ``params`` counts every parameter of
    the network, also those of normalisation layers. ``weight_bytes`` is what the weights take when packed
    at their bit-width, with every other parameter at 32 bits. ``peak_memory_bytes`` is the most that the
    input and the output of one layer take together, both at the layer's activation bits: the activation
    memory of a chain run layer by layer. A graph does not say which other tensors are alive at that
    moment, so a residual branch that waits for its addition is not counted.
    """

    name = kind = "macs"
    mapping = "none: counts"
    energy_table = "none"
    batch = 1
    metrics: tuple[Metric, ...] = ("macs", "params", "bitops", "weight_bytes", "peak_memory_bytes")

    def __call__(self, graph: LayerGraph) -> Cost:
        """The cost of one sample; the peak is a maximum over layers, every other metric a sum."""
        layers = {layer.name: _layer_cost(layer) for layer in graph.layers}
        totals = {metric: float(sum(cost[metric] for cost in layers.values())) for metric in self.metrics}
        totals["peak_memory_bytes"] = max(
            (cost["peak_memory_bytes"] for cost in layers.values()), default=0.0
        )
        other = graph.other_params.at(graph.sizes)
        totals["params"] += other
        totals["weight_bytes"] += 4.0 * other
        return Cost(totals, layers)

    def price_many(self, graphs: Sequence[LayerGraph]) -> dict[Metric, NDArray[np.float64]]:
        """Totals of many graphs: metric -> array of shape (len(graphs),)."""
        costs = [self(graph) for graph in graphs]
        return {metric: np.array([cost[metric] for cost in costs]) for metric in self.metrics}

    def layer_parts(self, table: LayerTable) -> dict[Metric, Floats]:
        """Counts of every layer, shape (N,)."""
        weights = table.kernel_weights * table.owns_weights
        biases = table.bias * table.out_channels * table.owns_weights
        values = table.in_channels * table.in_h * table.in_w + table.out_channels * table.out_h * table.out_w
        parts: dict[Metric, NDArray[np.int64] | Floats] = {
            "macs": table.macs,
            "params": weights + biases,
            "bitops": table.macs * table.weight_bits * table.act_bits,
            "weight_bytes": weights * table.weight_bits / 8 + 4.0 * biases,
            "peak_memory_bytes": values * table.act_bits / 8,
        }
        return {metric: part.astype(np.float64) for metric, part in parts.items()}

    def combined(self, parts: Mapping[Metric, Floats], other_params: Floats) -> dict[Metric, Floats]:
        """Sums over the layers, of the peak the maximum; other parameters have 4 bytes each."""
        totals = {metric: part.sum(axis=1) for metric, part in parts.items()}
        totals["params"] = totals["params"] + other_params
        totals["weight_bytes"] = totals["weight_bytes"] + 4.0 * other_params
        return totals | {"peak_memory_bytes": parts["peak_memory_bytes"].max(axis=1)}

    def beyond_layers(self, graph: LayerGraph) -> dict[Metric, float]:
        """Parameters outside the layers, such as those of normalisation."""
        other = float(graph.other_params.at(graph.sizes))
        return {"macs": 0.0, "params": other, "bitops": 0.0, "weight_bytes": 4.0 * other}

    def _priced(self, graph: LayerGraph, table: LayerTable, other_params: Floats) -> dict[Metric, Floats]:
        parts = self.layer_parts(table)
        return self.combined({m: p.reshape(-1, len(graph.layers)) for m, p in parts.items()}, other_params)


def _layer_cost(layer: LayerSpec) -> dict[Metric, float]:
    biases = layer.num_params - layer.num_weights
    inputs = layer.in_channels * layer.in_hw[0] * layer.in_hw[1]
    outputs = layer.out_channels * layer.out_hw[0] * layer.out_hw[1]
    return {
        "macs": float(layer.macs),
        "params": float(layer.num_params),
        "bitops": float(layer.bitops),
        "weight_bytes": layer.num_weights * layer.bits.weight / 8 + 4.0 * biases,
        "peak_memory_bytes": (inputs + outputs) * layer.bits.act / 8,
    }
