"""What one evaluation of a plan of bits costs, beside the float network and the Brevitas network.

Prints one table, and saves it as results/bit-evaluation-speed-<machine>-torch<version>.csv: CPU seconds on
one thread for the same random 32x32 images, in batches of 100 and of 500 (evaluate's default), of

* ``float``: the network as it was trained, with BatchNorm;
* ``fast``: what a search evaluates, a random plan of 2 to 8 bits; ``build`` is the share of making it from
  the tables, counted in;
* ``brevitas``: the network of training and export with the same plan, without building it.

The rounds take turns, and the best of each counts, so that a busy machine does not favour one of them.
``equal`` says whether fast and Brevitas networks gave the same outputs to the last bit.

Run: OMP_NUM_THREADS=1 python benchmarks/bit_evaluation_speed.py [--images 500] [--rounds 3]
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.core import Bits, Plan
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize
from autocompress.zoo.models import build

NETWORKS = ("resnet20", "mobilenet_v1", "mobilenet_v2", "vgg16")
COLUMNS = (
    "network", "batch", "images", "float_s", "fast_s", "build_s", "brevitas_s",
    "fast_over_float", "brevitas_over_float", "equal",
)  # fmt: skip
CALIBRATION = 64


def tables_of(model: nn.Module, images: Tensor) -> QuantTables:
    skeleton = Skeleton(model)
    return QuantTables(skeleton, Calibration(skeleton, [images[:CALIBRATION]], QuantSettings()))


def evaluated(network: nn.Module, images: Tensor, batch: int) -> Tensor:
    with torch.inference_mode():
        outputs = [network(part) for part in images.split(batch)]
    return torch.cat([getattr(output, "value", output) for output in outputs])


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def row(name: str, images: Tensor, batch: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = build(name, num_classes=10).eval()
    tables, draw = tables_of(model, images), random.Random(0)
    plan = Plan(bits={n: Bits(draw.randint(2, 8), draw.randint(2, 8)) for n in tables.skeleton.layers})
    trained = quantize(tables, plan).eval()
    equal = torch.equal(evaluated(tables.network(plan), images, batch), evaluated(trained, images, batch))
    calls: dict[str, Callable[[], object]] = {
        "float": lambda: evaluated(model, images, batch),
        "fast": lambda: evaluated(tables.network(plan), images, batch),
        "build": lambda: tables.network(plan),
        "brevitas": lambda: evaluated(trained, images, batch),
    }
    best = {kind: min(times) for kind, times in _in_turns(calls, rounds).items()}
    return {
        "network": name,
        "batch": batch,
        "images": len(images),
        **{f"{kind}_s": round(best[kind], 3) for kind in calls},
        "fast_over_float": round(best["fast"] / best["float"], 2),
        "brevitas_over_float": round(best["brevitas"] / best["float"], 2),
        "equal": equal,
    }


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            times[kind].append(seconds(call))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    images = torch.randn(args.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = []
    print(*COLUMNS, sep="\t", flush=True)
    for name in args.networks:
        for batch in args.batches:
            rows.append(row(name, images, batch, args.rounds))
            print(*rows[-1].values(), sep="\t", flush=True)
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"bit-evaluation-speed-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
