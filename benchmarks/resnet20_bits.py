"""Mixed precision against uniform bits at equal cost: ResNet-20 on CIFAR-10, for three machines.

    python benchmarks/resnet20_bits.py --weights resnet20.pth --data data --plans 80 --images 10000 --epochs 1

For each target the budget is what uniform weights and activations (``--uniform``, 4 bits) cost there; the
first and the last layer have 8 bits, in uniform and mixed plans alike. The searches see some of 5,000 images
held back from training (``--score-images``); the best plans of each (``--finalists``) and the uniform one are
trained for ``--finalist-steps`` and scored on all of them, as in a recipe, and the best is taken. It gets the
same quantisation-aware training as the uniform plan, and accuracy is read once, on the 10,000 test images.
Seeds differ in split, calibration images, search and training. A step that was finished is not repeated, and
equal plans share their training. Prints and writes into benchmarks/results

* one row per plan, mean and standard deviation over the seeds;
* whether plans specialise: every search's best plan moved to every target. Where it costs more than the
  budget there, HAQ's sweep takes bits away until it fits, as one would have to. Loss and accuracy are those
  of the held-back images before training, by which these plans were found.

Reference: Wang et al., "HAQ", CVPR 2019, tables 3 to 5 make this comparison against PACT at fixed bits.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from autocompress.agents import make_search
from autocompress.core import Bits, Budget, Ledger, Plan, Problem, finalists
from autocompress.envs import swept
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
    "held_accuracy", "held_loss", "before_qat", "after_qat", "search_s", "qat_s",
)  # fmt: skip
MOVED = ("found_for", "moved_to", "method", "seed", "cost_share", "swept_share", "held_loss", "held_accuracy")


class Bench:
    """One network, and everything that does not depend on the seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = QuantiseSettings(
            weight_bits=tuple(args.bits),
            act_bits=tuple(args.bits),
            score="likelihood",
            score_images=args.score_images,
            finalist_steps=args.finalist_steps,
        )
        self.model = build("resnet20_b", num_classes=10, in_channels=3)
        load_weights(self.model, args.weights)
        self.model.eval()
        self.graph = trace(self.model, (3, 32, 32)).graph
        self.training = TrainSettings(
            epochs=args.epochs, lr=args.lr, batch_size=128, weight_decay=1e-4, distill_weight=0.5
        )
        self.uniform = uniform_plan(self.graph, Bits(args.uniform, args.uniform), settings=self.settings)

    def costs(self, target: str) -> Costs:
        """Prices on a target."""
        return Costs(self.graph, load_target(target), bits=Bits(8, 8))

    def budget(self, target: str) -> Budget:
        """What the uniform plan costs there."""
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
        plan = bench.uniform.to_json()
        return {"plan": plan, "found": plan, "evaluations": 1, "seconds": 0.0}
    with Ledger(ledger) as book:
        result = make_search(method, {})(book.in_front_of(problem), num_plans=bench.args.plans, seed=seed)
    plans = dict.fromkeys((bench.uniform, *(t.plan for t in finalists([result], bench.args.finalists))))
    full = problem.finals()
    assert full is not None, "--finalist-steps 0 needs fewer --score-images than the search split has"
    scores: dict[Plan, float] = {}
    for plan in plans:
        file = bench.args.out / f"final-{plan.digest}-{seed}.json"
        if not file.exists():
            write(file, {"score": full.evaluate(plan)})
        scores[plan] = json.loads(file.read_text())["score"]
    return {
        "plan": max(scores, key=lambda plan: scores[plan]).to_json(),
        "found": result.best.plan.to_json(),
        "evaluations": len(result.trials),
        "finals": {plan.digest: score for plan, score in scores.items()},
        "seconds": time.perf_counter() - start,
    }


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
        "held_accuracy": round(100 * made["held_accuracy"], 2),
        "held_loss": round(made["held_loss"], 4),
        "before_qat": round(100 * made["before_qat"], 2),
        "after_qat": round(100 * made["after_qat"], 2),
        "search_s": round(made["seconds"]),
        "qat_s": round(made["qat_seconds"]),
    }


def problem_of(bench: Bench, score: BitScore, target: str) -> Problem:
    """Bits within the budget of a target."""
    return bit_problem(
        bench.graph,
        score,
        settings=bench.settings,
        costs=bench.costs(target),
        budgets=[bench.budget(target)],
        training=bench.training,
    )


def one(bench: Bench, target: str, method: str, seed: int) -> dict[str, Any]:
    """Search, train and test one plan, or read what an earlier call did."""
    folder = bench.args.out / target
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"{method}-{seed}.json"
    data = bench.data(seed)
    score = BitScore(bench.model, data, settings=bench.settings, seed=seed)
    if not found.exists():
        problem = problem_of(bench, score, target)
        made = plan_of(bench, problem, method, seed, folder / f"{seed}.sqlite")
        write(found, made)
    made = json.loads(found.read_text())
    plan = Plan.from_json(made["plan"])
    trained = bench.args.out / f"trained-{plan.digest}-{seed}.json"
    if not trained.exists():
        write(trained, train(bench, score, plan, seed))
    return made | json.loads(trained.read_text())


