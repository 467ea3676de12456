"""Measure a machine and fit the target file that predicts it."""

from __future__ import annotations

import io
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML
from scipy.optimize import nnls

from autocompress.core.errors import DataError, ExportError, RecipeError
from autocompress.core.files import write_atomically
from autocompress.core.graph import Bits
from autocompress.export.layer_bench import PRECISIONS, Chain, Timing, chain_model, time_networks
from autocompress.hardware_sim.measured import BETWEEN, TERMS, Measured, kinds, terms
from autocompress.hardware_sim.table import LayerTable
from autocompress.pipeline.measurements import (
    Measurement,
    Measurements,
    read_measurements,
    write_measurements,
)
from autocompress.pipeline.profile_networks import measured_networks
from autocompress.pipeline.progress import Event, OnEvent, silent

NUM_NETWORKS, RUNS = 36, 25
QUICK_NUM_NETWORKS, QUICK_RUNS = 18, 10

_FEWEST_NETWORKS = 3
_FEWEST_ROWS = 6  # of one kind of layer at one precision
_REWEIGHTINGS = 8
_SMALL_ERROR = 0.03  # errors below this weigh like in least squares, above it like in least absolute errors

Floats = NDArray[np.float64]
Constants = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Profile:
    """A fitted machine.

    Args:
        model: the predictor; its ``held_out_error`` is that of networks left out of the fit one by one.
        about: what was measured, how and when.
    """

    model: Measured
    about: str


def measure_machine(
    *, num_networks: int = NUM_NETWORKS, runs: int = RUNS, threads: int = 1, on_event: OnEvent = silent
) -> Measurements:
    """Measure seeded networks of every family on this machine's CPU, in float and in int8.

    Args:
        num_networks: networks to measure.
        runs: timed runs of each.
        threads: ONNX Runtime's threads within an operator.
        on_event: told about every round.

    Raises:
        ExportError: ONNX Runtime cannot run a network, or runs it as other layers than it has.
    """
    chains = measured_networks(num_networks)
    layers: list[Measurement] = []
    networks: dict[tuple[str, int], float] = {}
    for bits in PRECISIONS:
        stage = f"measure {'float' if bits == 32 else f'int{bits}'}"
        timings = time_networks(
            {name: chain_model(chain, bits=bits) for name, chain in chains.items()},
            runs=runs,
            threads=threads,
            on_round=_rounds_of(stage, on_event),
        )
        measured = as_measurements(chains, timings, bits=bits)
        layers += measured.layers
        networks |= measured.networks
    return Measurements(tuple(layers), networks)


def _rounds_of(stage: str, on_event: OnEvent) -> Callable[[int, int], None]:
    return lambda done, total: on_event(Event(stage, done, total))


def as_measurements(chains: Mapping[str, Chain], timings: Mapping[str, Timing], *, bits: int) -> Measurements:
    """The timings of some chains with the layers they belong to.

    Raises:
        ExportError: ONNX Runtime ran a chain as other layers than it has.
    """
    layers = []
    for name, chain in chains.items():
        latencies = _latencies(timings[name], len(chain.layers), name)
        layers += [
            Measurement(name, replace(layer, bits=Bits(bits, bits)), latency)
            for layer, latency in zip(chain.layers, latencies, strict=True)
        ]
    return Measurements(tuple(layers), {(name, bits): timings[name].network_ms for name in chains})


def _latencies(timing: Timing, num_layers: int, name: str) -> list[float]:
    """Times in the order of the layers; the runtime swaps parallel branches."""
    numbers = [int(found[1]) for found in map(re.compile(r"layer(\d+)_").search, timing.names) if found]
    if sorted(numbers) != list(range(num_layers)) or len(timing.layer_ms) != num_layers:
        raise ExportError(
            f"ONNX Runtime ran {len(timing.layer_ms)} layers of {name}, which has {num_layers}; "
            "its graph optimisations differ from the ones this measurement knows: use another version"
        )
    return [timing.layer_ms[place] for place in np.argsort(numbers)]


