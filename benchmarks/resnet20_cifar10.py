"""DDPG against uniform and random at the same number of evaluations: ResNet-20, CIFAR-10, half the MACs.

    python benchmarks/resnet20_cifar10.py --weights resnet20.pth --data data --plans 100 --epochs 6

Every run is the recipe resnet20_cifar10_50 with another search or seed; a run that was cut short is resumed,
and a finished one is read. Accuracies are on the 10,000 test images, which no search sees. Prints one row per
run and the mean and standard deviation over the seeds, and writes benchmarks/results.

Reference: Distiller's ResNet-20 at 50 % MACs, 60 epochs of fine-tuning, from 91.78 %: DDPG 91.26 %, its
random policy 90.98 % (IntelLabs/distiller, AMC examples).
"""

from __future__ import annotations

import argparse
import csv
import platform
from pathlib import Path
from statistics import mean, stdev

import torch

from autocompress.core import Result
from autocompress.pipeline import Recipe, resume, run_recipe

COLUMNS = (
    "search", "seed", "plans", "epochs", "macs_share", "quick_score", "dense", "pruned", "finetuned",
    "change", "search_s", "finetune_s",
)  # fmt: skip


def one(args: argparse.Namespace, search: str, seed: int) -> Result:
    """Run, resume or read one run."""
    folder = args.out / f"{search}-{seed}"
    if (folder / "result.json").exists():
        return Result.from_json((folder / "result.json").read_text())
    if (folder / "recipe.yaml").exists():
        return resume(folder)
    overrides = [
        f"seed={seed}", f"weights={args.weights.resolve()}", f"data.root={args.data.resolve()}",
        f"search.algorithm={search}", "search.baselines=[]", f"search.num_plans={args.plans}",
        f"finetune.epochs={args.epochs}", f"threads={args.threads}",
    ]  # fmt: skip
    return run_recipe(Recipe.load("resnet20_cifar10_50", overrides), out=folder)


def row(result: Result, search: str, seed: int, epochs: int) -> dict[str, object]:
    before, after = result.before, result.after
    return {
        "search": search,
        "seed": seed,
        "plans": 1 if search == "uniform" else result.search["prune"]["num_plans"],
        "epochs": epochs,
        "macs_share": round(after["macs"] / before["macs"], 4),
        "quick_score": round(100 * result.search["prune"]["best_score"], 2),
        "dense": round(100 * before["accuracy"], 2),
        "pruned": round(100 * after["accuracy_before_finetune"], 2),
        "finetuned": round(100 * after["accuracy"], 2),
        "change": round(100 * (after["accuracy"] - before["accuracy"]), 2),
        "search_s": round(result.seconds["prune"]),
        "finetune_s": round(result.seconds["finetune"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of resnet20_b")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-resnet20"))
    parser.add_argument("--searches", default="uniform,random,ddpg")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = []
    print(*COLUMNS, sep="\t", flush=True)
    for seed in args.seeds:
        for search in args.searches.split(","):
            rows.append(row(one(args, search, seed), search, seed, args.epochs))
            print(*rows[-1].values(), sep="\t", flush=True)
    print("\nsearch\tpruned mean ± sd\tfine-tuned mean ± sd\tchange")
    for search in args.searches.split(","):
        mine = [r for r in rows if r["search"] == search]
        cells = [search]
        for key in ("pruned", "finetuned", "change"):
            values = [float(str(r[key])) for r in mine]
            spread = stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{mean(values):.2f} ± {spread:.2f}")
        print(*cells, sep="\t")
    name = f"resnet20-cifar10-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
