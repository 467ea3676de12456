"""HAWQ-V3's ResNet-18: losses, costs and ties of 19 layers at 4 and 8 bits, and its known optima."""

from __future__ import annotations

import numpy as np
from measured_devices import rows_of
from numpy.typing import NDArray

from autocompress.core import Bits, Budget, Cost, Knob, Metric, Plan, Problem

Floats = NDArray[np.float64]

OPTIMA: tuple[tuple[Metric, float, float, float, int], ...] = (
    ("weight_bytes", 0.25, 6.65039, 0.118300, 14),
    ("weight_bytes", 0.5, 7.98047, 0.074506, 16),
    ("weight_bytes", 0.75, 9.31055, 0.033441, 17),
    ("bitops", 0.25, 46.36262, 0.460424, 5),
    ("bitops", 0.5, 66.23232, 0.215689, 10),
    ("bitops", 0.75, 86.10202, 0.079965, 15),
    ("latency_ms", 0.25, 3.69743, 0.460424, 5),
    ("latency_ms", 0.5, 4.24618, 0.202674, 12),
    ("latency_ms", 0.75, 4.79493, 0.079965, 15),
)
"""Metric, fraction between all layers at 4 bits and all at 8, limit, least loss, number of layers at 8 bits;
the last three from trying all 2**16."""


def hawq_tables() -> tuple[Floats, dict[Metric, Floats], list[tuple[str]]]:
    """Loss and costs at 4 and 8 bits, shape (19, 2), and the name of every layer's decision.

    Bytes are in units of 1024**2, bit operations in the notebook's unit of 1024 times a million.
    """
    rows = rows_of("hawq_resnet18.csv")
    column = {key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key != "tie"}
    loss = column["trace"][:, None] * np.stack([column["error4"], column["error8"]], axis=1)
    size, macs = column["params"] / 1024**2, column["macs"] / 1e6
    cost: dict[Metric, Floats] = {
        "weight_bytes": np.stack([size / 2, size], axis=1),
        "bitops": np.stack([macs / 64, macs / 16], axis=1),
        "latency_ms": np.stack([column["latency4"], column["latency8"]], axis=1),
    }
    return loss, cost, [(row["tie"],) for row in rows]


def limit_at(table: Floats, fraction: float) -> float:
    """The limit at a fraction of the way from all layers at 4 bits to all at 8."""
    four, eight = table.sum(axis=0)
    return float(four + fraction * (eight - four))


def hawq_problem(metric: Metric, fraction: float) -> Problem:
    """One budget; the score is minus the loss. One knob per decision, tied layers share theirs."""
    loss, cost, ties = hawq_tables()
    names = [f"layer{i}" for i in range(len(loss))]
    rows = rows_of("hawq_resnet18.csv")
    facts = np.log([[float(row["params"]), float(row["macs"])] for row in rows])
    facts = (facts - facts.min(axis=0)) / np.ptp(facts, axis=0)
    knobs = []
    for first, (tie,) in enumerate(ties):
        members = tuple(n for n, other in zip(names, ties, strict=True) if other == (tie,))
        if members[0] == names[first]:
            params, macs = facts[first].tolist()
            features = (0.0, 0.0, 0.0, 0.0, 0.0, params, macs, first / (len(loss) - 1), 1.0)
            knobs.append(Knob("weight_bits", names[first], (4, 8), features, members))

    def at(plan: Plan, table: Floats) -> float:
        chosen = [int(plan.bits[n].weight == 8) for n in names]
        return float(table[np.arange(len(names)), chosen].sum())

    return Problem(
        tuple(knobs),
        (Budget(metric, limit_at(cost[metric], fraction), relative=False),),
        lambda plan: Cost({metric: at(plan, cost[metric])}),
        lambda plan: -at(plan, loss),
        "HAWQ-V3 ResNet-18",
        Plan(bits={n: Bits(8, 8) for n in names}),
    )
