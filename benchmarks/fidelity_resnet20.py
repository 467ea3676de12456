"""Which repair makes the score of a pruned network foretell its fine-tuned accuracy: ResNet-20, CIFAR-10.

    OMP_NUM_THREADS=1 python benchmarks/fidelity_resnet20.py --weights resnet20.pth --data data

Random plans that spend half of the multiply-accumulates are scored in four ways: as pruned (``plain``), with
BatchNorm statistics measured anew (``batchnorm``), with layers refitted by least squares
(``reconstruction``), and with both, which is the default of recipes. Each plan is then fine-tuned once, from
the network that --start names, for --epochs on --images training images, and the four scores are compared
with that. No score chooses the plans. Accuracies are on the 5,000 images of the search split: fine-tuning
does not see them, but the checkpoint was trained on them, so that they are higher than on new images.
The test split is not used.

Prints a row per seed (of the plans and of training) and way of scoring: Pearson's and Spearman's
correlation, with the interval that holds 95 % of sets of plans drawn anew. Fine-tuned plans are kept in
--out, and a call that was stopped goes on. Writes results/fidelity-resnet20-<machine>-torch<version>.csv, and
the figures of every plan beside it.

Reference: Distiller's ResNet-20 on CIFAR-10, networks of its AMC searches: Pearson 0.75 with reconstruction
after 1 epoch, 0.07 to 0.14 without (IntelLabs/distiller, notebooks of AMC examples).
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from autocompress.agents import make_search
from autocompress.core import Plan
from autocompress.core.files import write_atomically
from autocompress.pipeline import Candidate, Fidelity, Recipe, prepare
from autocompress.pipeline.fidelity_outcome import Tuned
from autocompress.pipeline.problems import channel_problem_of
from autocompress.pipeline.quick_score import QuickScore
from autocompress.training import Data, TrainSettings, evaluate, fit, subset

WAYS = {
    "plain": {"reconstruct": False, "recalibrate_batches": 0},
    "batchnorm": {"reconstruct": False, "recalibrate_batches": 8},
    "reconstruction": {"reconstruct": True, "recalibrate_batches": 0},
    "both": {"reconstruct": True, "recalibrate_batches": 8},
}
COLUMNS = (
    "seed", "way", "plans", "pearson", "pearson_low", "pearson_high", "spearman", "spearman_low",
    "spearman_high", "score_mean", "score_sd", "finetuned_mean", "finetuned_sd",
)  # fmt: skip


def quick_scores(candidate: Candidate, data: Data, recipe: Recipe) -> dict[str, QuickScore]:
    return {
        way: QuickScore(
            candidate.model,
            candidate.traced,
            data,
            settings=recipe.prune.model_copy(update=changes),
            seed=recipe.seed,
        )
        for way, changes in WAYS.items()
    }


def random_plans(candidate: Candidate, recipe: Recipe, num: int) -> list[Plan]:
    problem = replace(channel_problem_of(candidate, recipe), evaluate=lambda plan: 0.0)
    trials = make_search("random", {})(problem, num_plans=num, seed=recipe.seed).trials
    return list(dict.fromkeys(trial.plan for trial in trials))


def finetuned(
    args: argparse.Namespace, plan: Plan, score: QuickScore, *, candidate: Candidate, data: Data, seed: int
) -> float:
    """Accuracy on the search split after fine-tuning; read where it is known."""
    stem = args.out / f"{plan.digest}-{args.start}-{args.images}-{args.epochs}-{seed}"
    if stem.with_suffix(".json").exists():
        return float(json.loads(stem.with_suffix(".json").read_text()))
    few = replace(data, train=subset(data.train, np.arange(min(args.images, len(data.train)))))
    settings = TrainSettings(
        epochs=args.epochs, lr=args.lr, weight_decay=1e-4, distill_weight=0.5, mixed_precision=True
    )
    small = copy.deepcopy(score.build(plan))
    fit(small, few, settings, seed=seed, teacher=candidate.model, checkpoint=stem.with_suffix(".checkpoint"))
    accuracy = evaluate(small, data.search).accuracy
    write_atomically(stem.with_suffix(".json"), json.dumps(accuracy).encode())
    stem.with_suffix(".checkpoint").unlink()
    return accuracy


def one_seed(args: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    """A row per plan: the four scores and the accuracy after fine-tuning."""
    overrides = [f"seed={seed}", f"weights={args.weights.resolve()}", f"data.root={args.data.resolve()}"]
    recipe = Recipe.load("resnet20_cifar10_50", overrides)
    prepared = prepare(recipe)
    candidate, data = prepared.candidates[0], prepared.data
    scores = quick_scores(candidate, data, recipe)
    rows: list[dict[str, object]] = []
    for plan in random_plans(candidate, recipe, args.plans):
        row: dict[str, object] = {"seed": seed, "plan": plan.digest}
        row |= {way: score(plan) for way, score in scores.items()}
        row["finetuned"] = finetuned(
            args, plan, scores[args.start], candidate=candidate, data=data, seed=seed
        )
        rows.append(row | {"channels": json.dumps(dict(plan.channels), separators=(",", ":"))})
        print(f"# {len(rows)}/{args.plans}", *list(row.values())[1:], flush=True)
    return rows


def summary(rows: Sequence[Mapping[str, object]], seed: object, way: str, epochs: int) -> dict[str, object]:
    tuned = tuple(Tuned(Plan(), float(str(row[way])), float(str(row["finetuned"])), {}, 0.0) for row in rows)
    both = Fidelity("resnet20", epochs, tuned, Path())
    result: dict[str, object] = {"seed": seed, "way": way, "plans": len(rows)}
    for name, found in (("pearson", both.pearson), ("spearman", both.spearman)):
        for suffix, value in (("", found.value), ("_low", found.low), ("_high", found.high)):
            result[name + suffix] = round(value, 2)
    for name, values in (
        ("score", [one.score for one in tuned]),
        ("finetuned", [one.accuracy for one in tuned]),
    ):
        result[f"{name}_mean"] = round(100 * float(np.mean(values)), 2)
        result[f"{name}_sd"] = round(100 * float(np.std(values, ddof=1)), 2)
    return result


def write(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"{name}-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of resnet20_b")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity-resnet20"))
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--start", choices=list(WAYS), default="both", help="where fine-tuning starts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    plans: list[dict[str, object]] = []
    rows: list[dict[str, object]] = []
    print(*COLUMNS, sep="\t", flush=True)
    for seed in args.seeds:
        found = one_seed(args, seed)
        plans += found
        rows += [summary(found, seed, way, args.epochs) for way in WAYS]
        for row in rows[-len(WAYS) :]:
            print(*row.values(), sep="\t", flush=True)
    if len(args.seeds) > 1:
        rows += [summary(plans, "all", way, args.epochs) for way in WAYS]
        for row in rows[-len(WAYS) :]:
            print(*row.values(), sep="\t", flush=True)
    write("fidelity-resnet20", rows)
    write("fidelity-resnet20-plans", plans)


if __name__ == "__main__":
    main()
