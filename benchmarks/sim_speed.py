"""How many networks per second every cost model prices, on one bundled target each.

Prints one table, and saves it as results/sim-speed-<machine>-torch<version>.csv: whole-network queries of
VGG-16 and MobileNetV2 (224x224) per CPU second on one core. The knobs are the channel knobs of a search and,
where the target runs them all, 2 to 8 bits for the weights and for the activations of every layer.

- single: one graph at a time, with the share of every layer.
- batched: price_plans on 20,000 random plans, weights and activations of a layer with equal bits. The draw is
  not counted.
- tabulate_s: seconds to price every layer at every choice once, all pairs of bits included (PlanPricer);
  entries: how many costs that are. Empty where layers do not add up or have too many choices.
- plan_us: microseconds for one random plan by look-up, or by PlanPricer without tables.
- looked_up: random plans by look-up (PlanPricer.price_choices), without tabulation.
- million: plans per second of a search that prices a million of them, tabulation included.

Best of three rounds; tabulation once.

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
from numpy.typing import NDArray

from autocompress.core import Bits, Cost, Knob, LayerGraph, LayerSpec, Problem
from autocompress.hardware_sim import MacsModel, PlanPricer
from autocompress.hardware_sim.model import HardwareModel, UnsupportedLayerError
from autocompress.hardware_sim.table import LayerTable
from autocompress.hardware_sim.target_file import bundled_targets, load_target
from autocompress.prune.knobs import channel_knobs
from autocompress.trace import trace

PLANS_PER_CALL = 20_000
CALLS = 1
MAX_SECONDS = 2.0
Machine = HardwareModel | MacsModel
WIDTHS = (Bits(8, 8), Bits(2, 2), Bits(1, 1), Bits(32, 32))
MILLION = 1_000_000
SIDES = ("weight_bits", "act_bits")
MEASURED = (
    "single_per_s",
    "batched_per_s",
    "entries",
    "tabulate_s",
    "plan_us",
    "looked_up_per_s",
    "million_per_s",
)
COLUMNS = ("target", "model", "network", "layers", "bits", *MEASURED)
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


def runnable(machine: Machine, graph: LayerGraph) -> tuple[LayerGraph, Bits] | None:
    """The graph at the widest bits that the target runs; None when it runs none of them."""
    for bits in WIDTHS:
        given = graph.with_bits({layer.name: bits for layer in graph.layers})
        try:
            machine(given)
        except UnsupportedLayerError:
            continue
        return given, bits
    return None


def knobs_of(machine: Machine, graph: LayerGraph, widest: Bits) -> list[Knob]:
    """Every channel knob and, where narrower bits run, bits of every layer."""
    channels = list(channel_knobs(graph))
    if widest != Bits(8, 8):
        return channels
    try:
        machine(graph.with_bits({layer.name: Bits(2, 2) for layer in graph.layers}))
    except UnsupportedLayerError:
        return channels
    return channels + [Knob(side, layer.name, tuple(range(2, 9))) for layer in graph.layers for side in SIDES]


def random_choices(knobs: list[Knob], *, equal_bits: bool) -> NDArray[np.int64]:
    """Numbers of choices, shape (plans, knobs)."""
    rng = np.random.default_rng(0)
    choices = np.stack([rng.integers(len(knob.choices), size=PLANS_PER_CALL) for knob in knobs], axis=1)
    for k, knob in enumerate(knobs):
        if equal_bits and knob.kind == "act_bits":  # follows the weight bits of its layer
            choices[:, k] = choices[:, k - 1]
    return choices


def as_arrays(knobs: list[Knob], choices: NDArray[np.int64]) -> dict[str, Any]:
    """Arguments of price_plans."""
    plans: dict[str, Any] = {}
    for k, knob in enumerate(knobs):
        kind = "sizes" if knob.kind == "channels" else knob.kind
        plans.setdefault(kind, {})[knob.name] = np.array(knob.choices)[choices[:, k]]
    return plans


def measure(machine: Machine, network: str, graph: LayerGraph) -> dict[str, Any] | None:
    found = runnable(machine, graph)
    if found is None:
        return None
    given, bits = found
    knobs = knobs_of(machine, given, bits)
    plans = as_arrays(knobs, random_choices(knobs, equal_bits=True))
    batched = PLANS_PER_CALL / cpu_seconds(lambda: machine.price_plans(given, **plans), CALLS)
    start = time.process_time()
    pricer = PlanPricer(machine, given, knobs)
    seconds = time.process_time() - start
    choices = random_choices(knobs, equal_bits=False)
    row = {
        "target": machine.name,
        "model": machine.kind,
        "network": network,
        "layers": len(given.layers),
        "bits": "2-8" if len(knobs) > len(channel_knobs(given)) else f"{bits.weight}/{bits.act}",
        "single_per_s": round(1 / cpu_seconds(lambda: machine(given), 20)),
        "batched_per_s": round(batched),
        **dict.fromkeys(("entries", "tabulate_s", "looked_up_per_s", "million_per_s"), ""),
        "plan_us": round(plan_microseconds(pricer, knobs, choices)),
    }
    if pricer.looks_up:
        rate = PLANS_PER_CALL / cpu_seconds(lambda: pricer.price_choices(choices), CALLS)
        million = round(MILLION / (seconds + MILLION / rate))
        row |= {"entries": pricer.num_entries, "tabulate_s": f"{seconds:.3g}"}
        row |= {"looked_up_per_s": round(rate), "million_per_s": million}
    return {column: row[column] for column in COLUMNS}


def plan_microseconds(pricer: PlanPricer, knobs: list[Knob], choices: NDArray[np.int64]) -> float:
    """Time of one of 200 random plans."""
    problem = Problem(tuple(knobs), (), lambda plan: Cost({}), lambda plan: 0.0)
    plans = [
        problem.plan([knob.choices[c] for knob, c in zip(knobs, row, strict=True)]) for row in choices[:200]
    ]
    pricer(plans[0])
    return cpu_seconds(lambda: [pricer(plan) for plan in plans], 1) / len(plans) * 1e6


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
    print("".join(f"{column:>18}" for column in COLUMNS), flush=True)
    by_model = {machine.kind: machine for machine in map(load_target, reversed(bundled_targets()))}
    machines: list[Machine] = [MacsModel(), *(by_model[kind] for kind in sorted(by_model))]
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
