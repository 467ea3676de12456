"""Tables of measured layers and blocks: reading them, checking them row by row, and fitting a regression."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from autocompress.core.graph import LayerSpec
from autocompress.hardware_sim.table import Floats, Ints

LAYER_COLUMNS = (
    *("in_channels", "out_channels", "kernel", "stride", "groups", "in_h", "in_w"),
    *("weight_bits", "act_bits"),
)
"""Facts that name a layer in a table; kernel and stride are those of a square window, 1 for linear layers."""
BLOCK_COLUMNS = ("op", "input", "output", "expand", "kernel", "stride", "mean_ms")
"""Columns of ProxylessNAS' block tables; further ones are not read."""
MAX_BYTES = 50_000_000
FLOAT_BITS = 32
_SHOWN_FAULTS = 20

Facts = tuple[int, ...]
"""One layer as the numbers of :data:`LAYER_COLUMNS`."""


@dataclass(frozen=True)
class Entry:
    """One measurement: one layer, or the layers of one block in order."""

    layers: tuple[Facts, ...]
    latency: float
    energy_mj: float | None = None


@dataclass(frozen=True)
class MeasuredTable:
    """A table and where it comes from.

    Args:
        source: who measured what on which machine.
        entries: at least one; all or none have an energy.
    """

    source: str
    entries: tuple[Entry, ...]

    @property
    def has_energy(self) -> bool:
        """Whether the table gives energies."""
        return self.entries[0].energy_mj is not None


def read_table(path: str | Path) -> MeasuredTable:
    """Read measurements from CSV or JSON.

    A CSV file starts with ``# source: ...``; a JSON file is ``{"source": ..., "rows": [{...}, ...]}``. Rows
    have either the columns of :data:`LAYER_COLUMNS` with ``latency_ms`` and, in all rows or none,
    ``energy_mj``; or ProxylessNAS' :data:`BLOCK_COLUMNS`, whose blocks are taken to be 32-bit layers.

    Raises:
        ValueError: no such file, no source, missing columns, or wrong rows; every fault names its row,
            counted from 1 without comments and header.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no measurement table {str(path)!r}; give a path from the working directory")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a measurement table")
    source, rows = _read_json(path) if path.suffix == ".json" else _read_csv(path)
    if not source.strip():
        raise ValueError(f"{path}: no source; start the CSV with '# source: ...' or give \"source\" in JSON")
    if not rows:
        raise ValueError(f"{path}: has no rows")
    return MeasuredTable(source, _entries(path, rows))


def bit_table_rows(costs: Ints | Floats, layers: Sequence[LayerSpec]) -> list[dict[str, float]]:
    """HAQ's ``[layer][weight bits - 1][activation bits - 1]`` table as rows that :func:`read_table` takes.

    Args:
        costs: shape (number of layers, W, A); taken as ``latency_ms`` in whatever unit they have.
        layers: the network the table was made for, in order.

    Raises:
        ValueError: as many layers as the table has are needed, with square windows.
    """
    if costs.ndim != 3 or len(costs) != len(layers):
        raise ValueError(f"a table of shape (layers, W, A) for {len(layers)} layers, got shape {costs.shape}")
    skewed = [layer.name for layer in layers if len({*layer.kernel}) > 1 or len({*layer.stride}) > 1]
    if skewed:
        raise ValueError(f"tables name layers by square windows; {', '.join(skewed)} have others")
    return [
        dict(zip(LAYER_COLUMNS, (*facts_of(layer), weight, act), strict=True)) | {"latency_ms": float(cost)}
        for layer, of_layer in zip(layers, costs, strict=True)
        for weight, of_weight in enumerate(of_layer, start=1)
        for act, cost in enumerate(of_weight, start=1)
    ]


def facts_of(layer: LayerSpec) -> Facts:
    """A layer's facts without its bits."""
    return (
        *(layer.in_channels, layer.out_channels, layer.kernel[0], layer.stride[0], layer.groups),
        *layer.in_hw,
    )


@dataclass(frozen=True)
class Regression:
    """``log(cost) = offset + sum(exponent * log(feature))`` with exponents that are not negative.

    Features are MACs, bits of activations (in and out) and bits of weights, so that the regression never
    gives a larger layer a smaller cost.
    """

    offset: float
    exponents: tuple[float, float, float]

    @classmethod
    def fit(cls, features: Floats, costs: Floats) -> Regression:
        """Least squared log error.

        Args:
            features: shape (N, 3), positive.
            costs: shape (N,), positive.
        """
        logs, ones = np.log(features), np.ones((len(costs), 1))
        solved, _ = nnls(np.hstack([logs, ones, -ones]), np.log(costs))
        return cls(float(solved[3] - solved[4]), (float(solved[0]), float(solved[1]), float(solved[2])))

    def predict(self, features: Floats) -> Floats:
        """Costs of shape (N,) for features of shape (N, 3)."""
        return np.asarray(np.exp(self.offset + np.log(features) @ np.array(self.exponents)))


