"""Mixed precision against uniform bits at equal cost: ResNet-20 on CIFAR-10, for three machines.

    python benchmarks/resnet20_bits.py --weights resnet20.pth --data data --plans 80 --images 10000 --epochs 1

For each target the budget is what uniform 4-bit weights and activations cost there (first and last layer at
8 bits, for uniform and mixed plans alike). The searches see 5,000 images held back from training; then every
plan gets the same quantisation-aware training, and accuracy is read once, on the 10,000 test images. Seeds
differ in split, calibration images, search and training. A step that was finished is read, not repeated.
Prints one row per plan, mean and standard deviation over the seeds, and every plan's cost on every target
(do policies specialise?), and writes benchmarks/results.

Reference: Wang et al., "HAQ", CVPR 2019, tables 3 to 5 make this comparison against PACT at fixed bits.
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

from autocompress.agents import make_search
from autocompress.core import Bits, Budget, Ledger, Plan, Problem
from autocompress.hardware_sim import load_target
from autocompress.pipeline.bit_score import BitScore, bit_problem, uniform_plan
from autocompress.pipeline.costs import Costs
from autocompress.pipeline.recipe_sections import QuantiseSettings
from autocompress.quant.qat import QatNetwork
from autocompress.trace import trace
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data
from autocompress.zoo import build, load_weights

TARGETS = {"bismo-zynq7020": "latency_ms", "bitfusion": "energy_mj", "finn-zynq7020": "latency_ms"}
COLUMNS = (
    "target", "method", "seed", "evaluations", "cost_share", "mean_weight_bits", "mean_act_bits",
    "quick_accuracy", "quick_loss", "before_qat", "after_qat", "search_s", "qat_s",
)  # fmt: skip
UNIFORM = Bits(4, 4)


class Bench:
    """One network, and everything that does not depend on the seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = QuantiseSettings(
            weight_bits=tuple(args.bits),
            act_bits=tuple(args.bits),
            score="likelihood",
            score_images=args.score_images,
        )
        self.model = build("resnet20_b", num_classes=10, in_channels=3)
        load_weights(self.model, args.weights)
        self.model.eval()
        self.graph = trace(self.model, (3, 32, 32)).graph
        self.uniform = uniform_plan(self.graph, UNIFORM, settings=self.settings)

    def costs(self, target: str) -> Costs:
        """Prices on a target."""
        return Costs(self.graph, load_target(target), bits=Bits(8, 8))

    def budget(self, target: str) -> Budget:
        """What uniform 4 bits cost there."""
        metric = TARGETS[target]
        return Budget(metric, self.costs(target)(self.uniform)[metric], relative=False)

    def data(self, seed: int) -> Data:
        """CIFAR-10 with the split of a seed."""
        return load_data(
            "cifar10", root=self.args.data, search_size=5000, train_size=self.args.images,
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), seed=seed,
        )  # fmt: skip


def plan_of(bench: Bench, problem: Problem, method: str, seed: int, ledger: Path) -> dict[str, Any]:
    """The plan of a method, with evaluations used and seconds."""
    start = time.perf_counter()
    if method == "uniform":
        return {"plan": bench.uniform.to_json(), "evaluations": 1, "seconds": 0.0}
    with Ledger(ledger) as book:
        result = make_search(method, {})(book.in_front_of(problem), num_plans=bench.args.plans, seed=seed)
    seconds = time.perf_counter() - start
    return {"plan": result.best.plan.to_json(), "evaluations": len(result.trials), "seconds": seconds}


def row(bench: Bench, target: str, method: str, seed: int, made: dict[str, Any]) -> dict[str, Any]:
    plan = Plan.from_json(made["plan"])
    metric = TARGETS[target]
    bits = [(plan.bits[layer.name], layer) for layer in bench.graph.layers]
    weights = sum(layer.num_weights for _, layer in bits)
    return {
        "target": target,
        "method": method,
        "seed": seed,
        "evaluations": made["evaluations"],
        "cost_share": round(bench.costs(target)(plan)[metric] / bench.budget(target).limit, 4),
        "mean_weight_bits": round(sum(b.weight * layer.num_weights for b, layer in bits) / weights, 2),
        "mean_act_bits": round(mean(b.act for b, _ in bits), 2),
        "quick_accuracy": round(100 * made["quick_accuracy"], 2),
        "quick_loss": round(made["quick_loss"], 4),
        "before_qat": round(100 * made["before_qat"], 2),
        "after_qat": round(100 * made["after_qat"], 2),
        "search_s": round(made["seconds"]),
        "qat_s": round(made["qat_seconds"]),
    }


