"""Fit the constants of the roofline and row-stationary targets, and print models against devices.

Run ``python benchmarks/hardware_fits.py`` from the root of the repository (a few seconds, one thread). The
constants it prints are those of ``targets/phone-pixel1.yaml``, ``jetson-tx2.yaml``,
``titan-x-pascal.yaml`` and ``eyeriss.yaml``; the tables are those of ``docs/hardware``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from measured_devices import GOLDEN, eyeriss, gpu_measured, gpu_networks, phone_blocks, rows_of

from autocompress.core import Bits, LayerGraph, LayerSpec
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.hardware_sim import LayerTable
from autocompress.hardware_sim.finn_dataflow import FinnDataflow
from autocompress.hardware_sim.lookup import Lookup
from autocompress.hardware_sim.model import LayerCosts
from autocompress.hardware_sim.roofline import Roofline
from autocompress.hardware_sim.row_stationary import RowStationary
from autocompress.hardware_sim.target_file import load_target

FIELDS = (
    "dense_gmacs_per_s",
    "depthwise_gmacs_per_s",
    "linear_gmacs_per_s",
    "activation_gb_per_s",
    "weight_gb_per_s",
    "overhead_us",
    "int8_speedup",
)
Networks = Sequence[Sequence[LayerSpec]]
Values = NDArray[np.float64]


def predict(model: Roofline, networks: Networks) -> Values:
    """Milliseconds of each network for one whole batch."""
    latency = model.layer_costs(LayerTable.of([layer for net in networks for layer in net])).latency_ms
    ends = np.cumsum([len(net) for net in networks])
    return np.array([part.sum() for part in np.split(latency, ends[:-1])]) * model.batch


def proportional(networks: Networks, measured: Values) -> Values:
    """The baseline: one rate for all MACs, the one with the least squared relative error."""
    macs = np.array([sum(layer.macs for layer in net) for net in networks], dtype=np.float64)
    share = macs / measured
    return macs * share.sum() / (share**2).sum()


def fit(
    start: Roofline, free: Sequence[str], residuals: Callable[[Roofline], Values], peak: float
) -> Roofline:
    """Robust relative least squares over the free constants, from three starts.

    Rates stay within a factor of two of the start, the rest within ten; bandwidths below ``peak``. The linear
    rate follows the dense one where it is not free.
    """
    first = np.log([getattr(start, name) for name in free])
    span = np.log([2.0 if "gmacs" in name or "speedup" in name else 10.0 for name in free])
    low = first - span
    high = np.array(
        [min(f, np.log(peak)) if "gb_per_s" in n else f for n, f in zip(free, first + span, strict=True)]
    )

    def model(x: Values) -> Roofline:
        given = dict(zip(free, np.exp(x).tolist(), strict=True))
        return replace(start, **({"linear_gmacs_per_s": given["dense_gmacs_per_s"]} | given))

    offsets = [s * (np.arange(len(free)) % 2 * 2 - 1) for s in (-0.7, 0.0, 0.7)]
    starts = [np.clip(first + offset, low + 1e-3, high - 1e-3) for offset in offsets]
    results = [
        least_squares(lambda x: residuals(model(x)), s, bounds=(low, high), loss="soft_l1", f_scale=0.1)
        for s in starts
    ]
    return model(min(results, key=lambda r: r.cost).x)


def held_out_errors(
    fitted: Callable[[NDArray[np.int64]], Roofline],
    errors: Callable[[Roofline], Values],
    num_rows: int,
    num_folds: int,
) -> Values:
    """Relative errors of every row by a model fitted without the row's fold."""
    index = np.arange(num_rows)
    folds = [index % num_folds == k for k in range(num_folds)]
    parts = [np.where(out, errors(fitted(index[~out])), 0.0) for out in folds]
    return np.sum(parts, axis=0)


def phone() -> None:
    """ProxylessNAS block table: fit on all blocks, and six-fold held-out error."""
    networks, times = phone_blocks()
    measured = np.array(times)
    start = Roofline("phone-pixel1", 7.5, 1.7, 7.5, 0.75, 29.8, 130.0, dram_pj_per_bit=20.0)
    # The table's layers hardly tell the weight bandwidth: it stays at the memory's peak.
    free = ["dense_gmacs_per_s", "depthwise_gmacs_per_s", "activation_gb_per_s", "overhead_us"]

    def fitted(rows: NDArray[np.int64]) -> Roofline:
        chosen = [networks[i] for i in rows]
        return fit(start, free, lambda m: predict(m, chosen) / measured[rows] - 1, peak=29.8)

    def errors(model: Roofline) -> Values:
        return predict(model, networks) / measured - 1

    model = fitted(np.arange(len(measured)))
    show(start.name, model, errors(model))
    summary("six-fold held-out", held_out_errors(fitted, errors, len(measured), 6))
    summary("proportional to MACs", proportional(networks, measured) / measured - 1)
    print()


