"""An Eyeriss-like array: filter rows stay in the processing elements, partial sums travel up the columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autocompress.core.cost import Metric
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable, ceil_div

# Energy of one access relative to one MAC: Y.-H. Chen et al., ISCA 2016, table IV, commercial 65 nm process.
SCRATCH_PAD_PER_MAC = 1.0
NEIGHBOUR_PER_MAC = 2.0
GLOBAL_BUFFER_PER_MAC = 6.0
DRAM_PER_MAC = 200.0
SCRATCH_PAD_ACCESSES = 4
"""Per MAC: read an activation, a weight and a partial sum, write the partial sum."""
RUN_LENGTH_BITS_PER_BIT = 64 / 48
"""Three (5-bit run, 16-bit value) pairs fill 64 bits: a non-zero activation takes 64/3 bits for 16."""
MAX_IMAGES = 4
"""Most samples whose partial sums share the buffer in one pass, as in Eyeriss' AlexNet mapping."""


@dataclass(frozen=True)
class RowStationary(HardwareModel):
    """Latency and energy on a row-stationary array (Eyeriss, Chen et al., ISCA 2016 and JSSC 2017).

    A processing set has one element per kernel row and output row; an element keeps ``q`` channels of its
    filter row in its scratch pads. Sets are cut to strips of at most ``columns`` output rows, and as many as
    fit run side by side on different filters. Each pass adds ``q`` channels to partial sums that wait in the
    global buffer; the buffer's port is what bounds layers with large maps. DRAM time is added, not hidden.

    Differs from the papers in: no search over mappings (sets never share partial sums, r = 1); ``q`` is
    limited by one buffer bank per activation strip, a rule inferred from the published buffer accesses;
    zeros are one share for all layers. The groups of a convolution run one after the other, so depthwise
    layers leave most of the array idle. Not counted: pooling, activation functions, biases.

    Args:
        name: of the target.
        rows, columns: of the array.
        clock_mhz: of array and buffer.
        word_bits: width of every value; narrower layers cost the same.
        activation_words, weight_words, sum_words: scratch pads of one element.
        sum_cycles: cycles an element spends to hand on one partial sum.
        buffer_kib: global buffer for activations and partial sums.
        bank_kib: part of it that holds the activation strip of one image; the rest is for partial sums.
        buffer_bytes_per_cycle: reads and writes together.
        dram_mb_per_s: rate of the transfers that compute does not hide, in 10^6 bytes per second.
        zero_share: share of activations that are zero: they are skipped in the elements (energy, not time)
            and run-length coded in DRAM.
        mac_pj: energy of one MAC; every memory access is a multiple of it.
        clock_mw: power that does not depend on activity.
        batch: samples priced together; figures are per sample.

    Raises:
        ValueError: a zero share of 1 or more, or a bank larger than the buffer.
    """

    kind: ClassVar[str] = "row_stationary"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj")
    mapping: ClassVar[str] = (
        "row stationary: sets of kernel rows x output rows, cut to the array's columns, replicated over "
        "filters; q channels per pass; partial sums in the global buffer between passes; DRAM time added"
    )
    energy_table: ClassVar[str] = (
        "Eyeriss, ISCA 2016, 65 nm: MAC 1, scratch pad 1, neighbour 2, global buffer 6, DRAM 200"
    )

    name: str
    rows: int
    columns: int
    clock_mhz: float
    word_bits: int
    activation_words: int
    weight_words: int
    sum_words: int
    sum_cycles: float
    buffer_kib: float
    bank_kib: float
    buffer_bytes_per_cycle: float
    dram_mb_per_s: float
    zero_share: float
    mac_pj: float
    clock_mw: float
    batch: int = 1

    def __post_init__(self) -> None:
        faults = []
        if self.zero_share >= 1:
            faults.append(f"zero_share must be below 1, got {self.zero_share:g}")
        if self.bank_kib >= self.buffer_kib:
            faults.append(f"bank_kib must be below buffer_kib {self.buffer_kib:g}, got {self.bank_kib:g}")
        if faults:
            raise ValueError("; ".join(faults))

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer; ``extra`` holds cycles, words moved (``*_words``) and DRAM time, per sample.

        Raises:
            UnsupportedLayerError: transposed convolutions, or bits above ``word_bits``.
        """
        self._check(table)
        shape = _Shape.of(table, self.rows, self.columns)
        channels = self._channels_per_pass(shape)
        array = self._array_cycles(shape, channels)
        buffer_words = self._buffer_words(shape, channels)
        dram_words = self._dram_words(shape)
        word_bytes = self.word_bits / 8
        buffer_cycles = buffer_words * word_bytes / self.buffer_bytes_per_cycle
        processing_ms = np.maximum(array, buffer_cycles) / (self.clock_mhz * 1e3)
        dram_ms = dram_words * word_bytes / (self.dram_mb_per_s * 1e3)
        latency_ms = processing_ms + dram_ms
        macs = table.macs.astype(np.float64)
        sums_moved = macs / (channels * shape.kernel_w)
        return LayerCosts(
            latency_ms=latency_ms,
            energy_pj=self._energy_pj(macs, sums_moved, buffer_words, dram_words, latency_ms),
            utilisation=macs / (latency_ms * self.clock_mhz * 1e3 * self.rows * self.columns),
            memory_bound=(buffer_cycles > array) | (dram_ms > processing_ms),
            extra={
                "array_cycles": array,
                "buffer_cycles": buffer_cycles,
                "processing_ms": processing_ms,
                "dram_ms": dram_ms,
                "buffer_words": buffer_words,
                "dram_words": dram_words,
            },
        )

    def _channels_per_pass(self, shape: _Shape) -> Ints:
        """Channels ``q`` of one pass: what the activation pad holds, if one bank holds the strip of each."""
        strip_bytes = shape.strip_rows * shape.padded_w * (self.word_bits / 8)
        fitting = (self.bank_kib * 1024 // strip_bytes).astype(np.int64)
        return np.clip(fitting, 1, np.maximum(1, self.activation_words // shape.kernel_w))

    def _array_cycles(self, shape: _Shape, channels: Ints) -> Floats:
        """Cycles of one sample if the buffer never made the array wait."""
        per_sum = shape.in_group * shape.kernel_w + ceil_div(shape.in_group, channels) * self.sum_cycles
        rounds = shape.groups * shape.kernel_folds * shape.strips * ceil_div(shape.out_group, shape.sets)
        return np.asarray(rounds * shape.out_w * per_sum, dtype=np.float64)

    def _buffer_words(self, shape: _Shape, channels: Ints) -> Floats:
        """Words through the global buffer: sums written and read in each pass, activations per refetch."""
        passes = ceil_div(shape.in_group, channels) * shape.kernel_folds
        widest = np.maximum(1, self.activation_words // shape.kernel_w)
        filters = np.clip(self.weight_words // (widest * shape.kernel_w), 1, self.sum_words) * shape.sets
        refetches = ceil_div(shape.out_group, filters)
        words = 2 * passes * shape.outputs + shape.inputs + shape.strip_inputs * refetches
        return words.astype(np.float64)

    def _dram_words(self, shape: _Shape) -> Floats:
        """Words from and to DRAM for one sample, with the number of images per pass that moves the fewest."""
        total, word_bytes = self.buffer_kib * 1024, self.word_bits / 8
        strip = np.maximum(self.bank_kib * 1024, shape.strip_rows * shape.padded_w * word_bytes)
        kept = min(1.0, (1 - self.zero_share) * RUN_LENGTH_BITS_PER_BIT)
        best = np.full(len(shape.groups), np.inf)
        for images in range(1, min(self.batch, MAX_IMAGES) + 1):
            sums = images * shape.strip_out_rows * shape.out_w * word_bytes
            filters = np.maximum(1, ((total - images * strip) // sums).astype(np.int64))
            activations = shape.strip_inputs * ceil_div(shape.out_group, filters) + shape.outputs
            weights = shape.weights * shape.strips * (-(-self.batch // images) / self.batch)
            best = np.minimum(best, activations * kept + weights)
        return best

    def _energy_pj(
        self, macs: Floats, sums_moved: Floats, buffer_words: Floats, dram_words: Floats, latency_ms: Floats
    ) -> dict[str, Floats]:
        active = macs * ((1 - self.zero_share) * self.mac_pj)
        return {
            "mac": active,
            "scratch_pad": active * (SCRATCH_PAD_ACCESSES * SCRATCH_PAD_PER_MAC),
            "neighbour": sums_moved * (NEIGHBOUR_PER_MAC * self.mac_pj),
            "buffer": buffer_words * (GLOBAL_BUFFER_PER_MAC * self.mac_pj),
            "dram": dram_words * (DRAM_PER_MAC * self.mac_pj),
            "clock": latency_ms * (self.clock_mw * 1e6),  # 1 mW for 1 ms is 10^6 pJ
        }

    def _check(self, table: LayerTable) -> None:
        wide = np.maximum(table.weight_bits, table.act_bits) > self.word_bits
        limit = (
            f"{self.name} computes integers of 1 to {self.word_bits} bits; give the layer bits (32 is float)"
        )
        refuse(
            (wide, limit), (table.transposed == 1, "a transposed convolution has no row-stationary mapping")
        )


@dataclass(frozen=True, eq=False)
class _Shape:
    """Layers cut into strips of output rows; counts are for one sample and all groups, arrays of shape (N,).

    ``sets`` fit the array side by side; ``strip_inputs`` counts activations with the rows that strips share.
    """

    groups: Ints
    in_group: Ints
    out_group: Ints
    kernel_w: Ints
    kernel_folds: Ints
    out_w: Ints
    padded_w: Ints
    strips: Ints
    strip_out_rows: Ints
    strip_rows: Ints
    sets: Ints
    inputs: Ints
    strip_inputs: Ints
    outputs: Ints
    weights: Ints

    @classmethod
    def of(cls, table: LayerTable, rows: int, columns: int) -> _Shape:
        strips = ceil_div(table.out_h, columns)
        strip_out_rows = np.minimum(table.out_h, columns)
        strip_rows = (strip_out_rows - 1) * table.stride_h + table.kernel_h
        # Padding is read like any activation; a kernel that skips the last columns does not read them.
        padded_w = (table.out_w - 1) * table.stride_w + table.kernel_w
        padded_h = (table.out_h - 1) * table.stride_h + table.kernel_h
        return cls(
            groups=table.groups,
            in_group=table.in_channels // table.groups,
            out_group=table.out_channels // table.groups,
            kernel_w=table.kernel_w,
            kernel_folds=ceil_div(table.kernel_h, rows),
            out_w=table.out_w,
            padded_w=padded_w,
            strips=strips,
            strip_out_rows=strip_out_rows,
            strip_rows=strip_rows,
            sets=np.maximum(1, rows // table.kernel_h) * (columns // strip_out_rows),
            inputs=table.in_channels * padded_h * padded_w,
            strip_inputs=table.in_channels * strips * strip_rows * padded_w,
            outputs=table.out_channels * table.out_h * table.out_w,
            weights=table.kernel_weights,
        )
