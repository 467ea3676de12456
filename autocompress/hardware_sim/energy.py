"""Energy of arithmetic and memory in 45 nm: a few measured points and the rules between them.

Source of the points: M. Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014,
45 nm at 0.9 V; DRAM as read from that talk by S. Han et al., "Learning both Weights and Connections for
Efficient Neural Networks", NIPS 2015, table 1. Published tables differ from each other by about 4x, so
energies serve to compare designs priced with one table, never as absolute figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from autocompress.hardware_sim.table import Floats, LayerTable

HOROWITZ = "Horowitz ISSCC 2014, 45 nm"
"""Name of the table, for ``energy_table`` of the models that use it."""

FLOAT_BITS = 32
INT_ADD_PJ = {8: 0.03, 16: 0.05, 32: 0.1}
INT_MULT_PJ = {8: 0.2, 32: 3.1}
FLOAT_ADD_PJ = {16: 0.4, 32: 0.9}
FLOAT_MULT_PJ = {16: 1.1, 32: 3.7}
SRAM_PJ_PER_64_BITS = {8.0: 10.0, 32.0: 20.0, 1024.0: 100.0}
"""KiB -> pJ per 64-bit access; 32 KiB and 1 MiB as quoted by SASiML (Orosa et al., EcoFlow, 2022)."""
DRAM_PJ_PER_BIT = 640.0 / 32
"""640 pJ per 32-bit access, the low end of the talk's 1.3 to 2.6 nJ per 64 bits."""
BRAM18_KIB = 18 / 8
"""A block RAM of Xilinx FPGAs, taken for an SRAM of its size."""

_SIDE_PRODUCT_EXPONENT = math.log(INT_MULT_PJ[32] / INT_MULT_PJ[8]) / math.log((32 * 32) / (8 * 8))


def mac_pj(weight_bits: ArrayLike, act_bits: ArrayLike) -> Floats:
    """Energy of one multiply-accumulate, in pJ.

    An integer multiplier costs ``0.2 * (weight_bits * act_bits / 64) ** 0.99`` pJ: the power law through the
    table's 8x8 and 32x32 bit points, since an array multiplier's cells grow with the product of its sides.
    The accumulator is a 32-bit integer adder (0.1 pJ) at every width. Where either side is 32 bits the
    operands are floating point: 3.7 + 0.9 pJ. Rises with either width.

    Args:
        weight_bits, act_bits: bit-widths from 1 to 32, of one shape.
    """
    weight, act = np.asarray(weight_bits, dtype=np.float64), np.asarray(act_bits, dtype=np.float64)
    multiply = INT_MULT_PJ[8] * (weight * act / 64.0) ** _SIDE_PRODUCT_EXPONENT
    is_float = np.maximum(weight, act) >= FLOAT_BITS
    return np.where(is_float, FLOAT_MULT_PJ[32] + FLOAT_ADD_PJ[32], multiply + INT_ADD_PJ[32])


def sram_pj_per_bit(capacity_kib: float) -> float:
    """Energy to read or write one bit of an SRAM, in pJ.

    Power law between the table's points, continued beyond the first and the last. The table gives reads;
    writes are priced as reads.

    Args:
        capacity_kib: size of one buffer, in KiB.

    Raises:
        ValueError: a capacity that is not positive.
    """
    if not capacity_kib > 0:
        raise ValueError(f"an SRAM's capacity must be > 0 KiB, got {capacity_kib}")
    points = sorted(SRAM_PJ_PER_64_BITS.items())
    low, high = points[:2] if capacity_kib <= points[1][0] else points[-2:]
    exponent = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return low[1] / 64 * math.pow(capacity_kib / low[0], exponent)


def on_chip_pj(table: LayerTable) -> dict[str, Floats]:
    """Energy of layers whose weights and activations stay in block RAMs: component -> pJ per sample.

    Every weight is read for every product, every window read once and every input pixel written once.
    """
    macs = table.macs.astype(np.float64)
    per_bit = sram_pj_per_bit(BRAM18_KIB)
    window = table.out_h * table.out_w * table.kernel_h * table.kernel_w * table.in_channels
    stored = table.in_h * table.in_w * table.in_channels
    return {
        "mac": macs * mac_pj(table.weight_bits, table.act_bits),
        "weight_bram": np.asarray(macs * table.weight_bits * per_bit),
        "act_bram": (window + stored).astype(np.float64) * table.act_bits * per_bit,
    }


def with_rest(parts: Mapping[str, Floats], board_pj: Floats) -> dict[str, Floats]:
    """Components of a board's energy: those a table prices, and ``rest``, what the board takes beyond them.

    The rest is clocks, leakage, host and whatever programmable logic takes more than the table's circuits.

    Args:
        parts: component -> pJ.
        board_pj: power times time.
    """
    return {**parts, "rest": np.maximum(0.0, board_pj - sum(parts.values()))}
