"""The cost model that needs no machine: multiply-accumulates, parameters, bit operations, weight bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Cost, Metric
from autocompress.core.graph import LayerGraph, LayerSpec


class MacsModel:
    """Counts ``macs``, ``params``, ``bitops`` and ``weight_bytes`` of one sample.

    ``macs`` counts convolution and linear layers (1 MAC = 2 FLOPs). ``params`` counts every parameter of
    the network, also those of normalisation layers. ``weight_bytes`` is what the weights take when packed
    at their bit-width, with every other parameter at 32 bits.
    """

    name = "macs"
    metrics: tuple[Metric, ...] = ("macs", "params", "bitops", "weight_bytes")

    def __call__(self, graph: LayerGraph) -> Cost:
        """The cost of one sample; every metric is additive but for parameters outside the layers."""
        layers = {layer.name: _layer_cost(layer) for layer in graph.layers}
        totals = {metric: float(sum(cost[metric] for cost in layers.values())) for metric in self.metrics}
        other = graph.other_params.at(graph.sizes)
        totals["params"] += other
        totals["weight_bytes"] += 4.0 * other
        return Cost(totals, layers)

    def price_many(self, graphs: Sequence[LayerGraph]) -> dict[Metric, NDArray[np.float64]]:
        """Totals of many graphs: metric -> array of shape (len(graphs),)."""
        costs = [self(graph) for graph in graphs]
        return {metric: np.array([cost[metric] for cost in costs]) for metric in self.metrics}


def _layer_cost(layer: LayerSpec) -> dict[Metric, float]:
    biases = layer.num_params - layer.num_weights
    return {
        "macs": float(layer.macs),
        "params": float(layer.num_params),
        "bitops": float(layer.bitops),
        "weight_bytes": layer.num_weights * layer.bits.weight / 8 + 4.0 * biases,
    }