def gpu(start: Roofline, columns: dict[str, Bits], free: Sequence[str], peak: float) -> None:
    """Eight networks at batch 16; one column per format."""
    names = list(gpu_networks())
    networks = {c: list(gpu_networks(bits).values()) for c, bits in columns.items()}
    measured = {c: np.array([gpu_measured(c)[n] for n in names]) for c in columns}

    def errors(model: Roofline) -> Values:
        return np.stack([predict(model, networks[c]) / measured[c] - 1 for c in columns])

    def fitted(rows: NDArray[np.int64]) -> Roofline:
        return fit(start, free, lambda m: errors(m)[:, rows].ravel(), peak)

    model = fitted(np.arange(len(names)))
    show(start.name, model, errors(model))
    summary("leave one network out", held_out_errors(fitted, errors, len(names), len(names)))
    for column in columns:
        baseline = proportional(networks[column], measured[column])
        print(f"\n| network ({column}) | measured ms | roofline | error | proportional to MACs | error |")
        print("|---|---|---|---|---|---|")
        for n, m, p, b in zip(
            names, measured[column], predict(model, networks[column]), baseline, strict=True
        ):
            print(f"| {n} | {m:.4g} | {p:.4g} | {p / m - 1:+.0%} | {b:.4g} | {b / m - 1:+.0%} |")
        summary("\nroofline", predict(model, networks[column]) / measured[column] - 1)
        summary("proportional to MACs", baseline / measured[column] - 1)
    print()


def summary(name: str, errors: Values) -> None:
    """Absolute errors in one line."""
    size = np.abs(errors)
    print(f"{name}: mean {size.mean():.1%}, median {np.median(size):.1%}, worst {size.max():.1%}")


def show(name: str, model: Roofline, errors: Values) -> None:
    """Constants and errors of a fitted roofline."""
    print(name, ", ".join(f"{f}={getattr(model, f):.4g}" for f in FIELDS))
    summary("on the data it was fitted to", errors)


def tx2_power() -> None:
    """Static power of the TX2: measured power less arithmetic and DRAM by their tables."""
    model = load_target("jetson-tx2", batch=16)
    assert isinstance(model, Roofline)
    seconds, watts, dynamic = [], [], []
    for name, layers in gpu_networks().items():
        costs = replace(model, static_w=0.0).layer_costs(LayerTable.of(layers))
        seconds.append(gpu_measured("tx2_fp32_ms")[name] / 1e3)
        watts.append(gpu_measured("tx2_w")[name])
        dynamic.append(16 * sum(float(part.sum()) for part in costs.energy_pj.values()) * 1e-12)
    rest = np.array(watts) - np.array(dynamic) / np.array(seconds)
    print(f"TX2 static_w = {np.median(rest):.2f} (median over networks; {np.round(rest, 2).tolist()})")
    print("TX2 energy per batch against measured power times measured time:")
    for (name, layers), time, power in zip(gpu_networks().items(), seconds, watts, strict=True):
        energy = model.layer_costs(LayerTable.of(layers)).energy_pj
        joules = 16 * sum(float(part.sum()) for part in energy.values()) * 1e-12
        print(f"  {name} {joules / (power * time) - 1:+.0%}")
    print()


