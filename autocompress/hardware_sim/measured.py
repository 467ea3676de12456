"""Latency on a machine that was measured: a non-negative sum of terms per kind of layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Metric
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable

KINDS = ("stem", "dense", "pointwise", "depthwise", "grouped", "linear")
"""Layers whose times follow different constants. ``stem`` has at most three input channels, as on images;
``linear`` is one token, more are like ``pointwise``."""
STEM_CHANNELS = 3

TERMS = (
    "layer",
    "pixels",
    "window_values",
    "padded_macs",
    "gemm_macs",
    "edge_macs",
    "padded_outputs",
    "input_bytes",
    "output_bytes",
    "weight_bytes",
    "bytes_beyond_4_mib",
)
"""What a layer's time is a sum of; none falls when channels, bits or pixels grow."""

MEMORY_TERMS = tuple(term for term in TERMS if "bytes" in term)
BETWEEN = ("layer", "output_bytes")
"""What the time between layers (pooling, addition, concatenation, dispatch) is a sum of."""

_BLOCK = 16  # channels that ONNX Runtime's convolutions on x86 with AVX-512 work on at once
_CELL = Mapping[str, float]


def kinds(table: LayerTable) -> NDArray[np.str_]:
    """The kind of every layer, one of :data:`KINDS`."""
    full = np.where(table.in_channels <= STEM_CHANNELS, "stem", "dense")
    conv = np.where(table.kernel_h * table.kernel_w == 1, "pointwise", full)
    conv = np.where(table.depthwise, "depthwise", np.where(table.groups > 1, "grouped", conv))
    tokens = table.out_h * table.out_w
    return np.asarray(np.where(table.linear == 1, np.where(tokens == 1, "linear", "pointwise"), conv))


def terms(table: LayerTable, *, bits: int, batch: int = 1) -> Floats:
    """The terms of every layer for a whole batch, shape (N, number of terms).

    Args:
        table: N layers.
        bits: of the kernel that runs them, in whole bytes.
        batch: samples.
    """
    pixels = batch * table.out_h * table.out_w
    window = table.kernel_h * table.kernel_w
    inputs, outputs, groups = _padded(table)
    row_edge = batch * table.out_h * np.minimum(table.kernel_w - 1, table.out_w)
    weights = inputs * outputs * groups * window
    width = bits // 8
    read = batch * table.in_channels * table.in_h * table.in_w * width
    written = table.out_channels * pixels * width
    stored = table.kernel_weights * width
    moved = read + written + stored
    columns = {
        "layer": np.ones(len(table)),
        "pixels": pixels,
        "window_values": pixels * window * table.groups,
        "padded_macs": weights * pixels,
        # int8 convolutions are matrix products: only output channels come in blocks.
        "gemm_macs": table.in_channels * outputs * window * pixels,
        # Windows that reach over the left or right edge are computed one by one.
        "edge_macs": weights * row_edge,
        "padded_outputs": groups * outputs * pixels,
        "input_bytes": read,
        "output_bytes": written,
        "weight_bytes": stored,
        "bytes_beyond_4_mib": np.maximum(0, moved - 2**22),
    }
    return np.stack([columns[term] for term in TERMS], axis=1).astype(np.float64)