def fit_profile(measurements: Measurements, *, name: str, about: str) -> Profile:
    """Fit the predictor to measurements, and its error on networks it has not seen.

    Raises:
        DataError: fewer than 3 networks at a precision, or a kind of layer with too few rows to fit.
    """
    by_bits: dict[int, list[Measurement]] = defaultdict(list)
    for measurement in measurements.layers:
        by_bits[measurement.layer.bits.weight].append(measurement)
    tables = {bits: _Table.of(rows, measurements, bits) for bits, rows in sorted(by_bits.items())}
    if faults := [f"{bits} bits: {fault}" for bits, table in tables.items() for fault in table.faults()]:
        raise DataError("; ".join(faults))
    fitted = {bits: table.fit() for bits, table in tables.items()}
    errors = {bits: table.held_out_error() for bits, table in tables.items()}
    model = Measured(
        name=name,
        ns_per={bits: constants for bits, (constants, _) in fitted.items()},
        between_ns_per={bits: between for bits, (_, between) in fitted.items()},
        held_out_error=errors,
    )
    return Profile(model, about)


@dataclass(frozen=True, eq=False)
class _Table:
    """Measurements at one precision as arrays; ``network`` numbers each row's network."""

    values: Floats
    kind: NDArray[np.str_]
    measured_ns: Floats
    network: NDArray[np.int64]
    network_ns: Floats

    @classmethod
    def of(cls, rows: list[Measurement], measurements: Measurements, bits: int) -> _Table:
        names = list(dict.fromkeys(row.network for row in rows))
        layers = LayerTable.of([row.layer for row in rows])
        whole = [measurements.networks.get((name, bits), np.nan) for name in names]
        kind = kinds(layers)
        if 0 < (kind == "stem").sum() < _FEWEST_ROWS:
            kind = np.where(kind == "stem", "dense", kind)
        return cls(
            terms(layers, bits=bits),
            kind,
            np.array([row.latency_ms for row in rows]) * 1e6,
            np.array([names.index(row.network) for row in rows], dtype=np.int64),
            np.array(whole, dtype=np.float64) * 1e6,
        )

    def faults(self) -> list[str]:
        faults = []
        if len(self.network_ns) < _FEWEST_NETWORKS:
            faults.append(
                f"held-out errors need at least {_FEWEST_NETWORKS} networks, got {len(self.network_ns)}"
            )
        for kind in np.unique(self.kind):
            if (count := int((self.kind == kind).sum())) < _FEWEST_ROWS:
                faults.append(f"{kind} layers need at least {_FEWEST_ROWS} rows, got {count}")
        return faults

    def fit(self, held_out: int = -1) -> tuple[Constants, dict[str, float]]:
        """Constants of every kind and between layers, from all networks but one."""
        used = self.network != held_out
        constants = {}
        for kind in map(str, np.unique(self.kind[used])):
            rows = used & (self.kind == kind)
            solved = _fit_ratios(self.values[rows], self.measured_ns[rows])
            constants[kind] = {t: _rounded(c) for t, c in zip(TERMS, solved, strict=True) if c > 0}
        return constants, self._fit_between(held_out)

    def _fit_between(self, held_out: int) -> dict[str, float]:
        """Constants of what networks take beyond their layers; none where no whole network was measured."""
        whole = np.isfinite(self.network_ns) & (np.arange(len(self.network_ns)) != held_out)
        if not whole.any():
            return {}
        sums = self._per_network(self.values[:, [TERMS.index(term) for term in BETWEEN]])
        gap = np.maximum(0.0, self.network_ns - self._per_network(self.measured_ns[:, None])[:, 0])
        share = self.network_ns[whole]
        solved, _ = nnls(sums[whole] / share[:, None], gap[whole] / share)
        return {term: _rounded(c) for term, c in zip(BETWEEN, solved, strict=True) if c > 0}

    def _per_network(self, columns: Floats) -> Floats:
        sums = np.zeros((len(self.network_ns), columns.shape[1]))
        np.add.at(sums, self.network, columns)
        return sums

    def held_out_error(self) -> dict[str, float]:
        """Median absolute relative error of layers and networks, each network left out of the fit in turn."""
        predicted = np.full(len(self.measured_ns), np.nan)
        between = np.zeros(len(self.network_ns))
        for number in range(len(self.network_ns)):
            constants, gaps = self.fit(held_out=number)
            here = self.network == number
            for kind, cell in constants.items():
                rows = here & (self.kind == kind)
                predicted[rows] = self.values[rows] @ [cell.get(term, 0.0) for term in TERMS]
            columns = self.values[here][:, [TERMS.index(term) for term in BETWEEN]]
            between[number] = (columns @ [gaps.get(term, 0.0) for term in BETWEEN]).sum()
        layer = np.abs(predicted / self.measured_ns - 1)
        sums = self._per_network(np.stack([predicted, self.measured_ns], axis=1))
        whole = np.where(np.isfinite(self.network_ns), self.network_ns, sums[:, 1])
        network = np.abs((sums[:, 0] + np.where(np.isfinite(self.network_ns), between, 0.0)) / whole - 1)
        return {
            "layer": round(float(np.nanmedian(layer)), 4),
            "network": round(float(np.nanmedian(network)), 4),
        }


