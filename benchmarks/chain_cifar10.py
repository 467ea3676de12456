"""The chain from architecture to bits against a MobileNetV2 scaled by hand, at equal latency: CIFAR-10.

    python benchmarks/chain_cifar10.py --data data --seeds 0 1 2

The chain is ``recipes/chain_cifar10_zynq7020.yaml`` with the epochs and images that two processor cores can
afford (``SMALL``; ``--full`` runs it as it is). The baseline is what one does without it: MobileNetV2, all of
whose layers are narrowed by one factor, with the same bits in every layer but the first and the last (8
there). For each of 4, 6 and 8 bits the factor is the largest whose latency is within the budget of the chain;
it is trained for as many epochs as the chain trains in all, rounding in the last ones. Of the three, the one
that is best on the search split is compared. The test split is read once per network, at the end. A step that
was finished is read, not repeated. Prints a row per network, then means over the seeds; writes
benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from autocompress.core import Bits
from autocompress.core.result import Result
from autocompress.pipeline import Recipe, resume, run_recipe
from autocompress.pipeline.bit_score import BitScore, uniform_plan
from autocompress.pipeline.costs import Costs
from autocompress.prune import channel_knobs
from autocompress.quant.qat import QatNetwork
from autocompress.trace import keep_first, shrink, trace
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data
from autocompress.zoo import build

RECIPE = "chain_cifar10_zynq7020"
SMALL = (
    *("data.train_size=4000", "data.search_size=1000", "threads=1", "nas.space_settings={width: 0.5}"),
    *("nas.epochs=12", "nas.warmup_epochs=4", "nas.batch_size=64", "nas.alpha_lr=0.05", "nas.num_plans=60"),
    *("nas.score_images=500", "train.epochs=16", "train.mixed_precision=false", "train.batch_size=64"),
    *("search.num_plans=40", "prune.score_images=500", "prune.calibration_images=256", "prune.round_to=4"),
    *("prune.mixed_precision=false", "finetune.epochs=5", "finetune.mixed_precision=false"),
    *("finetune.batch_size=64", "quantise.score_images=500", "quantise.calibration_images=256"),
    *("quantise.search.num_plans=40", "qat.epochs=4", "qat.batch_size=64", "alone=[]"),
    "stages=[nas, train, prune, finetune, quantise, qat]",
)
BITS = (4, 6, 8)
COLUMNS = (
    "network",
    "seed",
    "latency_share",
    "macs",
    "params",
    "search_accuracy",
    "test_accuracy",
    "seconds",
)


def chain(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The chain's row."""
    start = time.perf_counter()
    if (folder / "result.json").exists():
        result = Result.from_json((folder / "result.json").read_text())
    else:
        begun = (folder / "recipe.yaml").exists()
        result = resume(folder) if begun else run_recipe(recipe, out=folder)
    seconds = sum(result.seconds.values()) or time.perf_counter() - start
    (metric, limit), *_ = result.budgets.items()
    training = json.loads((folder / "training.json").read_text())
    return {
        "network": "chain",
        "seed": recipe.seed,
        "latency_share": result.predicted["after"][metric] / limit,
        "macs": result.after["macs"],
        "params": result.after["params"],
        "search_accuracy": training["qat"][-1]["search_accuracy"],
        "test_accuracy": result.after["accuracy"],
        "seconds": seconds,
        "limit": limit,
    }


