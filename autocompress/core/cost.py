"""What a network then needs from a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from autocompress.core.graph import LayerGraph

Metric = Literal[
    "macs",
    "params",
    "bitops",
    "weight_bytes",
    "latency_ms",
    "energy_mj",
    "peak_memory_bytes",
    "luts",
    "brams",
    "dsps",
]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Cost:
    """Totals per metric and, where the model can say, the share of each layer.

    Args:
        totals: metric -> value for one sample, in the unit of the metric's name.
        layers: layer name -> metric -> value. Sums to the total only for metrics that add up.
    """

    totals: Mapping[Metric, float]
    layers: Mapping[str, Mapping[Metric, float]] = field(default_factory=dict)

    def __getitem__(self, metric: Metric) -> float:
        try:
            return self.totals[metric]
        except KeyError:
            known = ", ".join(self.totals)
            raise ValueError(f"this cost model does not give {metric!r}; it gives {known}") from None


@runtime_checkable
class CostModel(Protocol):
    """Maps a graph to a cost; deterministic, and never cheaper for a larger network."""

    name: str

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What it prices."""
        ...

    def __call__(self, graph: LayerGraph) -> Cost:
        """The cost of one sample."""
        ...

    def price_many(self, graphs: Sequence[LayerGraph]) -> dict[Metric, NDArray[np.float64]]:
        """Totals of many graphs: metric -> array of shape (len(graphs),)."""
        ...
