"""What makes training at few bits work: ResNet-20 on CIFAR-10, one change at a time.

    python benchmarks/qat_ablation.py --weights cifar10_resnet20.pth --data data --bits 2 --seeds 0 1 2

Uniform weights and activations, 8 bits for the image and the last layer. Every row trains for --epochs passes
over --images training images and is scored on --held images held back from training (which the checkpoint has
seen: compare rows with each other); ``--test`` adds the test split, which is meant for final figures only.
Rows that are in the results already are not repeated. Seeds differ in data order and augmentation. Prints a
row per run, then mean and range over the seeds; writes benchmarks/results. ``--speed`` prints instead how
many images a second each form of the network takes, in CPU seconds of one thread.

Rows: ``default`` is QatNetwork with SETTINGS. ``no teacher`` and ``teacher alone`` change the loss,
``thresholds ...`` how much they learn, ``lr ...`` the peak rate; ``progressive`` spends half of the epochs at
twice the bits; ``no BatchNorm`` trains folded layers; ``brevitas`` trains the Brevitas network itself.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.core.errors import DivergenceError
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize
from autocompress.quant.qat import QatNetwork
from autocompress.quant.ste import LearnedGrid
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data, training_images
from autocompress.zoo import build, load_weights

SETTINGS = TrainSettings(epochs=2, lr=0.02, weight_decay=1e-4, distill_weight=0.5)
COLUMNS = (
    "row", "bits", "seed", "images", "epochs", "rounded", "start", "trained", "loss", "test", "cpu_s",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A float network with its data, and what is left of a training budget."""

    tables: QuantTables
    data: Data
    calibration: tuple[Tensor, ...]
    drawn: list[Tensor]
    settings: TrainSettings

    def plan(self, bits: int) -> Plan:
        """Uniform bits but for both ends."""
        first, *_, last = self.tables.skeleton.layers
        chosen = dict.fromkeys(self.tables.skeleton.layers, Bits(bits, bits))
        return Plan(bits=chosen | {first: Bits(8, 8), last: Bits(8, 8)})

    def student(self, bits: int, kind: type[QatNetwork] = QatNetwork) -> QatNetwork:
        """The training form of that plan."""
        return kind(self.tables, self.plan(bits), self.drawn)

    def fitted(self, network: nn.Module, seed: int, **changes: Any) -> tuple[nn.Module, float]:
        """The network, trained in place, and its last loss."""
        on_epoch = changes.pop("on_epoch", None)
        settings = replace(self.settings, **changes)
        teacher = self.tables.skeleton.graph_module
        reports = fit(network, self.data, settings, seed=seed, teacher=teacher, on_epoch=on_epoch)
        return network, reports[-1].loss


Row = Callable[[Bench, int, int], tuple[nn.Module, float]]


class WithoutNorms(QatNetwork):
    """The training form with BatchNorm left folded."""

    def _add_norms(self, batches: list[Tensor]) -> None:
        pass


def changed(**changes: Any) -> Row:
    return lambda bench, bits, seed: bench.fitted(bench.student(bits), seed, **changes)


def learning_thresholds(rate: float) -> Row:
    def run(bench: Bench, bits: int, seed: int) -> tuple[nn.Module, float]:
        student = bench.student(bits)
        for grid in _grids(student):
            grid.rate = rate
            grid.log.requires_grad_(rate > 0)
        return bench.fitted(student, seed)

    return run


def frozen_halfway(bench: Bench, bits: int, seed: int) -> tuple[nn.Module, float]:
    student = bench.student(bits)

    def freeze(report: Any) -> None:
        if 2 * (report.epoch + 1) >= bench.settings.epochs:
            for grid in _grids(student):
                grid.log.requires_grad_(False)
                grid.log.grad = None

    return bench.fitted(student, seed, on_epoch=freeze)


def progressive(bench: Bench, bits: int, seed: int) -> tuple[nn.Module, float]:
    epochs = bench.settings.epochs // 2
    wide, _ = bench.fitted(bench.student(2 * bits), seed, epochs=epochs)
    assert isinstance(wide, QatNetwork)
    network = wide.brevitas()
    skeleton = Skeleton(bench.tables.skeleton.graph_module)
    with torch.no_grad():
        for name, layer in skeleton.layers.items():
            trained = network.get_submodule(name)
            layer.weight.copy_(trained.weight)
            if layer.bias is not None:
                layer.bias.copy_(trained.bias)
    tables = QuantTables(skeleton, Calibration(skeleton, bench.calibration, QuantSettings()))
    student = QatNetwork(tables, bench.plan(bits), bench.drawn)
    return bench.fitted(student, seed + 1000, epochs=bench.settings.epochs - epochs)


def brevitas(lr: float) -> Row:
    return lambda bench, bits, seed: bench.fitted(quantize(bench.tables, bench.plan(bits)), seed, lr=lr)