def baseline(recipe: Recipe, data: Data, bits: int, limit: float, file: Path) -> dict[str, Any]:
    """The row of a scaled MobileNetV2 with the same bits everywhere."""
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    start = time.perf_counter()
    metric = recipe.budgets[0].metric
    torch.manual_seed(recipe.seed)
    whole = build("mobilenet_v2", num_classes=data.num_classes, in_channels=data.input_shape[0])
    traced = trace(whole, data.input_shape)
    knobs = channel_knobs(traced.graph, round_to=4, min_keep=0.02)
    for percent in range(100, 1, -1):
        channels = {knob.name: int(knob.at(percent / 100)) for knob in knobs}
        model = shrink(whole, traced, keep_first(traced, channels))
        graph = trace(model, data.input_shape).graph
        plan = uniform_plan(graph, Bits(bits, bits), settings=recipe.quantise)
        cost = Costs.of(recipe, graph)(plan)
        if cost[metric] <= limit:
            break
    else:
        raise SystemExit(f"MobileNetV2 at {bits} bits cannot be made as fast as the chain's network")
    train, rounding = recipe.train, recipe.qat
    epochs = train.epochs + recipe.finetune.epochs
    settings = TrainSettings(**train.model_dump() | {"epochs": epochs})
    fit(model, data, settings, seed=recipe.seed, checkpoint=file.with_suffix(".train"))
    score = BitScore(model, data, settings=recipe.quantise, seed=recipe.seed)
    student = QatNetwork(score.tables, plan, score.training_images())
    fit(
        student, data, TrainSettings(**rounding.model_dump()), seed=recipe.seed,
        teacher=score.tables.skeleton.graph_module, checkpoint=file.with_suffix(".qat"),
    )  # fmt: skip
    row = {
        "network": f"mobilenet_v2 at {percent} % width, {bits} bits",
        "seed": recipe.seed,
        "latency_share": cost[metric] / limit,
        "macs": cost["macs"],
        "params": cost["params"],
        "search_accuracy": evaluate(student, data.search).accuracy,
        "test_accuracy": evaluate(student, data.test).accuracy,
        "seconds": time.perf_counter() - start,
    }
    part = file.with_suffix(".part")
    part.write_text(json.dumps(row))
    part.rename(file)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-chain-cifar10"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--full", action="store_true", help="the recipe as it is, for a GPU")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of the recipe")
    args = parser.parse_args()
    rows = []
    print(*COLUMNS, sep="\t", flush=True)
    for seed in args.seeds:
        changes = [f"data.root={args.data}", f"seed={seed}", *(() if args.full else SMALL), *args.set]
        recipe = Recipe.load(RECIPE, changes)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        rows.append(chain(recipe, args.out / f"chain-{seed}"))
        settings = recipe.data
        assert settings is not None
        data = load_data(
            settings.name, root=args.data, search_size=settings.search_size, train_size=settings.train_size,
            seed=seed,
        )  # fmt: skip
        show(rows[-1])
        limit = float(rows[-1]["limit"])
        for bits in BITS:
            file = args.out / f"mobilenet-{bits}-{seed}.json"
            rows.append(baseline(recipe, data, bits, limit, file))
            show(rows[-1])
    compare(rows, args.seeds)
    name = f"chain-cifar10-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    path = Path(__file__).parent / "results" / name
    with path.open("w", newline="") as output:
        writer = csv.DictWriter(output, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def show(row: dict[str, Any]) -> None:
    print(
        *(f"{v:.4g}" if isinstance(v, float) else v for v in (row[c] for c in COLUMNS)), sep="\t", flush=True
    )


def compare(rows: list[dict[str, Any]], seeds: list[int]) -> None:
    """Means and deviations of the chain and, of each seed, the best baseline on the search split."""
    ours = [next(r for r in rows if r["seed"] == s and r["network"] == "chain") for s in seeds]
    theirs = [
        max(
            (r for r in rows if r["seed"] == s and r["network"] != "chain"),
            key=lambda r: r["search_accuracy"],
        )
        for s in seeds
    ]
    for name, found in (("chain", ours), ("best scaled mobilenet_v2", theirs)):
        values = [100 * row["test_accuracy"] for row in found]
        spread = stdev(values) if len(values) > 1 else float("nan")
        print(f"{name}: {mean(values):.2f} ± {spread:.2f} % on {len(values)} seeds")


if __name__ == "__main__":
    main()
