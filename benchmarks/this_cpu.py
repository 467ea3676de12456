"""How well a profile of this machine predicts networks it was not fitted on.

Times the profile's own networks and four networks of torchvision at 224 x 224 in ONNX Runtime, float, batch
1, one thread, all in one loop; fits ours, a four-constant roofline and one proportional to MACs to the former
and prints their errors on the latter: the median over layers against ONNX Runtime's profile, and the whole
network from end to end. All three are given the same charge for the time between layers. Saves the table as
results/this-cpu-<machine>-torch<version>.csv.

Run: python benchmarks/this_cpu.py [--runs 25] [--networks 36] [--save FOLDER]
--save also writes the measurements; tests/golden holds those of one run.
"""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from scipy.optimize import minimize

from autocompress.core import LayerSpec
from autocompress.export import export_onnx
from autocompress.export.layer_bench import Timing, chain_model, time_networks
from autocompress.hardware_sim.measured import Measured
from autocompress.hardware_sim.table import LayerTable
from autocompress.pipeline.measurements import Measurement, Measurements, write_measurements
from autocompress.pipeline.profile import (
    NUM_NETWORKS,
    RUNS,
    as_measurements,
    describe_machine,
    fit_profile,
)
from autocompress.pipeline.profile_networks import measured_networks
from autocompress.trace import trace

HELD_OUT = ("resnet18", "mobilenet_v2", "vgg11", "squeezenet1_1")
SHAPE = (3, 224, 224)
COLUMNS = ("predictor", "network", "layers", "measured_ms", "median_layer_error", "network_error")
Floats = NDArray[np.float64]
Predictor = Callable[[LayerTable], Floats]


def ordered(layers: tuple[LayerSpec, ...], timing: Timing) -> list[float]:
    """Times in the order of the layers; the runtime swaps parallel branches of different windows."""
    left = list(range(len(timing.layer_ms)))
    times = []
    for layer in layers:
        window = (*layer.kernel, *layer.out_hw) if layer.kind == "conv" else ()
        found = next(i for i in left if timing.windows[i] == window)
        left.remove(found)
        times.append(timing.layer_ms[found])
    return times


def measure(num_networks: int, runs: int) -> tuple[Measurements, Measurements]:
    """Measurements of the profile's networks and of the held-out ones."""
    chains = measured_networks(num_networks)
    models: dict[str, bytes | Path] = {name: chain_model(chain) for name, chain in chains.items()}
    graphs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in HELD_OUT:
            network = torchvision.models.get_model(name, weights=None)
            graphs[name] = trace(network, SHAPE).graph
            models[name] = export_onnx(network, Path(folder) / f"{name}.onnx", input_shape=SHAPE)
        timings = time_networks(models, runs=runs)
    held_out = [
        Measurement(name, replace(layer), latency)
        for name, graph in graphs.items()
        for layer, latency in zip(graph.layers, ordered(graph.layers, timings[name]), strict=True)
    ]
    whole = {(name, 32): timings[name].network_ms for name in HELD_OUT}
    return as_measurements(chains, timings, bits=32), Measurements(tuple(held_out), whole)


def roofline(table: LayerTable, measured_ms: Floats) -> Predictor:
    """Rates of depthwise and other layers, bandwidth and time per layer with the least mean log error."""

    def predict(table: LayerTable, logs: Floats) -> Floats:
        dense, depthwise, gb_per_s, us = np.exp(logs)
        rate = np.where(table.depthwise, depthwise, dense) * 1e6
        values = table.kernel_weights + table.in_channels * table.in_h * table.in_w
        moved = 4.0 * (values + table.out_channels * table.out_h * table.out_w)
        slowest = np.maximum(table.macs / rate, moved / (gb_per_s * 1e6))
        return np.asarray(slowest + us * 1e-3, dtype=np.float64)

    def error(logs: Floats) -> float:
        return float(np.abs(np.log(predict(table, logs) / measured_ms)).mean())

    best = minimize(error, np.log([75.0, 13.0, 13.0, 5.0]), method="Nelder-Mead", options={"maxiter": 4000})
    return lambda table: predict(table, best.x)


def proportional(table: LayerTable, measured_ms: Floats) -> Predictor:
    ms_per_mac = float(np.median(measured_ms / table.macs))
    return lambda table: np.asarray(table.macs * ms_per_mac, dtype=np.float64)


def predictors(model: Measured, fit: Measurements) -> dict[str, Predictor]:
    table = LayerTable.of([m.layer for m in fit.layers])
    measured = np.array([m.latency_ms for m in fit.layers])
    return {
        "ours": lambda table: np.asarray(model.layer_costs(table).extra["kernel_ms"]),
        "four-constant roofline": roofline(table, measured),
        "proportional to MACs": proportional(table, measured),
    }


def compare(model: Measured, fit: Measurements, held_out: Measurements) -> list[dict[str, object]]:
    """One row per predictor and network, and one for all networks together."""
    rows: list[dict[str, object]] = []
    for name, predict in predictors(model, fit).items():
        every, totals = [], []
        for network in dict.fromkeys(m.network for m in held_out.layers):
            here = [m for m in held_out.layers if m.network == network]
            table = LayerTable.of([m.layer for m in here])
            errors = np.abs(predict(table) / np.array([m.latency_ms for m in here]) - 1)
            between = model.layer_costs(table).extra["between_ms"].sum()
            whole = held_out.networks[network, 32]
            total = float((predict(table).sum() + between) / whole - 1)
            every += list(errors)
            totals.append(abs(total))
            figures = (len(here), f"{whole:.3f}", f"{np.median(errors):.1%}", f"{total:+.1%}")
            rows.append(dict(zip(COLUMNS, (name, network, *figures), strict=True)))
        figures = (len(every), "", f"{np.median(every):.1%}", f"{np.median(totals):.1%}")
        rows.append(dict(zip(COLUMNS, (name, "all (median)", *figures), strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--networks", type=int, default=NUM_NETWORKS)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    fit, held_out = measure(given.networks, given.runs)
    about = describe_machine(threads=1)
    profile = fit_profile(fit, name="this-cpu", about=about)
    rows = compare(profile.model, fit, held_out)
    print(about)
    print(f"error on the profile's own networks, left out one by one: {dict(profile.model.held_out_error)}")
    print("  ".join(f"{name:>22}" for name in COLUMNS))
    for line in rows:
        print("  ".join(f"{value!s:>22}" for value in line.values()))
    name = f"this-cpu-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    with (Path(__file__).parent / "results" / name).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    if given.save:
        source = f"benchmarks/this_cpu.py. {about} Layers by its profiler, networks by CPU time, float."
        write_measurements(fit, given.save / "this_cpu_fit.csv", source=source)
        write_measurements(held_out, given.save / "this_cpu_held_out.csv", source=source)


if __name__ == "__main__":
    main()
