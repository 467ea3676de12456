"""Every search on HAQ's released latency table, whose best plan is known.

The problem is HAQ's: weight and activation bits from 2 to 8 of MobileNetV2's 53 layers, the first and the last
at 8 bits, at most 0.6 of the latency at 8 bits on the table released with the paper
(tests/golden/haq_cloud.csv). Accuracy is made up, so that the optimum can be computed: 72 % times exp(-S), S the
sum of ``c / 4**bits`` over all weights and activations, c log-normal. The score a search sees also has 0.3 points
of noise, the same for equal plans; the table shows the true accuracy, in percent, of the plan each search
returns. No search is told c, except ``milp-told``.

Prints one table, and saves it as results/search-bits-<machine>-torch<version>.csv.
Run: python benchmarks/search_bits.py [--plans 300 600] [--instances 5] [search ...]
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from measured_devices import rows_of

from autocompress.agents import SEARCHES, make_search
from autocompress.core import Bits, Budget, Cost, Knob, Plan, Problem

BITS = (2, 3, 4, 5, 6, 7, 8)
COLUMNS = ("search", "plans", "mean", "lowest", "highest", "optimum", "seconds")
SPREAD = 1.2
NOISE = 0.003
TARGET = 0.6


def haq_problem(instance: int, *, noise: float = NOISE) -> tuple[Problem, Callable[[Plan], float]]:
    """One instance, and the true accuracy of a plan as a share; ``problem.sensitivities`` are the true ones."""
    rows = rows_of("haq_cloud.csv")
    names = [row["layer"] for row in rows]
    table = np.array([[[int(row[f"w{w}a{a}"]) for a in range(1, 9)] for w in range(1, 9)] for row in rows])
    loss = np.random.default_rng(instance).lognormal(0.0, SPREAD, (len(rows), 2))
    layers = np.arange(len(rows))

    def bits_of(plan: Plan) -> NDArray[np.int64]:
        return np.array([(b.weight, b.act) for b in map(plan.bits.__getitem__, names)])

    def price(plan: Plan) -> Cost:
        bits = bits_of(plan)
        return Cost({"latency_ms": float(table[layers, bits[:, 0] - 1, bits[:, 1] - 1].sum())})

    def accuracy(plan: Plan) -> float:
        return 0.72 * math.exp(-float((loss * 4.0 ** -bits_of(plan)).sum()))

    def evaluate(plan: Plan) -> float:
        noisy = np.random.default_rng([instance, int(plan.digest, 16)]).normal(0.0, noise)
        return accuracy(plan) + float(noisy)

    features = _features(rows)
    kinds: tuple[Any, Any] = ("weight_bits", "act_bits")
    knobs = [
        Knob(kinds[side], names[i], BITS, (*features[i], 1.0 - side)) for i in layers[1:-1] for side in (0, 1)
    ]
    told = [
        loss[i, side] * (4.0 ** -np.array(BITS) - 4.0 ** -BITS[-1]) for i in layers[1:-1] for side in (0, 1)
    ]
    budget = Budget("latency_ms", TARGET * float(table[:, -1, -1].sum()), relative=False)
    base = Plan(bits={name: Bits(8, 8) for name in names})
    identity = f"HAQ table {instance} {noise}"
    return Problem(tuple(knobs), (budget,), price, evaluate, identity, base, lambda: told), accuracy


def _features(rows: list[dict[str, str]]) -> list[list[float]]:
    """The eight facts of every layer that HAQ's agent sees, scaled from least to most."""
    facts = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "layer"}
    linear = facts["in_hw"] == 1
    columns = [
        (facts["groups"] > 1).astype(float),
        facts["inputs"],
        facts["outputs"],
        np.where(linear, 0.0, facts["stride"]),
        facts["kernel"],
        facts["inputs"] / facts["groups"] * facts["outputs"] * facts["kernel"] ** 2,
        facts["in_hw"] ** 2,
        np.arange(len(rows), dtype=np.float64),
    ]
    scaled = [(c - c.min()) / max(float(np.ptp(c)), 1e-9) for c in columns]
    rows_of_features: list[list[float]] = np.stack(scaled, axis=1).tolist()
    return rows_of_features
