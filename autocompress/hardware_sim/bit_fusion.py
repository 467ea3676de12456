"""Bit Fusion: a spatial array whose multipliers fuse to the bit-width of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Metric
from autocompress.hardware_sim.bit_fusion_schedule import (
    DenseLayers,
    Figures,
    FusionArray,
    best_schedules,
    least_costs,
    smallest_tile,
)
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable

_BITS_PER_KIB = 8 * 1024


@dataclass(frozen=True)
class BitFusion(HardwareModel):
    """Array of fusion units: ``rows`` input channels by ``columns`` output channels per cycle and fusion.

    A unit that multiplies two numbers of ``max_bits`` splits into ``(max_bits / a) * (max_bits / w)``
    multipliers, with activation and weight bits a and w rounded up to a power of two of at least
    ``min_bits``. Memory moves the bits as they are, so 6 bits compute like 8 and move like 6.
    :mod:`autocompress.hardware_sim.bit_fusion_schedule` searches tilings and loop orders.

    Convolution groups run one after the other. With fewer input channels per group than rows, the
    window is unrolled along the rows.

    Args:
        name: of the target.
        rows, columns: fusion units.
        clock_mhz: of array and memory interface.
        min_bits, max_bits: narrowest and widest operand of a unit, powers of two.
        weight_buffer_kib, input_buffer_kib, output_buffer_kib: each double buffered, so half holds a tile.
        dram_bits_per_cycle: memory interface, shared by reads and writes.
        core_pj_per_cycle: dynamic energy of the whole array in a cycle of computing.
        weight_read_pj_per_bit, ..., output_write_pj_per_bit: of the buffers.
        dram_pj_per_bit: either direction.
        batch: samples priced together; figures are per sample.

    Raises:
        ValueError: bit-widths that are no powers of two, or a narrowest above the widest.

    Source: Sharma et al., "Bit Fusion", ISCA 2018, sections III and IV, and the public simulator
    (hsharma35/bitfusion). Differs from the simulator: latency and energy are each the least over schedules,
    not both of the fastest; the idle time at the start and end is that of one array pass, not of whole
    buffers; filters and outputs are not padded to whole rows and columns in memory; a first layer's
    windows are unrolled on the chip, not by the host.
    """

    kind: ClassVar[str] = "bit_fusion"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj")
    plans_at_once: ClassVar[int] = 50_000  # plans share layer shapes, and each shape is searched once
    mapping: ClassVar[str] = (
        "input channels along rows, output channels along columns, output stationary; "
        "power-of-two tiles in double buffers, best of six loop orders"
    )
    energy_table: ClassVar[str] = "Bit Fusion simulator (45 nm synthesis, CACTI buffers, 15 pJ/bit DRAM)"

    name: str
    rows: int
    columns: int
    clock_mhz: float
    min_bits: int
    max_bits: int
    weight_buffer_kib: float
    input_buffer_kib: float
    output_buffer_kib: float
    dram_bits_per_cycle: int
    core_pj_per_cycle: float
    weight_read_pj_per_bit: float
    weight_write_pj_per_bit: float
    input_read_pj_per_bit: float
    input_write_pj_per_bit: float
    output_read_pj_per_bit: float
    output_write_pj_per_bit: float
    dram_pj_per_bit: float
    batch: int = 1

    def __post_init__(self) -> None:
        low, high = self.min_bits, self.max_bits
        if not 1 <= low <= high or low & (low - 1) or high & (high - 1):
            raise ValueError(
                f"min_bits and max_bits must be powers of two, min_bits not the larger; got {low} and {high}"
            )

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer; ``extra`` gives cycles and traffic of the fastest schedule, per sample.

        Raises:
            UnsupportedLayerError: bits above ``max_bits``, transposed convolutions, or kernels whose
                smallest tile does not fit the buffers; every fault is listed.
        """
        first, inverse = _distinct_rows(table)
        layers = self._dense_layers(table, first)
        self._check(table, first, inverse, layers)
        fast, thrifty = best_schedules(layers, self.batch, self._array)
        per_sample = table.groups[first] / self.batch
        energy = thrifty.energy_parts(layers.weight_bits, layers.act_bits, self._array)
        extra = self._extra(fast, layers)
        macs = table.macs[first] / table.groups[first] * self.batch
        peak = fast.cycles * self.rows * self.columns * layers.fusion
        transfer = np.ceil(fast.dram_bits / self.dram_bits_per_cycle)
        return LayerCosts(
            latency_ms=(fast.cycles * per_sample / (self.clock_mhz * 1e3))[inverse],
            energy_pj={name: (part * per_sample)[inverse] for name, part in energy.items()},
            utilisation=(macs / peak)[inverse],
            memory_bound=(transfer >= fast.cycles)[inverse],
            extra={name: (part * per_sample)[inverse] for name, part in extra.items()},
        )

    def layer_parts(self, table: LayerTable) -> dict[Metric, Floats]:
        """Latency and energy of :meth:`layer_costs` in a fraction of its time, for populations of plans.

        Raises:
            UnsupportedLayerError: as :meth:`layer_costs`.
        """
        first, inverse = _distinct_rows(table)
        layers = self._dense_layers(table, first)
        self._check(table, first, inverse, layers)
        cycles, energy = least_costs(layers, self.batch, self._array)
        per_sample = table.groups[first] / self.batch
        return {
            "latency_ms": (cycles * per_sample / (self.clock_mhz * 1e3))[inverse],
            "energy_mj": (energy * per_sample * 1e-9)[inverse],
        }

    @property
    def _array(self) -> FusionArray:
        halves = (self.weight_buffer_kib, self.input_buffer_kib, self.output_buffer_kib)
        weight_half, act_half, out_half = (kib * _BITS_PER_KIB / 2 for kib in halves)
        return FusionArray(
            rows=self.rows,
            columns=self.columns,
            weight_half_bits=weight_half,
            act_half_bits=act_half,
            out_half_bits=out_half,
            dram_bits_per_cycle=self.dram_bits_per_cycle,
            core_pj_per_cycle=self.core_pj_per_cycle,
            weight_pj=(self.weight_read_pj_per_bit, self.weight_write_pj_per_bit),
            act_pj=(self.input_read_pj_per_bit, self.input_write_pj_per_bit),
            out_pj=(self.output_read_pj_per_bit, self.output_write_pj_per_bit),
            dram_pj_per_bit=self.dram_pj_per_bit,
        )

    def _dense_layers(self, table: LayerTable, rows: Ints) -> DenseLayers:
        """One convolution group of some rows of a table."""
        groups = table.groups[rows]
        weight_bits, act_bits = (
            np.minimum(b[rows], self.max_bits) for b in (table.weight_bits, table.act_bits)
        )
        columns = (
            *(table.in_channels[rows] // groups, table.out_channels[rows] // groups),
            *(table.kernel_h[rows], table.kernel_w[rows], table.stride_h[rows], table.stride_w[rows]),
            *(table.out_h[rows], table.out_w[rows], table.weight_bits[rows], table.act_bits[rows]),
            self._splits(weight_bits) * self._splits(act_bits),
        )
        return DenseLayers(*(column.astype(np.float64) for column in columns))

    def _splits(self, bits: Ints) -> Floats:
        """Into how many operands of some bits one operand of ``max_bits`` splits."""
        return np.asarray(self.max_bits / np.maximum(self.min_bits, 2.0 ** np.ceil(np.log2(bits))))

    def _extra(self, fast: Figures, layers: DenseLayers) -> dict[str, Floats]:
        return {
            "cycles": fast.cycles,
            "compute_cycles": fast.compute,
            "weight_buffer_read_bits": fast.macs * layers.weight_bits,
            "weight_buffer_write_bits": fast.weights,
            "input_buffer_read_bits": fast.macs * layers.act_bits,
            "input_buffer_write_bits": fast.acts,
            "output_buffer_read_bits": fast.sums + fast.outs,
            "output_buffer_write_bits": fast.sums + fast.outs,
            "dram_read_bits": fast.weights + fast.acts + fast.outs,
            "dram_write_bits": fast.outs,
        }

    def _check(self, table: LayerTable, first: Ints, inverse: Ints, layers: DenseLayers) -> None:
        limits = (self.weight_buffer_kib, self.input_buffer_kib, self.output_buffer_kib)
        tiles = smallest_tile(layers, self._array)
        too_big = [bits > kib * _BITS_PER_KIB / 2 for bits, kib in zip(tiles, limits, strict=True)]
        wide = np.maximum(table.weight_bits, table.act_bits) > self.max_bits
        refuse(
            (
                wide,
                f"{self.name} multiplies integers of 1 to {self.max_bits} bits; give the layer bits",
            ),
            (table.transposed == 1, f"{self.name} has no schedule for a transposed convolution"),
            (
                np.any(too_big, axis=0)[inverse] & ~wide,
                f"{self.name} cannot hold one window in half a buffer; enlarge it",
            ),
        )


def _distinct_rows(table: LayerTable) -> tuple[Ints, NDArray[np.int64]]:
    """First index of each distinct row, and for each row the number of its distinct one.

    Populations of plans repeat few shapes, so each is searched once. Columns are packed into one integer,
    which sorts much faster than rows do; when the range is used up, the packed part is ranked first.
    """
    columns = (
        *(table.in_channels, table.out_channels, table.groups, table.kernel_h, table.kernel_w),
        *(table.stride_h, table.stride_w, table.in_h, table.in_w, table.out_h, table.out_w),
        *(table.weight_bits, table.act_bits, table.transposed),
    )
    key, size = np.zeros(len(table), dtype=np.int64), 1
    for column in columns:
        low = int(column.min(initial=0))
        span = int(column.max(initial=0)) - low + 1
        if size * span > 2**62:
            ranks, key = np.unique(key, return_inverse=True)
            size = len(ranks)
        if span > 1:
            key, size = key * span + (column - low), size * span
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first.astype(np.int64), inverse.reshape(-1).astype(np.int64)
