"""How fast quantised files run in ONNX Runtime, beside the float file and ONNX Runtime's own quantisation.

Prints one table, and saves it as results/int8-speed-<machine>-torch<version>.csv. For ResNet-18, MobileNetV2
and VGG-16 at 224x224, batch 1, one thread: the float32 file, the same file quantised by
onnxruntime.quantization (static, U8S8, per channel, QDQ, after its own pre-processing), and ours at 8 bits,
at 4 bits, and with 2 to 8 bits drawn for each layer. The files of a network take turns within one loop.
Milliseconds are CPU time of the calling thread, which does all the work, so that other processes on the
machine disturb little: median over the runs. Columns int8 and convolutions count the optimised graph's
convolutions; parity is the largest difference of a logit from the Brevitas network's, as a share of their
range, on four images; ratio is the speed against ONNX Runtime's own quantisation.

Weights are random (speed does not depend on them), BatchNorm statistics are those of random images.

Run: OMP_NUM_THREADS=1 python benchmarks/int8_speed.py [--runs 100] [NETWORK ...]
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from autocompress.core import Bits, Plan
from autocompress.export import (
    check_quantised_parity,
    count_int8,
    export_onnx,
    export_qcdq,
    export_static_int8,
)
from autocompress.export.session import open_session, run_session
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize

NETWORKS = ("resnet18", "mobilenet_v2", "vgg16")
SHAPE = (3, 224, 224)
WARM_UP_RUNS = 5
COLUMNS = ("network", "file", "cpu_ms", "p10_ms", "ratio", "int8", "convolutions", "parity", "megabytes")


def network(name: str, images: Tensor) -> nn.Module:
    model = torchvision.models.get_model(name, weights=None)
    model.train()
    with torch.no_grad():
        for batch in images.split(4):
            model(batch)
    return model.eval()


def write_files(model: nn.Module, images: Tensor, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """The files to time, and how far each of ours is from its Brevitas network."""
    files = {"float32": export_onnx(model, folder / "float32.onnx", input_shape=SHAPE)}
    prepared = folder / "prepared.onnx"
    quant_pre_process(files["float32"], prepared)
    files["onnxruntime w8a8"] = export_static_int8(prepared, folder / "own.onnx", images)
    skeleton = Skeleton(model)
    tables = QuantTables(skeleton, Calibration(skeleton, images.split(4), QuantSettings(weight_range="max")))
    draw = random.Random(0)
    plans = {
        "ours w8a8": {layer: Bits(8, 8) for layer in skeleton.layers},
        "ours w4a4": {layer: Bits(4, 4) for layer in skeleton.layers},
        "ours mixed 2-8": {layer: Bits(draw.randint(2, 8), draw.randint(2, 8)) for layer in skeleton.layers},
    }
    parities = {}
    for name, bits in plans.items():
        net = quantize(tables, Plan(bits=bits))
        files[name] = export_qcdq(net, folder / f"{name}.onnx", input_shape=SHAPE)
        # Random weights tell no images apart, so that neighbouring integers grow: the tolerance is wide.
        parities[name] = check_quantised_parity(
            net, files[name], images[:4], tolerance=0.5
        ).as_run.max_rel_diff
    return files, parities


def cpu_milliseconds(files: dict[str, Path], runs: int) -> dict[str, list[float]]:
    image = np.random.default_rng(0).standard_normal((1, *SHAPE), dtype=np.float32)
    sessions = {name: open_session(path) for name, path in files.items()}
    taken: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(WARM_UP_RUNS + runs):
        for name, session in sessions.items():
            start = time.thread_time_ns()
            run_session(session, image)
            if turn >= WARM_UP_RUNS:
                taken[name].append((time.thread_time_ns() - start) / 1e6)
    return taken


def rows(name: str, runs: int) -> list[dict[str, object]]:
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        files, parities = write_files(network(name, images), images, Path(folder))
        taken = cpu_milliseconds(files, runs)
        reference = float(np.median(taken["onnxruntime w8a8"]))
        result: list[dict[str, object]] = []
        for file, path in files.items():
            on_integers, convolutions = count_int8(path)
            median = float(np.median(taken[file]))
            result.append(
                {
                    "network": name,
                    "file": file,
                    "cpu_ms": f"{median:.2f}",
                    "p10_ms": f"{np.percentile(taken[file], 10):.2f}",
                    "ratio": f"{reference / median:.2f}",
                    "int8": on_integers,
                    "convolutions": convolutions,
                    "parity": f"{parities[file]:.1e}" if file in parities else "",
                    "megabytes": f"{path.stat().st_size / 1e6:.2f}",
                }
            )
        return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = Path(__file__).parent / "results"
    target = results / f"int8-speed-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    everything = []
    for name in options.networks:
        for row in rows(name, options.runs):
            print("  ".join(f"{row[column]!s:>18}" for column in COLUMNS), flush=True)
            everything.append(row)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)


if __name__ == "__main__":
    main()