def row_stationary() -> None:
    """Power of the Eyeriss chip into MAC energy and clock, and the table of layers."""
    model = load_target("eyeriss")
    assert isinstance(model, RowStationary)
    print_eyeriss_power(model)
    print_eyeriss_times(model)
    for network in ("vgg16", "alexnet"):
        layers, rows, batch = eyeriss(network)
        costs = replace(model, batch=batch).layer_costs(LayerTable.of(layers))
        columns = eyeriss_columns(costs, batch)
        print(
            "\n| layer | processing ms | model | total ms | model | error | chip energy mJ | model | error |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        measured = np.array([[float(r[k]) for k in ("processing_ms", "total_ms", "energy_mj")] for r in rows])
        for row, m, p in zip(
            [*(r["layer"] for r in rows), f"{network} total"],
            [*measured, measured.sum(axis=0)],
            [*columns, columns.sum(axis=0)],
            strict=True,
        ):
            print(
                f"| {row} | {m[0]:.1f} | {p[0]:.1f} | {m[1]:.1f} | {p[1]:.1f} | {p[1] / m[1] - 1:+.0%} "
                f"| {m[2]:.2f} | {p[2]:.2f} | {p[2] / m[2] - 1:+.0%} |"
            )

        for name, words, column in (
            ("buffer", "buffer_words", "buffer_mb"),
            ("DRAM", "dram_words", "dram_mb"),
        ):
            chip = sum(float(row[column]) for row in rows)
            ours = float(costs.extra[words].sum()) * batch * 2 / 2**20
            print(
                f"{network} {name} accesses, MB: chip {chip:.5g}, model {ours:.5g} ({ours / chip - 1:+.1%})"
            )
        print(f"{network} energies, Spearman {spearmanr(columns[:, 2], measured[:, 2]).statistic:.2f}")


def eyeriss_columns(costs: LayerCosts, batch: int) -> Values:
    """Processing ms, total ms and chip energy (without DRAM) in mJ of the whole batch, shape (layers, 3)."""
    chip = sum(part for name, part in costs.energy_pj.items() if name != "dram")
    return np.stack([costs.extra["processing_ms"], costs.latency_ms, chip * 1e-9], axis=1) * batch


def print_eyeriss_power(model: RowStationary) -> None:
    """Non-negative least squares of power at the measured times and zeros."""
    features, energies = [], []
    for network in ("vgg16", "alexnet"):
        layers, rows, batch = eyeriss(network)
        for layer, row in zip(layers, rows, strict=True):
            zeros = max(float(row["ifmap_zeros_percent"]) / 100, 1e-6)
            unit = replace(model, zero_share=zeros, mac_pj=1.0, batch=batch)
            parts = unit.layer_costs(LayerTable.of([layer])).energy_pj
            active = sum(float(parts[k][0]) for k in ("mac", "scratch_pad", "neighbour", "buffer")) * batch
            energies.append(float(row["energy_mj"]))
            features.append([active * 1e-9, float(row["total_ms"]) * 1e-3])
    measured = np.array(energies)
    scaled = np.array(features) / measured[:, None]
    (mac_pj, clock_mw), _ = nnls(scaled, np.ones(len(measured)))
    error = np.abs(scaled @ [mac_pj, clock_mw] - 1).mean()
    print(f"eyeriss mac_pj={mac_pj:.3g}, clock_mw={clock_mw:.4g}: mean error of power {error:.1%}")


def print_eyeriss_times(model: RowStationary) -> None:
    """Grid search of the cycles per partial sum by processing time, then of the DRAM rate by total time."""
    cycles = np.arange(0.25, 3.01, 0.25)
    sum_cycles = cycles[int(np.argmin([time_error(replace(model, sum_cycles=c), 0) for c in cycles]))]
    model = replace(model, sum_cycles=float(sum_cycles))
    rates = np.arange(400, 1501, 50)
    rate = rates[int(np.argmin([time_error(replace(model, dram_mb_per_s=float(r)), 1) for r in rates]))]
    print(f"eyeriss sum_cycles={sum_cycles:g}, dram_mb_per_s={rate}")


def time_error(model: RowStationary, column: int) -> float:
    """Mean absolute relative error over the 18 layers of processing (0) or total (1) time."""
    errors = []
    for network in ("vgg16", "alexnet"):
        layers, rows, batch = eyeriss(network)
        costs = replace(model, batch=batch).layer_costs(LayerTable.of(layers))
        measured = np.array([float(row[("processing_ms", "total_ms")[column]]) for row in rows])
        errors.append(np.abs(eyeriss_columns(costs, batch)[:, column] / measured - 1))
    return float(np.concatenate(errors).mean())


def bit_serial() -> None:
    """HAQ's released table against the inferred accelerator, by class of layers."""
    rows = rows_of("haq_cloud.csv")
    pairs = [(w, a) for w in range(1, 9) for a in range(1, 9)]
    layers = [haq_layer(row, Bits(w, a)) for row in rows for w, a in pairs]
    costs = load_target("bismo-cloud", batch=16).layer_costs(LayerTable.of(layers))
    ours = costs.extra["cycles"].reshape(len(rows), -1) * 16
    error = ours / np.array([[int(row[f"w{w}a{a}"]) for w, a in pairs] for row in rows]) - 1
    classes = np.array([haq_class(row) for row in rows])
    classes[[0, -1]] = "first and last"
    print("\n| layers | number | mean error | median | range |\n|---|---|---|---|---|")
    for name in [*dict.fromkeys(classes.tolist()), ""]:
        part = error[classes == name] if name else error
        size = np.abs(part)
        print(
            f"| {name or 'all'} | {len(part)} | {size.mean():.1%} | {np.median(size):.1%} "
            f"| {part.min():+.0%} to {part.max():+.0%} |"
        )


def haq_class(row: dict[str, str]) -> str:
    """Depthwise, or pointwise by size."""
    size = int(row["in_hw"])
    return "depthwise 3x3" if int(row["groups"]) > 1 else f"1x1, {'56 and larger' if size >= 56 else size}"


def haq_layer(row: dict[str, str], bits: Bits) -> LayerSpec:
    """A layer of MobileNetV2 as in HAQ's table."""
    size, kernel, stride = (int(row[name]) for name in ("in_hw", "kernel", "stride"))
    out = -(-size // stride)
    return LayerSpec(
        row["layer"],
        "linear" if row["layer"] == "fc" else "conv",
        int(row["inputs"]),
        int(row["outputs"]),
        (kernel, kernel),
        (stride, stride),
        int(row["groups"]),
        (size, size),
        (out, out),
        bits=bits,
    )


def finn() -> None:
    """The quick price of CNV against the exact folding."""
    print("\n| target | bits | price | exact | ratio |\n|---|---|---|---|---|")
    for target in ("finn-zynq7020", "finn-zcu102", "finn-u250"):
        model = load_target(target)
        assert isinstance(model, FinnDataflow)
        for bits in (1, 2, 4, 8):
            graph = cnv(bits)
            price = model(graph)["latency_ms"]
            try:
                exact = model.folding(graph).interval_cycles / (model.clock_mhz * 1e3)
                print(f"| {target} | {bits} | {price:.4f} | {exact:.4f} | {price / exact:.2f} |")
            except InfeasibleBudgetError:
                print(f"| {target} | {bits} | {price:.4g} (penalty) | - | |")


def cnv(bits: int) -> LayerGraph:
    """BNN-PYNQ's CNV network; its image has 8 bits."""
    convs = ((3, 64, 32), (64, 64, 30), (64, 128, 14), (128, 128, 12), (128, 256, 5), (256, 256, 3))
    layers = [
        LayerSpec(
            f"conv{i}",
            "conv",
            inputs,
            outputs,
            (3, 3),
            in_hw=(size, size),
            out_hw=(size - 2, size - 2),
            bits=Bits(bits, bits if i else 8),
        )
        for i, (inputs, outputs, size) in enumerate(convs)
    ]
    linears = ((256, 512), (512, 512), (512, 64))
    layers += [LayerSpec(f"fc{i}", "linear", *s, bits=Bits(bits, bits)) for i, s in enumerate(linears)]
    return LayerGraph(tuple(layers), input_shape=(3, 32, 32))


def lookup() -> None:
    """Regression of ProxylessNAS' blocks layer by layer, every fourth one left out of the fit."""
    comment, header, *rows = (GOLDEN / "proxylessnas_mobile.csv").read_text(encoding="utf-8").splitlines()
    pairs = list(zip(*phone_blocks(), strict=True))
    print()
    for fold in range(4):
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "kept.csv"
            kept.write_text("\n".join([comment, header, *(r for i, r in enumerate(rows) if i % 4 != fold)]))
            model = Lookup("phone", str(kept), missing="regress")
        left_out = pairs[fold::4]
        ours = [model.layer_costs(LayerTable.of(block)).latency_ms.sum() for block, _ in left_out]
        summary(f"lookup, fold {fold}", np.array(ours) / [time for _, time in left_out] - 1)


if __name__ == "__main__":
    phone()
    bandwidths = ["activation_gb_per_s", "weight_gb_per_s", "overhead_us"]
    tx2 = Roofline("jetson-tx2", 250, 50, 250, 30.0, 40.0, 1000, dram_pj_per_bit=20.0, batch=16)
    gpu(tx2, {"tx2_fp32_ms": Bits()}, ["dense_gmacs_per_s", *bandwidths], peak=58.4)
    titan = Roofline("titan-x-pascal", 7000, 107, 2400, 100.0, 300.0, 28, 20.0, int8_speedup=2.5, batch=16)
    rates = ["dense_gmacs_per_s", "linear_gmacs_per_s", "int8_speedup"]
    gpu(titan, {"titanx_fp32_ms": Bits(), "titanx_int8_ms": Bits(8, 8)}, [*rates, *bandwidths], peak=480)
    tx2_power()
    row_stationary()
    bit_serial()
    finn()
    lookup()