def train(bench: Bench, score: BitScore, plan: Plan, seed: int) -> dict[str, Any]:
    """Accuracy of a plan before and after training."""
    start = time.perf_counter()
    student = QatNetwork(score.tables, plan, score.training_images())
    fit(
        student, bench.data(seed), bench.training, seed=seed, teacher=score.tables.skeleton.graph_module,
        checkpoint=bench.args.out / f"trained-{plan.digest}-{seed}.checkpoint",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    after = evaluate(student, bench.data(seed).test, batch_size=100).accuracy
    before = evaluate(score.tables.network(plan), bench.data(seed).test, batch_size=100).accuracy
    found = {"before_qat": before, "after_qat": after, "qat_seconds": seconds}
    return found | held_back(bench, score, plan, seed)


def held_back(bench: Bench, score: BitScore, plan: Plan, seed: int) -> dict[str, float]:
    """Loss and accuracy of a rounded network on all held-back images."""
    held = evaluate(score.tables.network(plan), bench.data(seed).search, batch_size=100)
    return {"held_accuracy": held.accuracy, "held_loss": held.loss}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def moved(bench: Bench, plans: dict[tuple[str, str, int], Plan], seed: int) -> Iterator[dict[str, Any]]:
    """Every searched plan of a seed on every target."""
    score = BitScore(bench.model, bench.data(seed), settings=bench.settings, seed=seed)
    targets = list(dict.fromkeys(target for target, _, _ in plans))
    for target in targets:
        problem = problem_of(bench, score, target)
        limit = bench.budget(target).limit
        for (source, method, _), plan in plans.items():
            fitting = problem.plan(swept(problem, values_of(problem, plan)))
            file = bench.args.out / f"held-{fitting.digest}-{seed}.json"
            if not file.exists():
                write(file, held_back(bench, score, fitting, seed))
            made = json.loads(file.read_text())
            shares = [bench.costs(target)(p)[TARGETS[target]] / limit for p in (plan, fitting)]
            yield dict(
                zip(
                    MOVED,
                    (
                        *(source, target, method, seed, *(round(share, 4) for share in shares)),
                        *(round(made["held_loss"], 4), round(100 * made["held_accuracy"], 2)),
                    ),
                    strict=True,
                )
            )


def values_of(problem: Problem, plan: Plan) -> list[Any]:
    """The knobs' values in a plan of bits."""
    sides = {"weight_bits": "weight", "act_bits": "act"}
    return [getattr(plan.bits[knob.bit_layers[0]], sides[knob.kind]) for knob in problem.knobs]


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
    parser.add_argument("--finalists", type=int, default=4, help="plans trained a little and scored anew")
    parser.add_argument("--finalist-steps", type=int, default=30, help="of training before that")
    parser.add_argument("--uniform", type=int, default=4, help="bits whose cost is the budget")
    parser.add_argument("--score-images", type=int, default=1000)
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
                plans[target, method, seed] = Plan.from_json(made["found"])
                rows.append(row(bench, target, method, seed, made))
                print(*rows[-1].values(), sep="\t", flush=True)
    _print_means(rows)
    searched = {key: plan for key, plan in plans.items() if key[1] != "uniform"}
    moves = [
        move for seed in args.seeds
        for move in moved(bench, {key: p for key, p in searched.items() if key[2] == seed}, seed)
    ]  # fmt: skip
    _print_moves(moves)
    name = "resnet20-bits" if args.uniform == 4 else f"resnet20-bits{args.uniform}"
    _write_csv(name, rows, COLUMNS)
    _write_csv(f"{name}-moved", moves, MOVED)


def _write_csv(name: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    name = f"{name}-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    path = Path(__file__).parent / "results" / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
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


def _print_moves(moves: list[dict[str, Any]]) -> None:
    """Rows are where a plan is used, columns for which target it was found; means over the seeds."""
    for method in dict.fromkeys(move["method"] for move in moves):
        sources = list(dict.fromkeys(m["found_for"] for m in moves))
        print(f"\n{method}: cost over the budget as found / loss x 1000 and accuracy once it fits")
        print("used on", *(f"found for {source}" for source in sources), sep="\t")
        for target in dict.fromkeys(m["moved_to"] for m in moves):
            cells = []
            for source in sources:
                here = [
                    m for m in moves
                    if (m["method"], m["found_for"], m["moved_to"]) == (method, source, target)
                ]  # fmt: skip
                cost, loss, accuracy = (
                    mean(m[key] for m in here) for key in ("cost_share", "held_loss", "held_accuracy")
                )
                cells.append(f"{cost:.3f} / {1000 * loss:.1f} {accuracy:.2f}")
            print(target, *cells, sep="\t")


if __name__ == "__main__":
    main()
