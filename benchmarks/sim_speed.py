"""How many networks per second every bundled target's cost model prices.

Prints one table, and saves it as results/sim-speed-<machine>-torch<version>.csv: whole-network queries of
VGG-16 and MobileNetV2 (224x224) per CPU second on one core, one graph at a time (``single``) and as arrays
of random plans (``batched``: price_plans on 20,000 plans, drawn from the channel knobs of a search and,
where the target runs them all, 2 to 8 bits for the weights and activations of every layer; the draw is not
counted). Best of three rounds.

With ``--scalesim PYTHON`` the last rows time one small layer (1x1, 160 to 960 channels, 7x7 pixels, 16x16
array, weight stationary) in SCALE-Sim and in our model in the same run, and say whether both give the same
cycles. PYTHON is the interpreter of a virtual environment of its own, since scalesim needs numpy below 2:
python -m venv scalesim && scalesim/bin/pip install scalesim==3.0.0 "numpy<2". One layer only: a whole
MobileNetV2 takes it minutes, a VGG-16 more than an hour.

Run: OMP_NUM_THREADS=1 python benchmarks/sim_speed.py [--scalesim PYTHON]
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from autocompress.core import Bits, LayerGraph, LayerSpec
from autocompress.hardware_sim.model import HardwareModel, UnsupportedLayerError
from autocompress.hardware_sim.table import LayerTable
from autocompress.hardware_sim.target_file import bundled_targets, load_target
from autocompress.prune.knobs import channel_knobs
from autocompress.trace import trace

PLANS_PER_CALL = 20_000
CALLS = 1
MAX_SECONDS = 5.0
WIDTHS = (Bits(8, 8), Bits(2, 2), Bits(1, 1), Bits(32, 32))
COLUMNS = ("target", "model", "network", "layers", "bits", "single_per_s", "batched_per_s")
SMALL_LAYER = LayerSpec("pw", "conv", 160, 960, in_hw=(7, 7), out_hw=(7, 7), bits=Bits(8, 8))
SCALESIM_FILES = {
    "speed.cfg": """[general]
run_name = speed
[architecture_presets]
ArrayHeight: 16
ArrayWidth: 16
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Bandwidth: 10
Dataflow: ws
MemoryBanks: 1
ReadRequestBuffer: 512
WriteRequestBuffer: 512
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 4
RandomNumberGeneratorSeed: 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
""",
    "speed.csv": "name,ifmap_h,ifmap_w,filter_h,filter_w,channels,filters,stride,\npw,7,7,1,1,160,960,1,\n",
    "layout.csv": "name,factors\npw," + 21 * "1," + "\n",  # read but not used: no custom layout
}
SCALESIM_RUN = """
import time
from scalesim.scale_sim import scalesim
start = time.process_time()
files = {"config": "speed.cfg", "topology": "speed.csv", "layout": "layout.csv"}
scalesim(save_disk_space=True, verbose=False, **files).run_scale(top_path="out")
print("seconds", time.process_time() - start)
"""


def cpu_seconds(query: Callable[[], Any], times: int) -> float:
    """CPU seconds of one query: the best of three rounds of ``times`` queries, fewer when they are slow."""
    rounds: list[float] = []
    while len(rounds) < 3 and sum(rounds) * times < MAX_SECONDS:
        start = time.process_time()
        for _ in range(times):
            query()
        rounds.append((time.process_time() - start) / times)
    return min(rounds)


def runnable(machine: HardwareModel, graph: LayerGraph) -> tuple[LayerGraph, Bits] | None:
    """The graph at the widest bits that the target runs; None when it runs none of them."""
    for bits in WIDTHS:
        given = graph.with_bits({layer.name: bits for layer in graph.layers})
        try:
            machine(given)
        except UnsupportedLayerError:
            continue
        return given, bits
    return None


def random_plans(machine: HardwareModel, graph: LayerGraph, widest: Bits) -> dict[str, Any]:
    """Choices of every channel knob and, where narrower bits run, bits of every layer."""
    rng = np.random.default_rng(0)
    sizes = {knob.name: rng.choice(knob.choices, PLANS_PER_CALL) for knob in channel_knobs(graph)}
    bits = {layer.name: rng.integers(2, 9, PLANS_PER_CALL) for layer in graph.layers}
    if widest != Bits(8, 8):
        return {"sizes": sizes}
    plans = {"sizes": sizes, "weight_bits": bits, "act_bits": bits}
    try:
        machine.price_plans(graph, **plans)
    except UnsupportedLayerError:
        return {"sizes": sizes}
    return plans


def measure(machine: HardwareModel, network: str, graph: LayerGraph) -> dict[str, Any] | None:
    found = runnable(machine, graph)
    if found is None:
        return None
    given, bits = found
    plans = random_plans(machine, given, bits)
    return {
        "target": machine.name,
        "model": machine.kind,
        "network": network,
        "layers": len(given.layers),
        "bits": f"{bits.weight}/{bits.act}" if "weight_bits" not in plans else "2-8",
        "single_per_s": round(1 / cpu_seconds(lambda: machine(given), 20)),
        "batched_per_s": round(
            PLANS_PER_CALL / cpu_seconds(lambda: machine.price_plans(given, **plans), CALLS)
        ),
    }


def beside_scalesim(python: str) -> list[dict[str, Any]]:
    """One small layer in SCALE-Sim and in our model, and a check that both give the same cycles."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in SCALESIM_FILES.items():
            (Path(folder) / name).write_text(text)
        run = [str(Path(python).absolute()), "-c", SCALESIM_RUN]
        shown = subprocess.run(run, cwd=folder, check=True, capture_output=True, text=True).stdout
        (report,) = Path(folder).rglob("COMPUTE_REPORT.csv")
        header, row = report.read_text().splitlines()[:2]
    theirs = dict(zip((h.strip() for h in header.split(",")), row.split(","), strict=False))
    machine = load_target("systolic-16x16")
    ours = machine.layer_costs(LayerTable.of([SMALL_LAYER])).extra["compute_cycles"][0]
    if ours != float(theirs["Total Cycles"]):
        raise SystemExit(f"cycles differ: SCALE-Sim {theirs['Total Cycles']}, ours {ours:.0f}")
    seconds = {
        "scalesim 3.0.0": float(shown.split()[-1]),
        machine.name: cpu_seconds(lambda: machine(LayerGraph((SMALL_LAYER,))), 200),
    }
    return [
        dict.fromkeys(COLUMNS, "")
        | {"target": name, "model": "systolic", "network": f"one 1x1 layer, {ours:.0f} cycles"}
        | {"layers": 1, "bits": "8/8", "single_per_s": float(f"{1 / value:.4g}")}
        for name, value in seconds.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Speed of the cost models.")
    parser.add_argument("--scalesim", help="python of an environment with scalesim and numpy<2")
    arguments = parser.parse_args()
    networks = {
        name: trace(getattr(torchvision.models, name)(weights=None), (3, 224, 224)).graph
        for name in ("vgg16", "mobilenet_v2")
    }
    table = []
    print("".join(f"{column:>18}" for column in COLUMNS))
    machines = [load_target(path) for path in bundled_targets()]
    rows = (measure(m, name, graph) for m in machines for name, graph in networks.items())
    extra = beside_scalesim(arguments.scalesim) if arguments.scalesim else []
    for row in (*rows, *extra):
        if row is not None:
            table.append(row)
            print("".join(f"{v:>18}" for v in row.values()), flush=True)
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"sim-speed-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
