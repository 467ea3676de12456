"""BISMO: a bit-serial matrix multiplier whose time grows with the product of the bit-widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Metric
from autocompress.hardware_sim.energy import (
    BRAM18_KIB,
    DRAM_PJ_PER_BIT,
    HOROWITZ,
    mac_pj,
    sram_pj_per_bit,
    with_rest,
)
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, refuse
from autocompress.hardware_sim.table import Floats, LayerTable

# BISMO.scala estimateResources: one dot-product unit takes 1.17 LUTs per bit of its width and 44.1 more,
# its accumulator and result register 120.1.
LUTS_PER_DOT_BIT = 1.17
LUTS_PER_DOT_UNIT = 44.1
LUTS_PER_ACCUMULATOR = 120.1
# The same function: a block RAM gives 32 bits of width at 1024 words.
BRAM_WIDTH_BITS = 32
BRAM_WORDS = 1024

WINDOW_BITS = 16
"""Windows of grouped layers are padded to at least this many taps (HAQ's table: 9 taps move as 16)."""


@dataclass(frozen=True)
class BitSerial(HardwareModel):
    """``rows`` x ``columns`` dot-product units of ``depth`` binary products each, one bit plane pair a cycle.

    A convolution runs as a matrix product of positions by window by output channels. Its batch takes the
    largest of three times, which overlap: computing, fetching activations, fetching weights. With w
    weight bits and a activation bits, P positions, K taps, N output channels and B samples::

        compute      w * a * B * ceil(P / rows) * ceil(K / depth) * ceil(N / columns)
        activations  a * B * P * ceil(K / depth) * depth / dram_bits_per_cycle
        weights      w * B * N * ceil(K / depth) * depth / dram_bits_per_cycle

    Where a sample has a single position (linear layers) the samples are the rows of one matrix: B * P
    becomes B rows in ``ceil(B / rows)`` tiles and the weights are fetched once. Groups share words: as many
    windows, padded to a power of two of at least 16 taps, as fit into ``depth``.

    Args:
        name: of the target.
        rows, depth, columns: of the array (Dm, Dk, Dn).
        clock_mhz: of array and memory interface.
        dram_bits_per_cycle: width of the memory port.
        max_bits: widest operand.
        row_buffer_words, column_buffer_words: depth of each row's and column's buffer.
        board_w: power of the board under load.
        batch: samples priced together; figures are per sample.

    Source: Umuroglu et al., "BISMO", FPL 2018, and its cost model (EECS-NTNU/bismo, BISMO.scala); memory
    terms and the sharing of words fitted to the latency table of Wang et al., "HAQ", CVPR 2019. Differs from
    them: results leaving the array and instruction overheads are not counted. Energy is board power times
    time, as no energy per operation is published; ``rest`` is what it takes beyond arithmetic, operands read
    from the array's buffers and DRAM traffic as a table of other circuits prices them.
    """

    kind: ClassVar[str] = "bit_serial"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj", "luts", "brams")
    mapping: ClassVar[str] = (
        "im2col: positions of one sample along rows, output channels along columns, window along depth"
    )
    energy_table: ClassVar[str] = (
        f"board power (an upper bound) times time; of it arithmetic, buffers and DRAM by {HOROWITZ}"
    )

    name: str
    rows: int
    depth: int
    columns: int
    clock_mhz: float
    dram_bits_per_cycle: int
    max_bits: int
    row_buffer_words: int
    column_buffer_words: int
    board_w: float
    batch: int = 1

    @property
    def peak_binary_tops(self) -> float:
        """Binary multiplications and additions per second at full use, in 1e12."""
        return 2 * self.rows * self.depth * self.columns * self.clock_mhz / 1e6

    @property
    def luts(self) -> float:
        """Look-up tables of the array, without fetch and result stages."""
        unit = LUTS_PER_DOT_BIT * self.depth + LUTS_PER_DOT_UNIT + LUTS_PER_ACCUMULATOR
        return self.rows * self.columns * unit

    @property
    def brams(self) -> float:
        """Block RAMs of the row and column buffers."""
        words = [-(-words // BRAM_WORDS) for words in (self.row_buffer_words, self.column_buffer_words)]
        return float(-(-self.depth // BRAM_WIDTH_BITS) * (self.rows * words[0] + self.columns * words[1]))

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer; ``extra`` gives the three times in cycles, per sample.

        Raises:
            UnsupportedLayerError: bits above ``max_bits`` or transposed convolutions; every fault is listed.
        """
        self._check(table)
        positions = table.out_h * table.out_w
        single = positions == 1
        taps = table.in_channels // table.groups * table.kernel_h * table.kernel_w
        words_per_group = -(-taps // self.depth)
        words, column_tiles = self._share_words(table, taps)
        row_tiles = np.where(single, -(-self.batch // self.rows), self.batch * -(-positions // self.rows))
        fetches = np.where(single, 1, self.batch)
        cycles_per_word = self.depth / self.dram_bits_per_cycle
        terms = {
            "compute_cycles": table.weight_bits * table.act_bits * row_tiles * words_per_group * column_tiles,
            "act_cycles": table.act_bits * self.batch * positions * words * cycles_per_word,
            "weight_cycles": table.weight_bits
            * fetches
            * table.out_channels
            * words_per_group
            * cycles_per_word,
        }
        extra = {name: np.asarray(cycles / self.batch, dtype=np.float64) for name, cycles in terms.items()}
        cycles = np.maximum.reduce(list(extra.values()))
        latency = cycles / (self.clock_mhz * 1e3)
        peak = self.rows * self.depth * self.columns * cycles
        return LayerCosts(
            latency_ms=latency,
            energy_pj=with_rest(self._table_energy(table, extra), self.board_w * latency * 1e9),
            utilisation=table.macs * table.weight_bits * table.act_bits / peak,
            memory_bound=cycles > extra["compute_cycles"],
            extra=extra | {"cycles": cycles},
        )

    @property
    def resources(self) -> dict[Metric, float]:
        """Of the array, whatever runs on it."""
        return {"luts": self.luts, "brams": self.brams}

    def _table_energy(self, table: LayerTable, cycles: Mapping[str, Floats]) -> dict[str, Floats]:
        """Picojoules per sample of what the energy table prices; cycles per sample."""
        moved = (cycles["act_cycles"] + cycles["weight_cycles"]) * self.dram_bits_per_cycle
        operands = cycles["compute_cycles"] * ((self.rows + self.columns) * self.depth)
        return {
            "mac": table.macs * mac_pj(table.weight_bits, table.act_bits),
            "buffer": (operands + moved) * sram_pj_per_bit(2 * BRAM18_KIB),
            "dram": moved * DRAM_PJ_PER_BIT,
        }

    def _share_words(
        self, table: LayerTable, taps: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Words of ``depth`` taps per position, and column tiles summed over the words of one depth step.

        Groups whose windows share a word have their output channels side by side. Powers of two split a
        word evenly, so that a larger window never needs fewer tiles.
        """
        window = np.maximum(WINDOW_BITS, 2 ** np.ceil(np.log2(taps)).astype(np.int64))
        shared = np.minimum(np.maximum(1, self.depth // window), table.groups)
        full, left = table.groups // shared, table.groups % shared
        outputs = table.out_channels // table.groups
        tiles = full * -(-shared * outputs // self.columns) + -(-left * outputs // self.columns)
        return (full + (left > 0)) * -(-taps // self.depth), tiles

    def _check(self, table: LayerTable) -> None:
        wide = np.maximum(table.weight_bits, table.act_bits) > self.max_bits
        limit = f"{self.name} multiplies integers of 1 to {self.max_bits} bits; give the layer bits"
        transposed = f"{self.name} has no mapping for a transposed convolution"
        refuse((wide, limit), (table.transposed == 1, transposed))
