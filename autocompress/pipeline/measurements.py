"""Measured latencies of layers and networks, as CSV: of this machine, or of a device elsewhere."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from autocompress.core.errors import DataError
from autocompress.core.files import write_atomically
from autocompress.core.graph import Bits, LayerSpec

_SIZES = ("in_channels", "out_channels", "kernel_h", "kernel_w", "stride_h", "stride_w", "groups")
_PIXELS = ("in_h", "in_w", "out_h", "out_w")
COLUMNS = ("network", "layer", "kind", *_SIZES, *_PIXELS, "bits", "latency_ms")
"""One row per layer; a row of kind ``network`` has only network, bits and latency_ms, from end to end."""

BITS = (8, 16, 32)
"""Precisions a measured target can have."""
MAX_ROWS = 1_000_000


@dataclass(frozen=True)
class Measurement:
    """One layer of one network, its precision in ``layer.bits``, and its latency for one sample."""

    network: str
    layer: LayerSpec
    latency_ms: float


@dataclass(frozen=True)
class Measurements:
    """What was measured.

    Args:
        layers: every layer of every network, at each precision.
        networks: (network, bits) -> latency in milliseconds from end to end, where it was measured.
    """

    layers: tuple[Measurement, ...]
    networks: Mapping[tuple[str, int], float] = field(default_factory=dict)


def write_measurements(measurements: Measurements, path: Path, *, source: str) -> None:
    """Write the CSV that :func:`read_measurements` reads, under a comment that says where it comes from.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    file = io.StringIO(newline="")
    file.write(f"# source: {source}\n")
    rows = csv.DictWriter(file, COLUMNS)
    rows.writeheader()
    for m in measurements.layers:
        spec = m.layer
        sizes = (spec.in_channels, spec.out_channels, *spec.kernel, *spec.stride, spec.groups)
        rows.writerow(
            {"network": m.network, "layer": spec.name, "kind": spec.kind}
            | dict(zip(_SIZES, sizes, strict=True))
            | dict(zip(_PIXELS, (*spec.in_hw, *spec.out_hw), strict=True))
            | {"bits": spec.bits.weight, "latency_ms": f"{m.latency_ms:.6g}"}
        )
    for (network, bits), latency_ms in measurements.networks.items():
        row = {"network": network, "kind": "network", "bits": bits, "latency_ms": f"{latency_ms:.6g}"}
        rows.writerow(row)
    write_atomically(path, file.getvalue().encode())


def read_measurements(path: Path) -> Measurements:
    """The measurements in a CSV with the columns :data:`COLUMNS`; lines that start with # are comments.

    Raises:
        DataError: no such file, columns missing, or rows with values that cannot be; all faults at once.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(line for line in file if not line.startswith("#"))
            rows = [row for _, row in zip(range(MAX_ROWS + 1), reader, strict=False)]
            columns = tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise DataError(f"{path}: cannot be read as CSV: {fault}") from fault
    if missing := [name for name in COLUMNS if name not in columns]:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}; needed are {', '.join(COLUMNS)}")
    if not rows or len(rows) > MAX_ROWS:
        raise DataError(f"{path}: must have from 1 to {MAX_ROWS:,} rows below the header")
    layers: list[Measurement] = []
    networks: dict[tuple[str, int], float] = {}
    faults: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            latency = _positive(row, "latency_ms", float)
            if (bits := _positive(row, "bits", int)) not in BITS:
                raise ValueError(f"bits must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, got {bits}")
            if row["kind"] == "network":
                networks[row["network"], bits] = latency
            else:
                layers.append(
                    Measurement(row["network"], replace(_layer(row), bits=Bits(bits, bits)), latency)
                )
        except ValueError as fault:
            faults.append(f"{path}: row {number}: {fault}")
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError("\n".join(faults[:20]) + more)
    return Measurements(tuple(layers), networks)


def _layer(row: Mapping[str, str]) -> LayerSpec:
    if row["kind"] not in ("conv", "linear"):
        raise ValueError(f"kind must be conv, linear or network, got {row['kind']!r}")
    size = {name: _positive(row, name, int) for name in (*_SIZES, *_PIXELS)}
    if size["in_channels"] % size["groups"] or size["out_channels"] % size["groups"]:
        raise ValueError(f"channels must be multiples of groups={size['groups']}")
    return LayerSpec(
        row["layer"],
        "conv" if row["kind"] == "conv" else "linear",
        size["in_channels"],
        size["out_channels"],
        (size["kernel_h"], size["kernel_w"]),
        (size["stride_h"], size["stride_w"]),
        size["groups"],
        in_hw=(size["in_h"], size["in_w"]),
        out_hw=(size["out_h"], size["out_w"]),
    )


_Number = TypeVar("_Number", int, float)


def _positive(row: Mapping[str, str], name: str, kind: Callable[[str], _Number]) -> _Number:
    text = row[name] or ""
    try:
        value = kind(text)
    except ValueError:
        value = kind("0")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{name} must be {'a whole number' if kind is int else 'a number'} > 0, got {text!r}"
        )
    return value
