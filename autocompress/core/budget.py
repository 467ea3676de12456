"""Limits on costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autocompress.core.cost import METRICS, Cost, Metric


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on one metric.

    Args:
        metric: what is limited.
        limit: a share of the reference network's cost in (0, 1] when ``relative``, else a value in the
            metric's unit.
        relative: whether ``limit`` is a share.

    Raises:
        ValueError: unknown metric, or a limit that is not positive and finite, or a share above 1.

    Example:
        >>> Budget("macs", 0.5).resolve(Cost({"macs": 200.0})).limit
        100.0
    """

    metric: Metric
    limit: float
    relative: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"budget metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"budget on {self.metric} must be > 0, got {self.limit}")
        if self.relative and self.limit > 1:
            raise ValueError(
                f"a relative budget on {self.metric} is a share in (0, 1], got {self.limit}; "
                "set relative: false for an absolute limit"
            )

    def resolve(self, reference: Cost) -> Budget:
        """The absolute budget for a network that costs ``reference`` uncompressed."""
        if not self.relative:
            return self
        return Budget(self.metric, self.limit * reference[self.metric], relative=False)

    def met_by(self, cost: Cost) -> bool:
        """Whether a cost is within this absolute budget.

        Raises:
            ValueError: the budget is relative; resolve it first.
        """
        if self.relative:
            raise ValueError("a relative budget must be resolved against a reference cost first")
        return cost[self.metric] <= self.limit * (1 + 1e-12)

    def __str__(self) -> str:
        return f"{self.metric} <= {self.limit:.4g}" + (" of the original" if self.relative else "")
