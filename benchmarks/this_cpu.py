"""How well a profile of this machine predicts networks it was not fitted on, in float and in int8.

Times the profile's own networks and four networks of torchvision at 224 x 224 in ONNX Runtime, batch 1, one
thread, all in one loop; int8 is QDQ, the held-out networks quantised by ONNX Runtime's own static
quantisation (per channel, unsigned activations). Fits ours, a four-constant roofline and one proportional to
MACs to the former, per precision, and prints their errors on the latter: the median over layers against ONNX
Runtime's profile, and the whole network from end to end. All three are given the same charge for the time
between layers. Saves the table as results/this-cpu-<machine>-torch<version>.csv.

Run: python benchmarks/this_cpu.py [--runs 25] [--networks 36] [--save FOLDER]
--save also writes the measurements; tests/golden holds those of one run.
"""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from numpy.typing import NDArray
from scipy.optimize import minimize

from autocompress.core import Bits, LayerSpec
from autocompress.export import export_onnx, export_static_int8
from autocompress.export.layer_bench import PRECISIONS, Timing, chain_model, time_networks
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
COLUMNS = ("predictor", "bits", "network", "layers", "measured_ms", "median_layer_error", "network_error")
Floats = NDArray[np.float64]
Predictor = Callable[[LayerTable], Floats]


def quantised(path: Path) -> Path:
    """The same network with 8-bit weights and activations; ranges do not change times."""
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return export_static_int8(path, path.with_suffix(".int8.onnx"), images)


def in_order(layers: Sequence[LayerSpec], timing: Timing, names: Sequence[str]) -> list[float]:
    """Times in the order of the layers; the runtime swaps parallel branches.

    Args:
        layers: of the network.
        timing: of the layers as they ran.
        names: of the layers' nodes in the ONNX file, in order.
    """
    left = list(range(len(timing.layer_ms)))
    times = []
    for layer, name in zip(layers, names, strict=True):
        window = (*layer.kernel, *layer.out_hw) if layer.kind == "conv" else ()
        named = [i for i in left if timing.names[i] == name or timing.names[i].startswith(f"{name}_token")]
        found = named or [i for i in left if timing.windows[i] == window]
        left.remove(found[0])
        times.append(timing.layer_ms[found[0]])
    return times


def layer_nodes(path: Path) -> list[str]:
    """Names of the convolutions and linear layers of an ONNX file, in order."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]


def measure(num_networks: int, runs: int) -> tuple[Measurements, Measurements]:
    """Measurements of the profile's networks and of the held-out ones, at both precisions."""
    chains = measured_networks(num_networks)
    models: dict[tuple[str, int], bytes | Path] = {
        (name, bits): chain_model(chain, bits=bits) for name, chain in chains.items() for bits in PRECISIONS
    }
    graphs, nodes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in HELD_OUT:
            network = torchvision.models.get_model(name, weights=None)
            graphs[name] = trace(network, SHAPE).graph
            path = export_onnx(network, Path(folder) / f"{name}.onnx", input_shape=SHAPE)
            nodes[name] = layer_nodes(path)
            models |= {(name, 32): path, (name, 8): quantised(path)}
        named = {f"{name} {bits}": model for (name, bits), model in models.items()}
        timings = dict(zip(models, time_networks(named, runs=runs).values(), strict=True))
    fit = [
        as_measurements(chains, {name: timings[name, bits] for name in chains}, bits=bits)
        for bits in PRECISIONS
    ]
    held_out = [
        Measurement(name, replace(layer, bits=Bits(bits, bits)), latency)
        for bits in PRECISIONS
        for name, graph in graphs.items()
        for layer, latency in zip(
            graph.layers, in_order(graph.layers, timings[name, bits], nodes[name]), strict=True
        )
    ]
    whole = {(name, bits): timings[name, bits].network_ms for name in HELD_OUT for bits in PRECISIONS}
    layers = tuple(layer for part in fit for layer in part.layers)
    networks = {key: latency for part in fit for key, latency in part.networks.items()}
    return Measurements(layers, networks), Measurements(tuple(held_out), whole)


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


def predictors(model: Measured, fit: Measurements, bits: int) -> dict[str, Predictor]:
    rows = [m for m in fit.layers if m.layer.bits.weight == bits]
    table = LayerTable.of([m.layer for m in rows])
    measured = np.array([m.latency_ms for m in rows])
    return {
        "ours": lambda table: np.asarray(model.layer_costs(table).extra["kernel_ms"]),
        "four-constant roofline": roofline(table, measured),
        "proportional to MACs": proportional(table, measured),
    }


def compare(model: Measured, fit: Measurements, held_out: Measurements) -> Iterator[dict[str, object]]:
    """One row per precision, predictor and network, and one for all networks together."""
    for bits in sorted({m.layer.bits.weight for m in held_out.layers}, reverse=True):
        for name, predict in predictors(model, fit, bits).items():
            every, totals = [], []
            for network, rows in by_network(held_out, bits).items():
                table = LayerTable.of([m.layer for m in rows])
                errors = np.abs(predict(table) / np.array([m.latency_ms for m in rows]) - 1)
                between = model.layer_costs(table).extra["between_ms"].sum()
                whole = held_out.networks[network, bits]
                total = float((predict(table).sum() + between) / whole - 1)
                every += list(errors)
                totals.append(abs(total))
                figures = (len(rows), f"{whole:.3f}", f"{np.median(errors):.1%}", f"{total:+.1%}")
                yield dict(zip(COLUMNS, (name, bits, network, *figures), strict=True))
            figures = (len(every), "", f"{np.median(every):.1%}", f"{np.median(totals):.1%}")
            yield dict(zip(COLUMNS, (name, bits, "all (median)", *figures), strict=True))


def by_network(measurements: Measurements, bits: int) -> Mapping[str, list[Measurement]]:
    rows: dict[str, list[Measurement]] = {}
    for m in measurements.layers:
        if m.layer.bits.weight == bits:
            rows.setdefault(m.network, []).append(m)
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
    if given.save:
        source = f"benchmarks/this_cpu.py. {about} Layers by its profiler, networks by CPU time."
        write_measurements(fit, given.save / "this_cpu_fit.csv", source=source)
        write_measurements(held_out, given.save / "this_cpu_held_out.csv", source=source)
    profile = fit_profile(fit, name="this-cpu", about=about)
    rows = list(compare(profile.model, fit, held_out))
    print(about)
    print(f"error on the profile's own networks, left out one by one: {dict(profile.model.held_out_error)}")
    print("  ".join(f"{name:>22}" for name in COLUMNS))
    for line in rows:
        print("  ".join(f"{value!s:>22}" for value in line.values()))
    name = f"this-cpu-{platform.machine()}-torch{torch.__version__.split('+')[0]}.csv"
    with (Path(__file__).parent / "results" / name).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
