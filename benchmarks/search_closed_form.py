"""Every search on the water-filling problem, whose best score is known.

Prints one table, and saves it as results/search-closed-form-<machine>-torch<version>.csv: mean over
instances of the best score, the score of the actor's own episode, the mean score of all trials and the
seconds per search. ``ddpg-plain`` does not imitate its best episodes; ``ddpg-wide`` has AMC's noise and
layer sizes as well. The settings of DDPG were chosen on instances 0 to 3, so the table is made on others.
Run: python benchmarks/search_closed_form.py [num_plans [search ...]]
"""

from __future__ import annotations

import csv
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from autocompress.agents import SEARCHES, make_search
from autocompress.testing import waterfilling_problem

INSTANCES = range(100, 104)
COLUMNS = ("search", "plans", "best", "lowest_best", "policy", "mean", "optimum", "seconds")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SEARCHES} | {
    "ddpg-plain": ("ddpg", {"imitation_steps": 0}),
    "ddpg-wide": ("ddpg", {"imitation_steps": 0, "sigma": 0.5, "hidden": (300, 300)}),
}


def measure(label: str, num_plans: int) -> dict[str, float | str]:
    name, settings = VARIANTS[label]
    rows = []
    for seed in INSTANCES:
        problem, optimum, _ = waterfilling_problem(seed)
        start = time.perf_counter()
        result = make_search(name, settings)(problem, num_plans=num_plans, seed=seed)
        seconds = time.perf_counter() - start
        scores = [trial.score for trial in result.trials]
        policy = scores[-1] if result.policy else float("nan")
        rows.append((max(scores), policy, sum(scores) / len(scores), optimum, seconds))
    best, policy, mean, optimum, seconds = (
        sum(column) / len(INSTANCES) for column in zip(*rows, strict=True)
    )
    return {
        "search": label,
        "plans": num_plans,
        "best": best,
        "lowest_best": min(row[0] for row in rows),
        "policy": policy,
        "mean": mean,
        "optimum": optimum,
        "seconds": seconds,
    }


def main() -> None:
    torch.set_num_threads(1)
    num_plans = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    table = []
    print("".join(f"{column:>12}" for column in COLUMNS))
    for label in sys.argv[2:] or VARIANTS:
        table.append(measure(label, num_plans))
        print(
            "".join(f"{v:>12.3f}" if isinstance(v, float) else f"{v:>12}" for v in table[-1].values()),
            flush=True,
        )
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"search-closed-form-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in table
        )


if __name__ == "__main__":
    main()
