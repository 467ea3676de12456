"""Every search on the water-filling problem, whose best score is known.

Prints one table, and puts its rows into results/search-closed-form-<machine>-torch<version>.csv: mean over
instances of the best score, the lowest best score, the score of the actor's own episode, the mean score of
all trials and the CPU seconds per search. ``ddpg-plain`` does not imitate its best episodes; ``ddpg-wide``
has AMC's noise and layer sizes as well. The settings of DDPG were chosen on instances 0 to 3, so the table is
made on others. Run: python benchmarks/search_closed_form.py [num_plans [search ...]]
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


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in SEARCHES
    if name != "milp"  # for bits only
} | {
    "ddpg-plain": ("ddpg", {"imitation_steps": 0}),
    "ddpg-wide": ("ddpg", {"imitation_steps": 0, "sigma": 0.5, "hidden": (300, 300)}),
}


def measure(label: str, num_plans: int) -> dict[str, float | str]:
    name, settings = VARIANTS[label]
    rows = []
    for seed in INSTANCES:
        problem, optimum, _ = waterfilling_problem(seed)
        start = time.process_time()
        result = make_search(name, settings)(problem, num_plans=num_plans, seed=seed)
        seconds = time.process_time() - start
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


def write(rows: list[dict[str, float | str]]) -> None:
    """Put rows into the file of this machine, in place of older ones of the same search and plans."""
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"search-closed-form-{platform.machine()}-torch{version}.csv"
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {(row["search"], row["plans"]): row for row in csv.DictReader(file)}
    for row in rows:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        kept[(str(row["search"]), str(row["plans"]))] = rounded
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def main() -> None:
    torch.set_num_threads(1)
    num_plans = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    labels = sys.argv[2:] or list(VARIANTS)
    if unknown := set(labels) - set(VARIANTS):
        sys.exit(f"no search {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    print("".join(f"{column:>12}" for column in COLUMNS))
    for label in labels:
        row = measure(label, num_plans)
        print(
            "".join(f"{v:>12.3f}" if isinstance(v, float) else f"{v:>12}" for v in row.values()),
            flush=True,
        )
        write([row])


if __name__ == "__main__":
    main()