def entry_features(entry: Entry) -> tuple[float, float, float]:
    """MACs, activation bits and weight bits of an entry; output sizes are input sizes over the stride."""
    totals = np.zeros(3)
    for inputs, outputs, kernel, stride, groups, in_h, in_w, weight_bits, act_bits in entry.layers:
        pixels = math.ceil(in_h / stride) * math.ceil(in_w / stride)
        weights = outputs * (inputs // groups) * kernel**2
        moved = inputs * in_h * in_w + outputs * pixels
        totals += (weights * pixels, moved * act_bits, weights * weight_bits)
    return float(totals[0]), float(totals[1]), float(totals[2])


def _read_csv(path: Path) -> tuple[str, list[Mapping[str, Any]]]:
    text = _text_of(path).splitlines()
    comments = [line.lstrip("# ") for line in text if line.startswith("#")]
    sources = [line.partition(":")[2] for line in comments if line.lower().startswith("source:")]
    rows = list(csv.DictReader(line for line in text if line.strip() and not line.startswith("#")))
    return (sources[0] if sources else ""), list(rows)


def _read_json(path: Path) -> tuple[str, list[Mapping[str, Any]]]:
    try:
        data = json.loads(_text_of(path))
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path}: cannot be read as JSON: {fault}") from fault
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path}: must be {{"source": "...", "rows": [{{...}}, ...]}}')
    return str(data.get("source", "")), rows


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path}: is not UTF-8 text: {fault}") from fault


def _entries(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    blocks = "op" in rows[0]
    required = BLOCK_COLUMNS if blocks else (*LAYER_COLUMNS, "latency_ms")
    lacking = [name for name in required if name not in rows[0]]
    if lacking:
        raise ValueError(f"{path}: lacks the columns {', '.join(lacking)}; it needs {', '.join(required)}")
    faults: list[str] = []
    entries: dict[tuple[Facts, ...], tuple[int, Entry]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            entry = _block_entry(row) if blocks else _layer_entry(row)
            first, known = entries.setdefault(entry.layers, (number, entry))
            if known != entry:
                raise ValueError(f"repeats row {first} with another measurement")
        except (ValueError, TypeError) as fault:
            faults.append(f"{path}: row {number}: {fault}")
    if not faults and len({entry.energy_mj is None for _, entry in entries.values()}) > 1:
        faults.append(f"{path}: energy_mj must be given in all rows or in none")
    if faults:
        more = [f"and {len(faults) - _SHOWN_FAULTS} more rows"] if len(faults) > _SHOWN_FAULTS else []
        raise ValueError("\n".join([*faults[:_SHOWN_FAULTS], *more]))
    return tuple(entry for _, entry in entries.values())


def _layer_entry(row: Mapping[str, Any]) -> Entry:
    facts = tuple(_whole(row, name) for name in LAYER_COLUMNS)
    groups = facts[LAYER_COLUMNS.index("groups")]
    if facts[0] % groups or facts[1] % groups:
        raise ValueError(f"groups must divide {facts[0]} and {facts[1]} channels, got {groups}")
    if max(facts[-2:]) > FLOAT_BITS:
        raise ValueError(f"bits must be between 1 and {FLOAT_BITS}, got {facts[-2]} and {facts[-1]}")
    energy = row.get("energy_mj")
    return Entry(
        (facts,), _positive(row, "latency_ms"), None if energy in (None, "") else _positive(row, "energy_mj")
    )


def _block_entry(row: Mapping[str, Any]) -> Entry:
    """The layers of a ProxylessNAS row: stem, 1x1 convolution, classifier, or inverted residual block."""
    source, target = _sizes(row, "input"), _sizes(row, "output")
    bits, latency = (FLOAT_BITS, FLOAT_BITS), _positive(row, "mean_ms")
    if row["op"] == "Logits":
        return Entry(((source[-1], target[-1], 1, 1, 1, 1, 1, *bits),), latency)
    if len(source) != 3 or len(target) != 3:
        raise ValueError(f"input and output must be HxWxC, got {row['input']} and {row['output']}")
    height, width, channels = source
    if target[0] > height:
        raise ValueError(f"output must not be larger than input, got {row['input']} and {row['output']}")
    stride, out = height // target[0], target[2]
    if row["op"] in ("Conv", "Conv_1"):
        kernel = 3 if row["op"] == "Conv" else 1
        return Entry(((channels, out, kernel, stride, 1, height, width, *bits),), latency)
    if row["op"] != "expanded_conv":
        raise ValueError(f"op must be Conv, Conv_1, Logits or expanded_conv, got {row['op']!r}")
    wide, kernel = channels * _whole(row, "expand"), _whole(row, "kernel")
    layers = [
        (channels, wide, 1, 1, 1, height, width, *bits),
        (wide, wide, kernel, _whole(row, "stride"), wide, height, width, *bits),
        (wide, out, 1, 1, 1, target[0], target[1], *bits),
    ]
    return Entry(tuple(layers if wide != channels else layers[1:]), latency)


def _whole(row: Mapping[str, Any], name: str) -> int:
    value = _positive(row, name)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {row[name]}")
    return int(value)


def _positive(row: Mapping[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{name} must be a number, got {row.get(name)!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a number > 0, got {row[name]}")
    return value


def _sizes(row: Mapping[str, Any], name: str) -> list[int]:
    parts = str(row[name]).split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be HxWxC or C, got {row[name]!r}")
    return [int(part) for part in parts]