def _fit_ratios(values: Floats, measured: Floats) -> Floats:
    """Constants >= 0 with small relative errors, by re-weighted non-negative least squares.

    Weights fall with the error, so that single bad measurements do not pull the fit.
    """
    scale = np.maximum(values.max(axis=0), 1e-12)
    ratios = values / scale / measured[:, None]
    weights = np.ones(len(measured))
    for _ in range(_REWEIGHTINGS):
        solved, _ = nnls(ratios * weights[:, None], weights)
        error = np.abs(ratios @ solved - 1)
        weights = 1 / np.sqrt(np.maximum(error, _SMALL_ERROR))
    return np.asarray(solved / scale)


def _rounded(constant: float) -> float:
    return float(f"{constant:.6g}")


def describe_machine(*, threads: int) -> str:
    """One sentence on what was measured, on what and when."""
    import onnxruntime

    return (
        f"Measured on {_processor()} with {threads} thread{'s' if threads > 1 else ''} of ONNX Runtime "
        f"{onnxruntime.__version__} on {time.strftime('%Y-%m-%d')}, at batch 1."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()} ({platform.system()})"


def profile_machine(
    target: str, path: Path, *, threads: int = 1, quick: bool = False, on_event: OnEvent = silent
) -> Profile:
    """Measure this machine and write its target file, and the measurements beside it as CSV.

    Args:
        target: name of the target.
        path: of the target file.
        threads: ONNX Runtime's threads within an operator.
        quick: fewer networks and runs.
        on_event: told about every round.

    Raises:
        RecipeError: threads below 1.
        RunDirectoryError: a file cannot be written.
    """
    num_networks, runs = (QUICK_NUM_NETWORKS, QUICK_RUNS) if quick else (NUM_NETWORKS, RUNS)
    measurements = measure_machine(num_networks=num_networks, runs=runs, threads=threads, on_event=on_event)
    fitted = fit_profile(measurements, name=target, about=describe_machine(threads=threads))
    write_target(fitted, path)
    write_measurements(measurements, path.with_suffix(".csv"), source=fitted.about)
    return fitted


def profile_measurements(target: str, path: Path, measured: Path) -> Profile:
    """Fit measurements of a device elsewhere and write its target file.

    Raises:
        DataError: the measurements are wrong or too few.
        RunDirectoryError: the file cannot be written.
    """
    about = f"Fitted on {time.strftime('%Y-%m-%d')} to the measurements in {measured.name}."
    fitted = fit_profile(read_measurements(measured), name=target, about=about)
    write_target(fitted, path)
    return fitted


def default_path(target: str) -> Path:
    """Where the target file of that name goes: the current folder.

    Raises:
        RecipeError: a name that is no plain file name.
    """
    if not re.fullmatch(r"\w[\w.-]*", target):
        raise RecipeError(f"target must be a name of letters, digits, '-', '_' and '.', got {target!r}")
    return Path(f"{target}.yaml")


def write_target(profile: Profile, path: Path) -> None:
    """Write the target file, for ``--target`` and for others.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    source = f"fitted by autocompress profile: {profile.about}"
    constants: Mapping[str, Any] = {
        "ns_per": profile.model.ns_per,
        "between_ns_per": profile.model.between_ns_per,
        "held_out_error": profile.model.held_out_error,
    }
    data = {
        "name": profile.model.name,
        "model": "measured",
        "about": profile.about,
        "constants": {key: {"value": value, "source": source} for key, value in constants.items()},
    }
    yaml = YAML()
    yaml.width = 110
    text = io.StringIO()
    yaml.dump(data, text)
    write_atomically(path, text.getvalue().encode())