ROWS: dict[str, Row] = {
    "default": changed(),
    "no teacher": changed(distill_weight=0.0),
    "teacher alone": changed(distill_weight=1.0),
    "thresholds fixed": learning_thresholds(0.0),
    "thresholds fixed halfway": frozen_halfway,
    "thresholds x0.1": learning_thresholds(0.1),
    "thresholds x1": learning_thresholds(1.0),
    "progressive": progressive,
    "lr 0.005": changed(lr=0.005),
    "lr 0.05": changed(lr=0.05),
    "no BatchNorm": lambda b, bits, seed: b.fitted(b.student(bits, WithoutNorms), seed),
    "no BatchNorm and clipped": lambda b, bits, seed: b.fitted(
        b.student(bits, WithoutNorms), seed, clip_norm=1.0
    ),
    "brevitas lr 0.001": brevitas(0.001),
}


def _grids(student: nn.Module) -> list[LearnedGrid]:
    return [module for module in student.modules() if isinstance(module, LearnedGrid)]


def one(bench: Bench, name: str, bits: int, seed: int, *, test: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"row": name, "bits": bits, "seed": seed, "images": len(bench.data.train)}
    row |= {"epochs": bench.settings.epochs, "test": ""}
    row["rounded"] = _percent(bench.tables.network(bench.plan(bits)), bench.data.search)
    row["start"] = _percent(bench.student(bits), bench.data.search)
    start = time.process_time()
    try:
        network, loss = ROWS[name](bench, bits, seed)
    except DivergenceError:
        return row | {"trained": "diverged", "loss": "", "cpu_s": round(time.process_time() - start)}
    row |= {"trained": _percent(network, bench.data.search), "loss": round(loss, 3)}
    row["cpu_s"] = round(time.process_time() - start)
    if test:
        row["test"] = _percent(network, bench.data.test)
    return row


def _percent(network: nn.Module, samples: Any) -> float:
    return round(100 * evaluate(network, samples, batch_size=250).accuracy, 2)


def speeds(bench: Bench) -> None:
    """Images a second of every form, evaluated and trained."""
    x, y = bench.data.train.batch(torch.arange(128), None)
    student = bench.student(4)
    forms = {
        "float": bench.tables.skeleton.graph_module,
        "fast network": bench.tables.network(bench.plan(4)),
        "QatNetwork": student,
        "brevitas": quantize(bench.tables, bench.plan(4)),
    }
    print("form\tevaluated\ttrained", flush=True)
    for name, form in forms.items():
        cells = [f"{_rate(lambda n=form: n.eval()(x), grad=False):.0f}"]
        if name != "fast network":
            cells.append(
                f"{_rate(lambda n=form: F.cross_entropy(n.train()(x), y).backward(), grad=True):.0f}"
            )
        print(name, *cells, sep="\t", flush=True)


def _rate(run: Callable[[], Any], *, grad: bool) -> float:
    best = float("inf")
    with torch.set_grad_enabled(grad):
        for _ in range(5):
            start = time.process_time()
            run()
            best = min(best, time.process_time() - start)
    return 128 / best


def made(args: argparse.Namespace) -> Bench:
    model = build("resnet20", num_classes=10, in_channels=3)
    load_weights(model, args.weights)
    data = load_data("cifar10", root=args.data, search_size=args.held, train_size=args.images)
    calibration = data.train.batch(torch.arange(512), None)[0].split(128)
    skeleton = Skeleton(model.eval())
    tables = QuantTables(skeleton, Calibration(skeleton, calibration, QuantSettings()))
    return Bench(
        tables,
        data,
        calibration,
        training_images(data.train, 2048, seed=0),
        replace(SETTINGS, epochs=args.epochs),
    )


def summary(rows: list[dict[str, Any]]) -> None:
    print("\nrow\tbits\tseeds\ttrained mean\tsmallest\tlargest")
    for name, bits in dict.fromkeys((r["row"], r["bits"]) for r in rows):
        found = [r["trained"] for r in rows if (r["row"], r["bits"]) == (name, bits)]
        values = [float(v) for v in found if v != "diverged"]
        cells = [f"{mean(values):.2f}", min(values), max(values)] if values else ["diverged"]
        print(name, bits, f"{len(values)}/{len(found)}", *cells, sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of resnet20")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--rows", default=",".join(ROWS), help="names, with commas")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--held", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--test", action="store_true", help="score the test split as well")
    parser.add_argument("--speed", action="store_true", help="measure speeds instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = made(args)
    if args.speed:
        speeds(bench)
        return
    name = f"qat-ablation-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    path = Path(__file__).parent / "results" / name
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    key = ("row", "bits", "seed", "images", "epochs")
    done = {tuple(str(r[k]) for k in key) for r in rows}
    print(*COLUMNS, sep="\t", flush=True)
    for bits in args.bits:
        for seed in args.seeds:
            for chosen in args.rows.split(","):
                if (chosen, str(bits), str(seed), str(args.images), str(args.epochs)) in done:
                    continue
                rows.append(one(bench, chosen, bits, seed, test=args.test))
                print(*(rows[-1][c] for c in COLUMNS), sep="\t", flush=True)
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)
    summary(rows)


if __name__ == "__main__":
    main()