def one(bench: Bench, target: str, method: str, seed: int) -> dict[str, Any]:
    """Search, train and test one plan, or read what an earlier call did."""
    folder = bench.args.out / target / f"{method}-{seed}"
    done = folder / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    data = bench.data(seed)
    score = BitScore(bench.model, data, settings=bench.settings, seed=seed)
    problem = bit_problem(
        bench.graph, score, settings=bench.settings, costs=bench.costs(target), budgets=[bench.budget(target)]
    )
    found = folder / "plan.json"
    if not found.exists():
        found.write_text(
            json.dumps(plan_of(bench, problem, method, seed, bench.args.out / target / f"{seed}.sqlite"))
        )
    made = json.loads(found.read_text())
    plan = Plan.from_json(made["plan"])
    quick = evaluate(score.tables.network(plan), data.search, batch_size=100, limit=2000)
    made |= {"quick_accuracy": quick.accuracy, "quick_loss": quick.loss}
    start = time.perf_counter()
    settings = TrainSettings(
        epochs=bench.args.epochs, lr=bench.args.lr, batch_size=128, weight_decay=1e-4, distill_weight=0.5
    )
    student = QatNetwork(score.tables, plan, [x for x, _ in score.calibration_images])
    fit(
        student, data, settings, seed=seed, teacher=score.tables.skeleton.graph_module,
        checkpoint=folder / "qat.checkpoint",
    )  # fmt: skip
    made["qat_seconds"] = time.perf_counter() - start
    made["before_qat"] = evaluate(score.tables.network(plan), data.test, batch_size=100).accuracy
    made["after_qat"] = evaluate(student, data.test, batch_size=100).accuracy
    done.write_text(json.dumps(made))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of resnet20_b")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-resnet20-bits"))
    parser.add_argument("--targets", default="bismo-zynq7020,bitfusion")
    parser.add_argument("--methods", default="uniform,milp,ddpg")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--plans", type=int, default=80)
    parser.add_argument("--score-images", type=int, default=500)
    parser.add_argument(
        "--images", type=int, default=10000, help="training images of quantisation-aware training"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args)
    rows, plans = [], {}
    print(*COLUMNS, sep="\t", flush=True)
    for seed in args.seeds:
        for target in args.targets.split(","):
            for method in args.methods.split(","):
                made = one(bench, target, method, seed)
                plans[target, method, seed] = Plan.from_json(made["plan"])
                rows.append(row(bench, target, method, seed, made))
                print(*rows[-1].values(), sep="\t", flush=True)
    _print_means(rows)
    _print_specialisation(bench, plans)
    name = f"resnet20-bits-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    path = Path(__file__).parent / "results" / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def _print_means(rows: list[dict[str, Any]]) -> None:
    print("\ntarget\tmethod\tbefore training mean ± sd\tafter mean ± sd")
    for target, method in dict.fromkeys((r["target"], r["method"]) for r in rows):
        cells = [target, method]
        for key in ("before_qat", "after_qat"):
            values = [r[key] for r in rows if (r["target"], r["method"]) == (target, method)]
            spread = stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{mean(values):.2f} ± {spread:.2f}")
        print(*cells, sep="\t")


def _print_specialisation(bench: Bench, plans: dict[tuple[str, str, int], Plan]) -> None:
    """Every plan of MILP or DDPG, priced everywhere: below 1 fits the budget there."""
    targets = list(dict.fromkeys(target for target, _, _ in plans))
    print("\nfound for\tmethod\tseed", *(f"cost on {t}" for t in targets), sep="\t")
    for (target, method, seed), plan in plans.items():
        if method != "uniform":
            shares = [bench.costs(t)(plan)[TARGETS[t]] / bench.budget(t).limit for t in targets]
            print(target, method, seed, *(f"{share:.3f}" for share in shares), sep="\t")


if __name__ == "__main__":
    main()
