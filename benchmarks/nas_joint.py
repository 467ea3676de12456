"""Architecture, channels and bits one after the other, or together: equal evaluations, equal final training.

    python benchmarks/nas_joint.py --seeds 0 1 2
    python benchmarks/nas_joint.py --data cifar10 --root data --seeds 0 --train-size 5000

Per seed a weight-sharing supernet is trained once. Then, within one latency on one target:

- ``sequential``: evolution over architectures, then over the channels of the one found, then over its bits,
  a third of the evaluations each. Every stage goes equally far into its own range (in logarithms), and the
  next one is given what is left.
- ``joint evolution``: evolution over all three at once, as many evaluations.
- ``joint predictor``: APQ's search, as many evaluations, float networks included.
- ``joint ddpg``: with --ddpg, DDPG in the joint environment, as many evaluations.

Every plan found inherits the supernet's weights and gets the same training: epochs in float, then epochs
with rounded values and the float network as teacher. ``quick`` is the score that searches saw (the likelihood
of the search split); ``test`` is the accuracy on the test split, read once per plan, at the end.

``transfer``: the same supernet and predictor on a second target, for --transfer evaluations and no training
but the final one. Every row also gives what its plan costs on the other target, as a share of its limit.

Rows that are in the results already are not repeated. Prints every row, then mean and standard deviation over
seeds; writes benchmarks/results/nas-joint-<data>-<machine>-torch<version>.csv.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch

from autocompress.agents import DDPGSearch
from autocompress.core import Budget, Plan, Problem, SearchResult, Trial
from autocompress.hardware_sim import HardwareModel, load_target
from autocompress.nas import (
    AccuracyPredictor,
    ElasticSupernet,
    ElitistEvolution,
    JointScore,
    JointScoreSettings,
    JointSpace,
    PredictorSearch,
    fit_elastic,
    joint_problem,
    learned_predictor,
)
from autocompress.nas.joint import PARTS
from autocompress.nas.spaces import LAYOUTS, Layout, MBConvChain, Stage
from autocompress.pipeline.costs import share_for_first
from autocompress.quant import Calibration, QuantTables, Skeleton
from autocompress.quant.qat import QatNetwork
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data, training_images

SMALL = Layout(8, 1, 8, (Stage(12, 2, 1), Stage(16, 2, 2)), 32)
"""For the digits: four blocks that two CPU cores train in seconds."""
BITS = (2, 3, 4, 6, 8)
COLUMNS = (
    "seed", "method", "target", "evaluations", "quick", "share_of_limit", "other_target", "share_on_other",
    "weight_bits", "act_bits", "macs", "test", "cpu_s",
)  # fmt: skip
SUPERNET = TrainSettings(12, 64, 0.1, distill_weight=1.0, distill_temperature=1.0, clip_norm=5.0)
TUNE = TrainSettings(3, 64, 0.02, clip_norm=5.0)
QAT = TrainSettings(4, 64, 0.02, weight_decay=1e-4, distill_weight=0.5, clip_norm=5.0)


@dataclass(frozen=True)
class Bench:
    """One seed's supernet, its scores, and the targets with the problem of all three together on each."""

    joint: JointSpace
    data: Data
    score: JointScore
    targets: tuple[HardwareModel, HardwareModel]
    problems: tuple[Problem, Problem]
    seed: int

    def trained(self, plan: Plan) -> float:
        """Accuracy on the test split after the final training."""
        member = self.score.member(plan)
        fit(member, self.data, TUNE, seed=self.seed)
        member.eval()
        images, settings = self.score.calibration_images, self.score.settings.quant
        skeleton = Skeleton(member)
        tables = QuantTables(skeleton, Calibration(skeleton, images, settings))
        student = QatNetwork(tables, plan, training_images(self.data.train, 2048, seed=self.seed))
        fit(student, self.data, QAT, seed=self.seed, teacher=skeleton.graph_module)
        return evaluate(student, self.data.test).accuracy


def prepared(options: argparse.Namespace, seed: int) -> Bench:
    """The data and a trained supernet."""
    search = 0.3 if options.data == "digits" else 0.1
    data = load_data(
        options.data, root=options.root, search_size=search, seed=seed, train_size=options.train_size
    )
    layout = SMALL if options.data == "digits" else LAYOUTS[32]
    chain = MBConvChain(layout, data.input_shape, data.num_classes, expansions=(6,))
    joint = JointSpace(chain, weight_bits=BITS, act_bits=BITS)
    supernet = ElasticSupernet(joint, seed=seed)
    fit_elastic(supernet, data, replace(SUPERNET, epochs=options.epochs), seed=seed)
    images = JointScoreSettings(calibration_images=200, score_images=options.score_images)
    score = JointScore(supernet, data, seed=seed, settings=images)
    first, second = (load_target(name) for name in options.targets)
    problems = [
        joint_problem(joint, target, [Budget("latency_ms", limit)], evaluate=score)
        for target, limit in zip((first, second), options.limits, strict=True)
    ]
    for problem in problems:
        problem.reachable()
    return Bench(joint, data, score, (first, second), (problems[0], problems[1]), seed)


