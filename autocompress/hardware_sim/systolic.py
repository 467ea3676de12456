"""A rows x columns systolic array with three double-buffered SRAMs in front of one DRAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autocompress.core.cost import Metric
from autocompress.hardware_sim.energy import HOROWITZ, mac_pj
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, refuse
from autocompress.hardware_sim.table import Ints, LayerTable, ceil_div

DATAFLOWS = ("ws", "os", "is")
SUM_BITS = 32
"""Width of a partial sum; the multipliers feed 32-bit accumulators."""


@dataclass(frozen=True)
class _Gemm:
    """One matrix product per convolution group: (m x k) activations times (k x n) weights, ``repeat`` times.

    ``ifmap`` is the number of distinct activations one product reads, all of its samples together.
    """

    m: Ints
    k: Ints
    n: Ints
    repeat: Ints
    ifmap: Ints

    @classmethod
    def of(cls, table: LayerTable, batch: int) -> _Gemm:
        in_group = table.in_channels // table.groups
        m = table.out_h * table.out_w * batch
        k = table.kernel_h * table.kernel_w * in_group
        # A strided 1x1 kernel skips activations; im2col's size bounds what is touched.
        ifmap = np.minimum(table.in_h * table.in_w * in_group * batch, m * k)
        return cls(m, k, table.out_channels // table.groups, table.groups, ifmap)


@dataclass(frozen=True)
class _Folds:
    """How one product is cut: array-sized folds, and blocks whose partial sums fit the output buffer."""

    rows: Ints
    columns: Ints
    blocks: Ints


@dataclass(frozen=True)
class _Elements:
    """Array-side reads and DRAM-side loads of one product, in elements."""

    ifmap_reads: Ints
    filter_reads: Ints
    sum_writes: Ints
    ifmap_loads: Ints
    filter_loads: Ints
    outputs: Ints


@dataclass(frozen=True)
class _Moved:
    """Bits that all groups of a layer move."""

    dram_reads: Ints
    dram_writes: Ints
    sram_bits: Ints

    @classmethod
    def of(cls, elements: _Elements, repeat: Ints, table: LayerTable) -> _Moved:
        act, weight = table.act_bits, table.weight_bits
        loads = elements.ifmap_loads * act + elements.filter_loads * weight
        stores = elements.outputs * act
        # Every partial sum but an output's last one is read back to be added to.
        sums = (2 * elements.sum_writes - elements.outputs) * SUM_BITS
        to_array = elements.ifmap_reads * act + elements.filter_reads * weight
        return cls(loads * repeat, stores * repeat, (to_array + sums + loads + stores) * repeat)

    @property
    def dram_bits(self) -> Ints:
        """Reads and writes together."""
        return self.dram_reads + self.dram_writes


@dataclass(frozen=True)
class Systolic(HardwareModel):
    """Latency and energy on a systolic array, layers as im2col matrix products.

    Compute cycles are those of SCALE-Sim (Samajdar et al., ISPASS 2020), in closed form: with ``folds =
    ceil(Sr / rows) * ceil(Sc / columns)`` they are ``folds * (T + 2 * rows + columns - 2) - 1`` for ``ws``
    and ``is`` and ``folds * (T + rows + columns - 2) - 1`` for ``os``, where (Sr, Sc, T) is (K, N, M) for
    ``ws``, (M, N, K) for ``os`` and (K, M, N) for ``is``. A grouped convolution is one product per group, in
    turn.

    Differs from SCALE-Sim in its memories: partial sums stay on chip. Where those of one pass do not fit
    into half the output buffer, the streamed dimension is cut into blocks, and every further block fills
    and drains the array once more per fold. The stationary operand is loaded from DRAM once if it fits into
    half its buffer, else once per block; the streamed one once if it fits, else once per column of folds.
    DRAM time hides behind compute except for the first tile of the array.

    Weights and activations narrower than ``native_bits`` save memory traffic and switched multiplier cells,
    but no cycles. Outputs are taken to be as wide as the layer's input activations. Not counted: pooling,
    element-wise operations, biases, control, leakage.

    Args:
        name: of the target.
        rows, columns: size of the array; one multiply-accumulate per cell and cycle.
        dataflow: what stays in the cells: ``ws`` weights, ``os`` outputs, ``is`` inputs.
        clock_mhz: of the array.
        ifmap_sram_kib, filter_sram_kib, ofmap_sram_kib: buffers; half of each holds the tile in use.
        dram_gb_per_s: in 10^9 bytes per second, reads and writes together.
        native_bits: width of the multipliers' operands; wider layers cannot run.
        sram_pj_per_bit, dram_pj_per_bit: energy of one bit read or written.
        batch: samples priced together; figures are per sample.

    Raises:
        ValueError: an unknown dataflow, or an output buffer that cannot hold one row of partial sums.
    """

    kind: ClassVar[str] = "systolic"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj")
    mapping: ClassVar[str] = (
        "im2col matrix product per convolution group; the operand named by dataflow stays in the cells, "
        "reduction folds innermost"
    )
    energy_table: ClassVar[str] = HOROWITZ

    name: str
    rows: int
    columns: int
    dataflow: str
    clock_mhz: float
    ifmap_sram_kib: float
    filter_sram_kib: float
    ofmap_sram_kib: float
    dram_gb_per_s: float
    native_bits: int
    sram_pj_per_bit: float
    dram_pj_per_bit: float
    batch: int = 1

    def __post_init__(self) -> None:
        faults = []
        if self.dataflow not in DATAFLOWS:
            faults.append(f"dataflow must be one of {', '.join(DATAFLOWS)}, got {self.dataflow!r}")
        if self._usable_bits(self.ofmap_sram_kib) < SUM_BITS * self.columns:
            needed = 2 * SUM_BITS * self.columns / 8192
            faults.append(
                f"half the output buffer must hold {self.columns} sums of {SUM_BITS} bits: "
                f"ofmap_sram_kib must be >= {needed:g}, got {self.ofmap_sram_kib:g}"
            )
        if faults:
            raise ValueError("; ".join(faults))

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer; ``extra`` holds cycles, SRAM accesses in elements and traffic in bits.

        Raises:
            UnsupportedLayerError: transposed convolutions, or bits above ``native_bits``.
        """
        self._check(table)
        gemm = _Gemm.of(table, self.batch)
        folds = self._folds(gemm)
        elements = self._elements(gemm, folds, table)
        moved = _Moved.of(elements, gemm.repeat, table)
        compute = self.compute_cycles(gemm.m, gemm.k, gemm.n) * gemm.repeat
        refills = (folds.blocks - 1) * folds.rows * folds.columns * self._fill_cycles * gemm.repeat
        first_bits = np.minimum(self._first_tile_bits(gemm, table), moved.dram_reads)
        busy = compute + refills + first_bits / self._dram_bits_per_cycle
        dram_cycles = moved.dram_bits / self._dram_bits_per_cycle
        cycles = np.maximum(busy, dram_cycles)
        macs, batch = table.macs, self.batch
        return LayerCosts(
            latency_ms=cycles / (batch * self.clock_mhz * 1e3),
            energy_pj={
                "mac": macs * mac_pj(table.weight_bits, table.act_bits),
                "sram": moved.sram_bits / batch * self.sram_pj_per_bit,
                "dram": moved.dram_bits / batch * self.dram_pj_per_bit,
            },
            # SCALE-Sim leaves out the last cycle, so a tiny layer could seem to beat the peak.
            utilisation=np.minimum(1.0, macs / cycles * (batch / (self.rows * self.columns))),
            memory_bound=dram_cycles > busy,
            extra={
                "compute_cycles": compute / batch,
                "refill_cycles": refills / batch,
                "stall_cycles": (cycles - compute - refills) / batch,
                "sram_ifmap_reads": elements.ifmap_reads * gemm.repeat / batch,
                "sram_filter_reads": elements.filter_reads * gemm.repeat / batch,
                "sram_sum_writes": elements.sum_writes * gemm.repeat / batch,
                "dram_read_bits": moved.dram_reads / batch,
                "dram_write_bits": moved.dram_writes / batch,
                "sram_bits": moved.sram_bits / batch,
            },
        )

    def compute_cycles(self, m: Ints, k: Ints, n: Ints) -> Ints:
        """Cycles of (m x k) times (k x n) without stalls and blocks: SCALE-Sim's count.

        Args:
            m, k, n: output positions, reduction length and output channels, each of shape (N,).
        """
        rows, columns, streamed = self._dimensions(m, k, n)
        folds = ceil_div(rows, self.rows) * ceil_div(columns, self.columns)
        return folds * (streamed + self._fill_cycles) - 1

    @property
    def _fill_cycles(self) -> int:
        """Cycles of a fold in which the array fills and drains."""
        loads = 1 if self.dataflow == "os" else 2
        return loads * self.rows + self.columns - 2

    @property
    def _dram_bits_per_cycle(self) -> float:
        return self.dram_gb_per_s * 8e3 / self.clock_mhz

    def _usable_bits(self, sram_kib: float) -> float:
        """Half of a double buffer."""
        return sram_kib * 1024 * 8 / 2

    def _dimensions(self, m: Ints, k: Ints, n: Ints) -> tuple[Ints, Ints, Ints]:
        """What lies along the rows, along the columns, and in time."""
        return {"ws": (k, n, m), "os": (m, n, k), "is": (k, m, n)}[self.dataflow]

    def _folds(self, gemm: _Gemm) -> _Folds:
        rows, columns, streamed = self._dimensions(gemm.m, gemm.k, gemm.n)
        row_folds, column_folds = ceil_div(rows, self.rows), ceil_div(columns, self.columns)
        if self.dataflow == "os":
            return _Folds(row_folds, column_folds, np.ones_like(row_folds))
        sums = int(self._usable_bits(self.ofmap_sram_kib)) // SUM_BITS
        blocks = ceil_div(streamed, sums // np.minimum(columns, self.columns))
        # Sums of a single row of folds are complete when they leave the array, so they need no buffer.
        return _Folds(row_folds, column_folds, np.where(row_folds > 1, blocks, 1))

    def _elements(self, gemm: _Gemm, folds: _Folds, table: LayerTable) -> _Elements:
        """Array-side accesses as SCALE-Sim counts them, and loads by what fits where."""
        ifmap, weights = gemm.m * gemm.k, gemm.k * gemm.n
        outputs = gemm.m * gemm.n
        ifmap_fits = gemm.ifmap * table.act_bits <= self._usable_bits(self.ifmap_sram_kib)
        usable = self._usable_bits(self.filter_sram_kib)
        filter_fits = weights * table.weight_bits <= usable
        if self.dataflow == "ws":
            ifmap_passes, filter_passes, sums = folds.columns, folds.blocks, outputs * folds.rows
        elif self.dataflow == "is":
            ifmap_passes, filter_passes, sums = folds.blocks, folds.columns, outputs * folds.rows
        else:
            ifmap_passes, filter_passes, sums = folds.columns, folds.rows, outputs
            # Columns of folds are the outer loop, so only one column's weights are in use at a time.
            filter_fits = gemm.k * np.minimum(gemm.n, self.columns) * table.weight_bits <= usable
        return _Elements(
            ifmap * ifmap_passes,
            weights * filter_passes,
            sums,
            gemm.ifmap * np.where(ifmap_fits, 1, ifmap_passes),
            weights * np.where(filter_fits, 1, filter_passes),
            outputs,
        )

    def _first_tile_bits(self, gemm: _Gemm, table: LayerTable) -> Ints:
        """What must arrive before the first multiplication: the stationary tile, or the first wavefront."""
        if self.dataflow == "os":
            acts: Ints = np.minimum(gemm.m, self.rows) * table.act_bits
            weights: Ints = np.minimum(gemm.n, self.columns) * table.weight_bits
            return acts + weights
        rows, columns, _ = self._dimensions(gemm.m, gemm.k, gemm.n)
        tile: Ints = np.minimum(rows, self.rows) * np.minimum(columns, self.columns)
        return tile * (table.weight_bits if self.dataflow == "ws" else table.act_bits)

    def _check(self, table: LayerTable) -> None:
        wide = np.maximum(table.weight_bits, table.act_bits) > self.native_bits
        limit = f"{self.name} multiplies integers of 1 to {self.native_bits} bits; give the layer bits"
        refuse((wide, limit), (table.transposed == 1, "a transposed convolution has no im2col mapping here"))