def _padded(table: LayerTable) -> tuple[Ints, Ints, Ints]:
    """Input and output channels per group, and groups, as the runtime pads them to blocks."""
    inputs, outputs = table.in_channels // table.groups, table.out_channels // table.groups
    blocks = -(-table.groups // _BLOCK)
    wide = np.where(inputs >= _BLOCK, -(-inputs // _BLOCK) * _BLOCK, inputs)
    # A depthwise layer works on one block of groups at a time.
    return (
        np.where(table.depthwise, 1, wide),
        np.where(table.depthwise, _BLOCK * outputs, -(-outputs // _BLOCK) * _BLOCK),
        np.where(table.depthwise, blocks, table.groups),
    )


@dataclass(frozen=True, eq=False)
class Measured(HardwareModel):
    """Latency on one machine and runtime, fitted to measured layers; it has no energy.

    A layer takes the sum of its terms times constants that are not negative, so that a larger layer is never
    cheaper. It runs at the narrowest measured precision that holds its bits, or at a wider one where that is
    faster. A layer with groups is never cheaper than one of its groups alone, a dense one never cheaper than
    a stem of its size; where no stems were measured they are dense layers. Operations between layers are
    charged by the bytes each layer writes. For batches above 1, layers are extrapolated: weights are read
    once, everything else grows with the batch.

    Args:
        ns_per: bits -> kind -> term -> nanoseconds per unit of the term; missing terms count nothing.
        between_ns_per: bits -> term of :data:`BETWEEN` -> nanoseconds per unit.
        held_out_error: bits -> ``layer`` and ``network`` -> median absolute relative error on networks left
            out of the fit.

    Raises:
        ValueError: a kind, term or precision that does not exist, or a constant that is negative.
    """

    kind: ClassVar[str] = "measured"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms",)
    mapping: ClassVar[str] = "as the measured runtime runs it"
    energy_table: ClassVar[str] = "none: latency only was measured"
    channel_step: ClassVar[int] = _BLOCK
    name: str
    ns_per: Mapping[int, Mapping[str, _CELL]]
    between_ns_per: Mapping[int, _CELL]
    held_out_error: Mapping[int, _CELL]
    batch: int = 1

    def __post_init__(self) -> None:
        if faults := _faults(self.ns_per, self.between_ns_per, self.held_out_error):
            raise ValueError("; ".join(faults))

    def scaled(self, factors: Mapping[int, float]) -> Measured:
        """The same machine with all times of a precision multiplied.

        Args:
            factors: bits -> factor; 1 where a precision is not named.

        Raises:
            ValueError: a factor is not positive and finite, or of a precision that was not measured.
        """
        faults = [
            f"factor of {bits} bits must be > 0 and finite, got {factor}"
            for bits, factor in factors.items()
            if not 0 < factor < math.inf
        ]
        faults += [f"{bits} bits were not measured" for bits in factors if bits not in self.ns_per]
        if faults:
            raise ValueError("; ".join(faults))

        def times(cell: _CELL, bits: int) -> _CELL:
            return {term: constant * factors.get(bits, 1.0) for term, constant in cell.items()}

        return replace(
            self,
            ns_per={
                bits: {kind: times(cell, bits) for kind, cell in cells.items()}
                for bits, cells in self.ns_per.items()
            },
            between_ns_per={bits: times(cell, bits) for bits, cell in self.between_ns_per.items()},
        )

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Latency of every layer; ``extra`` splits it into ``kernel_ms`` and ``between_ms``.

        Raises:
            UnsupportedLayerError: transposed convolutions, a kind that was not measured, or more bits than
                any measured precision has.
        """
        needed = np.maximum(table.weight_bits, table.act_bits)
        self._check(table, needed)
        precisions = sorted(self.ns_per)
        # Axes: precision; nanoseconds within layers, of these in memory, between layers; layer.
        costs = np.stack([self._at(table, bits) for bits in precisions])
        too_narrow = np.array(precisions)[:, None] < needed
        whole = np.where(too_narrow, np.inf, costs[:, 0] + costs[:, 2])
        chosen = whole.argmin(axis=0)
        kernel, memory, between = costs[chosen, :, np.arange(len(table))].T
        latency = kernel + between
        ns_per_mac = np.array([_fastest(self.ns_per[bits]) for bits in precisions])[chosen]
        return LayerCosts(
            latency_ms=latency * 1e-6,
            utilisation=np.minimum(1.0, table.macs * ns_per_mac / latency),
            memory_bound=memory > 0.5 * latency,
            extra={"kernel_ms": kernel * 1e-6, "between_ms": between * 1e-6},
        )

    def _at(self, table: LayerTable, bits: int) -> Floats:
        """Nanoseconds per sample within layers, of these in memory, and between layers: shape (3, N)."""
        values = terms(table, bits=bits, batch=self.batch)
        kernel = self._kernel(table, bits)
        memory = self._sum(values, kinds(table), bits, MEMORY_TERMS)
        alone = self._kernel(_smallest_part(table), bits)
        kernel = np.where(np.isfinite(alone), np.maximum(kernel, alone), kernel)
        constants = self.between_ns_per.get(bits, {})
        between = sum(
            (constants.get(t, 0.0) * values[:, TERMS.index(t)] for t in BETWEEN), np.zeros(len(table))
        )
        return np.stack([kernel, memory, between]) / self.batch

    def _kernel(self, table: LayerTable, bits: int) -> Floats:
        """Nanoseconds within layers for the batch, before groups are compared with one of them."""
        kind = kinds(table)
        kernel = self._sum(terms(table, bits=bits, batch=self.batch), kind, bits, TERMS)
        few = np.minimum(table.in_channels, np.where(kind == "dense", STEM_CHANNELS, table.in_channels))
        stems = replace(table, in_channels=few)
        stem = self._sum(terms(stems, bits=bits, batch=self.batch), kinds(stems), bits, TERMS)
        return np.where(np.isfinite(stem), np.maximum(kernel, stem), kernel)

    def _sum(self, values: Floats, kind: NDArray[np.str_], bits: int, counted: tuple[str, ...]) -> Floats:
        """The counted terms' nanoseconds for the batch; infinite where the kind was not measured."""
        total = np.full(len(values), np.inf)
        cells = self.ns_per[bits]
        for name in KINDS:
            cell = cells.get(name, cells.get("dense") if name == "stem" else None)
            if cell is not None:
                constants = np.array([cell.get(term, 0.0) if term in counted else 0.0 for term in TERMS])
                total[kind == name] = values[kind == name] @ constants
        return total

    def _check(self, table: LayerTable, needed: Ints) -> None:
        kind = kinds(table)
        known = {
            name: max((b for b, cells in self.ns_per.items() if name in cells), default=0) for name in KINDS
        }
        known["stem"] = max(known["stem"], known["dense"])
        refuse(
            (table.transposed == 1, f"transposed convolutions were not measured on {self.name}"),
            *(
                (
                    (kind == name) & (needed > widest) & (table.transposed == 0),
                    f"{name} layers were measured {f'up to {widest} bits' if widest else 'not at all'} on "
                    f"{self.name}; give them fewer bits or profile again with such layers",
                )
                for name, widest in known.items()
            ),
        )


def _smallest_part(table: LayerTable) -> LayerTable:
    """One group of every convolution, one token of every linear layer."""
    one = np.ones(len(table), dtype=np.int64)
    pixels = {
        name: np.where(table.linear == 1, one, getattr(table, name))
        for name in ("in_h", "in_w", "out_h", "out_w")
    }
    return replace(
        table,
        groups=one,
        in_channels=table.in_channels // table.groups,
        out_channels=table.out_channels // table.groups,
        **pixels,
    )


def _fastest(cells: Mapping[str, _CELL]) -> float:
    """Nanoseconds per multiply-accumulate of the kind that has the fewest; 0 when none has any."""
    costs = [cell.get("padded_macs", 0.0) + cell.get("gemm_macs", 0.0) for cell in cells.values()]
    return min((cost for cost in costs if cost > 0), default=0.0)


def _faults(ns_per: Any, between_ns_per: Any, held_out_error: Any) -> list[str]:
    """What is wrong with constants that may come from a file."""
    if not isinstance(ns_per, Mapping) or not ns_per:
        return ["ns_per must map bits to kinds of layers, to terms, to nanoseconds"]
    faults: list[str] = []
    for bits, cells in ns_per.items():
        if bits not in (8, 16, 32):
            faults.append(f"ns_per: bits must be 8, 16 or 32, got {bits!r}")
        if not isinstance(cells, Mapping) or not cells:
            faults.append(f"ns_per.{bits}: must map kinds of layers to terms, got {cells!r}")
            continue
        for kind, cell in cells.items():
            if kind not in KINDS:
                faults.append(f"ns_per.{bits}: no kind {kind!r}; kinds are {', '.join(KINDS)}")
            faults += _cell_faults(f"ns_per.{bits}.{kind}", cell, TERMS)
    for field, given, known in (
        ("between_ns_per", between_ns_per, BETWEEN),
        ("held_out_error", held_out_error, ("layer", "network")),
    ):
        if not isinstance(given, Mapping) or set(given) != set(ns_per):
            faults.append(f"{field}: must have the bits of ns_per, {sorted(ns_per, key=str)}, got {given!r}")
            continue
        for bits, cell in given.items():
            faults += _cell_faults(f"{field}.{bits}", cell, known)
    return faults


def _cell_faults(where: str, cell: Any, known: tuple[str, ...]) -> list[str]:
    if not isinstance(cell, Mapping):
        return [f"{where}: must map {', '.join(known)} to numbers, got {cell!r}"]
    faults = [
        f"{where}: no term {term!r}; terms are {', '.join(known)}" for term in cell if term not in known
    ]
    faults += [
        f"{where}.{term}: must be a number >= 0, got {value!r}"
        for term, value in cell.items()
        if isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) and value >= 0)
    ]
    return faults