def sequential(bench: Bench, num_plans: int) -> Trial:
    """One kind of decision after the other, each within its part of what is left."""
    target, found = bench.targets[0], bench.joint.reference
    limit, trials = bench.problems[0].budgets[0].limit, list[Trial]()
    for index in range(len(PARTS)):
        stages = [
            joint_problem(bench.joint, target, [], evaluate=bench.score, decide=[p], fixed=found)
            for p in PARTS[index:]
        ]
        smallest = [stage.smallest["latency_ms"] for stage in stages]
        start = bench.problems[0].price(found)["latency_ms"]
        own = share_for_first(limit, start=start, smallest=smallest) if start > limit else limit
        problem = replace(stages[0], budgets=(Budget("latency_ms", max(own, limit), relative=False),))
        search = ElitistEvolution(population=max(4, num_plans // 12))
        trials.append(search(problem, num_plans=num_plans // len(PARTS), seed=bench.seed).best)
        found = trials[-1].plan
    return trials[-1]


def searched(bench: Bench, method: str, num_plans: int) -> tuple[SearchResult, AccuracyPredictor | None]:
    """One joint search on the first target."""
    problem = bench.problems[0]
    if method == "joint evolution":
        search = ElitistEvolution(population=max(4, num_plans // 5))
        return search(problem, num_plans=num_plans, seed=bench.seed), None
    if method == "joint ddpg":
        return DDPGSearch()(problem, num_plans=num_plans, seed=bench.seed), None
    num_float, num_samples = round(0.3 * num_plans), round(0.4 * num_plans)
    predictor, samples = learned_predictor(
        problem, num_float=num_float, num_samples=num_samples, seed=bench.seed
    )
    left = num_plans - num_float - num_samples
    result = PredictorSearch(predictor)(problem, num_plans=left, seed=bench.seed)
    return SearchResult((*samples, *result.trials)), predictor


def row(
    bench: Bench, method: str, trial: Trial, *, on: int, evaluations: int, start: float
) -> dict[str, object]:
    """What is reported of one plan, its final training included."""
    own, other = bench.targets[on], bench.targets[1 - on]
    prices = [
        problem.price(trial.plan)["latency_ms"] / problem.budgets[0].limit for problem in bench.problems
    ]
    bits = [b for name, b in trial.plan.bits.items() if ".block" in name]
    found = {
        "seed": bench.seed,
        "method": method,
        "target": own.name,
        "evaluations": evaluations,
        "quick": round(trial.score, 4),
        "share_of_limit": round(prices[on], 3),
        "other_target": other.name,
        "share_on_other": round(prices[1 - on], 3),
        "weight_bits": round(mean(b.weight for b in bits), 2),
        "act_bits": round(mean(b.act for b in bits), 2),
        "macs": int(trial.cost["macs"]),
        "test": round(100 * bench.trained(trial.plan), 2),
        "cpu_s": round(time.process_time() - start, 1),
    }
    print(" ".join(f"{name}={value}" for name, value in found.items()), flush=True)
    return found


def run(options: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    """All rows of a seed."""
    start = time.process_time()
    bench = prepared(options, seed)
    print(f"seed {seed}: supernet in {time.process_time() - start:.0f} CPU s", flush=True)
    start, number = time.process_time(), options.evaluations
    rows = [row(bench, "sequential", sequential(bench, number), on=0, evaluations=number, start=start)]
    for method in ["joint evolution", "joint predictor", *(["joint ddpg"] if options.ddpg else [])]:
        start = time.process_time()
        result, predictor = searched(bench, method, number)
        rows.append(row(bench, method, result.best, on=0, evaluations=number, start=start))
        if predictor is not None:
            start = time.process_time()
            moved = PredictorSearch(predictor)(bench.problems[1], num_plans=options.transfer, seed=seed)
            rows.append(row(bench, "transfer", moved.best, on=1, evaluations=options.transfer, start=start))
    return rows


def summary(rows: Sequence[dict[str, object]]) -> None:
    """Mean and standard deviation over seeds."""
    print(
        f"{'method':<16} {'target':<14} {'plans':>5} {'quick':>15} {'test':>14} {'of limit':>8} {'CPU s':>6}"
    )
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        own = [r for r in rows if r["method"] == method]
        figures = {
            key: [float(str(r[key])) for r in own] for key in ("quick", "test", "share_of_limit", "cpu_s")
        }
        spread = {key: stdev(values) if len(values) > 1 else 0.0 for key, values in figures.items()}
        print(
            f"{method:<16} {own[0]['target']:<14} {own[0]['evaluations']:>5} "
            f"{mean(figures['quick']):>7.4f} +-{spread['quick']:.4f} {mean(figures['test']):>6.2f} "
            f"+-{spread['test']:.2f}{mean(figures['share_of_limit']):>9.2f} {mean(figures['cpu_s']):>6.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--score-images", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", nargs=2, default=["bitfusion", "phone-pixel1"])
    parser.add_argument(
        "--limits", type=float, nargs=2, default=[0.12, 0.65], help="of the largest's latency"
    )
    parser.add_argument("--evaluations", type=int, default=90)
    parser.add_argument("--transfer", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=SUPERNET.epochs, help="of the supernet")
    parser.add_argument("--ddpg", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    version = torch.__version__.split("+")[0]
    path = options.out / f"nas-joint-{options.data}-{platform.machine()}-torch{version}.csv"
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [dict(found) for found in csv.DictReader(file)]
    for seed in options.seeds:
        if any(str(found["seed"]) == str(seed) for found in rows):
            continue
        rows += run(options, seed)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    summary(rows)


if __name__ == "__main__":
    main()
