"""Every search on HAQ's released latency table, where the best plan can be computed.

The problem is HAQ's: weight and activation bits from 2 to 8 of MobileNetV2's 53 layers, the first and the
last at 8 bits, at most 0.6 of the latency at 8 bits on the table released with the paper
(tests/golden/haq_cloud.csv). The accuracy is made up: 72 % times exp(-S), S the sum of ``c / 4**bits`` over
all weights and activations, c log-normal and known to no search but ``milp-told``. The score a search sees
also has 0.3 points of noise, the same for equal plans; the table gives the true accuracy, in percent, of the
plan that each search returns. ``ddpg-plain`` does not start from planned bits; ``ddpg-haq`` has HAQ's
settings as well.

Prints one table, and writes its rows into results/search-bits-<machine>-torch<version>.csv.
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
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from measured_devices import rows_of

from autocompress.agents import HAQ_SETTINGS, SEARCHES, make_search
from autocompress.agents.additive import Allocator
from autocompress.core import Bits, Budget, Cost, Knob, Plan, Problem

BITS = (2, 3, 4, 5, 6, 7, 8)
COLUMNS = (
    *("search", "plans", "instances", "mean", "lowest", "highest", "policy", "best_uniform", "optimum"),
    "cpu_seconds",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SEARCHES} | {
    "milp-told": ("milp", {}),
    "ddpg-plain": ("ddpg", {"warm_start": False}),
    "ddpg-haq": ("ddpg", HAQ_SETTINGS),
}
SPREAD = 1.2
NOISE = 0.003
TARGET = 0.6


def haq_problem(instance: int, *, noise: float = NOISE) -> tuple[Problem, Callable[[Plan], float]]:
    """One instance, and the true accuracy of a plan as a share; ``problem.sensitivities`` are true."""
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


def measure(label: str, num_plans: int, num_instances: int) -> dict[str, float | str]:
    name, settings = VARIANTS[label]
    rows = []
    for instance in range(num_instances):
        problem, accuracy = haq_problem(instance)
        seen = problem if label == "milp-told" else replace(problem, sensitivities=None)
        start = time.process_time()
        result = make_search(name, settings)(seen, num_plans=num_plans, seed=instance)
        seconds = time.process_time() - start
        policy = 100 * accuracy(result.policy) if result.policy else math.nan
        uniform = make_search("uniform", {})(problem, num_plans=20, seed=0).best.plan
        rows.append((100 * accuracy(result.best.plan), policy, 100 * accuracy(uniform), seconds))
    found, policies, uniform_found, taken = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "search": label,
        "plans": num_plans,
        "instances": num_instances,
        "mean": float(found.mean()),
        "lowest": float(found.min()),
        "highest": float(found.max()),
        "policy": float(policies.mean()),
        "best_uniform": float(uniform_found.mean()),
        "optimum": float(np.mean([optimum(i) for i in range(num_instances)])),
        "cpu_seconds": float(taken.mean()),
    }


@lru_cache
def optimum(instance: int) -> float:
    """True accuracy, in percent, of the best plan of all: losses and costs add up, so by integer program."""
    problem, accuracy = haq_problem(instance)
    assert problem.sensitivities is not None
    best = Allocator(problem)([np.asarray(loss) for loss in problem.sensitivities()], gap=1e-6)
    return 100 * accuracy(problem.plan(best))


def write(rows: list[dict[str, float | str]]) -> None:
    """Put rows into the file of this machine, in place of older ones of the same search and plans."""
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"search-bits-{platform.machine()}-torch{version}.csv"
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {(row["search"], row["plans"]): row for row in csv.DictReader(file)}
    for row in rows:
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        kept[(str(row["search"]), str(row["plans"]))] = rounded
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "searches", nargs="*", metavar="search", help=f"of {', '.join(VARIANTS)}; all by default"
    )
    parser.add_argument("--plans", type=int, nargs="+", default=[300, 600])
    parser.add_argument("--instances", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.searches) - set(VARIANTS):
        parser.error(f"no search {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    print("".join(f"{column:>13}" for column in COLUMNS))
    for num_plans in options.plans:
        for label in options.searches or VARIANTS:
            row = measure(label, num_plans, options.instances)
            print(
                "".join(f"{v:>13.2f}" if isinstance(v, float) else f"{v:>13}" for v in row.values()),
                flush=True,
            )
            write([row])


if __name__ == "__main__":
    main()
