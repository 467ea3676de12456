"""Does a budget on this machine's latency hold on this machine? VGG-16, MobileNetV2, ResNet-18 at 224x224.

    autocompress profile                       # writes this-cpu.yaml; some minutes
    python benchmarks/latency_budget.py --target this-cpu.yaml

First the original is timed, and all predictions are multiplied by what it took over what was predicted
(``factor``), as a run on ``this-cpu`` does. For each network and limit (a share of the original's latency) a
search takes the plan that keeps most of the weights' squared norm, as there are no images here to score by.
The pruned network is exported and timed in ONNX Runtime beside its original, in turns, batch 1, one thread.
The same in 8 bits: all weights and activations in 8 bits, exported as QDQ with scales from noise. Then

* ``error`` is the measured latency over that share of the original's in the same loop, less 1: how far the
  budget is missed. ``drift`` is what the original took there over what it took when the run began, less 1:
  on a busy machine, minutes later, it is another one;
* ``speedup`` is what was gained, both measured; ``macs`` the share of MACs left;
* ``bytes`` of the ONNX files before and after.

Saves the table as results/latency-budget-<machine>-torch<version>.csv.
"""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision

from autocompress.agents import make_search
from autocompress.core import Bits, Budget, Plan, Problem
from autocompress.export import export_onnx, export_qcdq, measure_latency
from autocompress.hardware_sim import load_target
from autocompress.hardware_sim.measured import Measured
from autocompress.pipeline.anchor import factors
from autocompress.pipeline.costs import Costs, channel_step
from autocompress.prune import channel_knobs, compress_channels, unit_scores
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize
from autocompress.trace import Trace, trace

NETWORKS = ("vgg16", "mobilenet_v2", "resnet18")
SHAPE = (3, 224, 224)
COLUMNS = (
    "network", "bits", "factor", "limit", "limit_ms", "predicted_ms", "measured_ms", "error", "drift",
    "original_ms", "speedup", "macs", "bytes_before", "bytes_after",
)  # fmt: skip


class Case:
    """One network at one precision."""

    def __init__(self, name: str, bits: int, target: str) -> None:
        torch.manual_seed(0)
        self.name, self.bits = name, bits
        self.model = torchvision.models.get_model(name, weights=None).eval()
        self.traced: Trace = trace(self.model, SHAPE)
        machine = load_target(target)
        assert isinstance(machine, Measured)
        self.images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
        anchor = factors(self.model, self.traced.graph, machine, self.images, precisions=(bits,))
        self.factor = anchor[bits]
        machine = machine.scaled(anchor)
        both = Bits(8, 8) if bits == 8 else None
        self.costs = Costs(self.traced.graph, machine, bits=both, reference_bits=both)
        self.scores = unit_scores(self.model, self.traced, "l2")
        self.knobs = channel_knobs(self.traced.graph, round_to=channel_step(machine))

    def plan(self, limit: float, num_plans: int) -> Plan:
        """The best plan that a search found within a limit in milliseconds."""
        problem = Problem(
            knobs=self.knobs,
            budgets=(Budget("latency_ms", limit, relative=False),),
            price=self.costs.tabulated(self.knobs),
            evaluate=self.norm_left,
        )
        return make_search("cma_es", {})(problem, num_plans=num_plans, seed=0).best.plan

    def norm_left(self, plan: Plan) -> float:
        """Mean over the groups of the share of their units' scores that stays."""
        shares = []
        for name, kept in plan.channels.items():
            ranked = sorted(self.scores[name].tolist(), reverse=True)
            shares.append(sum(ranked[:kept]) / sum(ranked))
        return sum(shares) / len(shares)

    def export(self, plan: Plan, path: Path) -> Path:
        """The ONNX file of a plan at this precision."""
        small = compress_channels(self.model, plan, traced=self.traced, scores=self.scores)
        if self.bits == 32:
            return export_onnx(small, path, input_shape=SHAPE)
        skeleton = Skeleton(small)
        tables = QuantTables(
            skeleton, Calibration(skeleton, self.images.split(4), QuantSettings(weight_range="max"))
        )
        network = quantize(tables, Plan(bits={layer: Bits(8, 8) for layer in skeleton.layers}))
        return export_qcdq(network, path, input_shape=SHAPE)


def rows(case: Case, limits: list[float], *, runs: int, num_plans: int) -> list[dict[str, Any]]:
    """One row for each limit; all files of a network are timed in turns."""
    original = case.costs(Plan())
    plans = {limit: case.plan(limit * original["latency_ms"], num_plans) for limit in limits}
    with tempfile.TemporaryDirectory() as folder:
        files = {"original": case.export(Plan(), Path(folder) / "original.onnx")}
        for limit, plan in plans.items():
            files[str(limit)] = case.export(plan, Path(folder) / f"{limit}.onnx")
        sizes = {name: path.stat().st_size for name, path in files.items()}
        taken = {
            name: t.median_ms for name, t in measure_latency(files, input_shape=SHAPE, runs=runs).items()
        }
    found = []
    for limit, plan in plans.items():
        cost, measured = case.costs(plan), taken[str(limit)]
        limit_ms = limit * original["latency_ms"]
        figures = (
            case.name, case.bits, round(case.factor, 3), limit, round(limit_ms, 3),
            round(cost["latency_ms"], 3), round(measured, 3),
            f"{measured / taken['original'] / limit - 1:+.1%}",
            f"{taken['original'] / original['latency_ms'] - 1:+.1%}",
            round(taken["original"], 3), round(taken["original"] / measured, 2),
            f"{cost['macs'] / original['macs']:.1%}", sizes["original"], sizes[str(limit)],
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, figures, strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="target file that autocompress profile wrote")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--plans", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(*COLUMNS, sep="\t", flush=True)
    table: list[dict[str, Any]] = []
    for name in args.networks:
        for bits in args.bits:
            for row in rows(Case(name, bits, args.target), args.limits, runs=args.runs, num_plans=args.plans):
                print(*row.values(), sep="\t", flush=True)
                table.append(row)
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"latency-budget-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
