"""FINN's streaming stages: cycles and resources of a folding, and the search for the best one.

A layer becomes a matrix-vector unit of ``pe`` output channels times ``simd`` input channels per cycle, fed by
a sliding-window unit. Formulas re-written from FINN (BSD-3, Xilinx/finn at 0064bae,
``src/finn/custom_op/fpgadataflow``: MVAU, VVAU and ConvolutionInputGenerator_rtl, ``get_exp_cycles``,
``lut_estimation``, ``bram_estimation``, ``dsp_estimation``), which takes them from Blott et al., "FINN-R",
TRETS 2018, section 4. They are estimates made before synthesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import InfeasibleBudgetError
from autocompress.hardware_sim.model import refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable, ceil_div

DSP_PRODUCT_BITS = 48
"""Sum of operand widths one DSP slice takes in FINN's estimate."""
WIDEST_STREAM_BITS = 8191
"""Widest word of a stream in FINN's HLS units (``AP_INT_MAX_W``)."""
MAX_SIMD_FOLDS = 1024
"""FINN's MVAU_hls is not synthesised with more folds of the inputs: it asks for SIMD >= MW / 1024."""
MAX_FRONT = 256
"""Partial designs the exact search keeps; small networks never reach it."""


@dataclass(frozen=True, eq=False)
class StageCosts:
    """Cycles per image and resources of stages; four arrays of one shape."""

    cycles: Ints
    luts: Floats
    brams: Floats
    dsps: Floats


@dataclass(frozen=True)
class Folding:
    """Parallelism of every layer of one network.

    Args:
        pe, simd: output and input channels per cycle, one entry per layer.
        costs: of the stages, arrays of shape (number of layers,).
    """

    pe: tuple[int, ...]
    simd: tuple[int, ...]
    costs: StageCosts

    @property
    def interval_cycles(self) -> int:
        """Cycles between two images in steady state: those of the slowest stage."""
        return int(self.costs.cycles.max())


def stage_costs(table: LayerTable, pe: Ints, simd: Ints, *, multipliers: str) -> StageCosts:
    """Costs of folded stages.

    Where ``pe`` or ``simd`` do not divide the channels, the layer is padded with zero channels to the next
    multiple; where they exceed them, the channels bound them. FINN itself accepts divisors only.

    Args:
        table: N layers, dense or depthwise.
        pe, simd: shape (N, F), or broadcasting to it: F foldings of every layer. Depthwise layers have one
            input channel per output channel, so ``simd`` is 1 there.
        multipliers: ``lut`` or ``dsp``, what multiplies are made of.

    Returns:
        Arrays of shape (N, F).
    """
    rows = _rows(table)
    pe, simd = np.minimum(pe, rows.out_channels), np.minimum(simd, rows.in_group)
    words = ceil_div(rows.out_channels, pe) * rows.window * ceil_div(rows.in_group, simd)
    window_cycles, window_luts, window_brams = _window_unit(table, pe, simd)
    luts = matrix_luts(
        (pe, simd),
        rows.window * rows.in_group,
        rows.weight_bits,
        rows.act_bits,
        signed=rows.act_bits == 1,
        multipliers=multipliers,
    )
    slices = pe * simd * ceil_div(rows.weight_bits + rows.act_bits, DSP_PRODUCT_BITS)
    return StageCosts(
        cycles=np.maximum(words * rows.pixels, window_cycles),
        luts=luts + window_luts,
        brams=(weight_bram18s(pe * simd * rows.weight_bits, words) + window_brams).astype(np.float64),
        dsps=(slices if multipliers == "dsp" else np.zeros_like(slices)).astype(np.float64),
    )


def matrix_luts(
    lanes: tuple[Ints, Ints],
    dot_length: Ints,
    weight_bits: Ints,
    act_bits: Ints,
    *,
    signed: NDArray[np.bool_],
    multipliers: str,
) -> Floats:
    """LUTs of a matrix-vector unit whose weights lie in block RAM and whose thresholds are outside.

    Args:
        lanes: PE and SIMD.
        dot_length: products summed per output.
        weight_bits, act_bits: operand widths.
        signed: whether activations are signed (bipolar ones are); saves one accumulator bit.
        multipliers: ``lut`` or ``dsp``.
    """
    pe, simd = lanes
    width = weight_bits + act_bits
    products = simd * (2 * ceil_div(width, 6) - 1) * width if multipliers == "lut" else 0
    adders = width * (2 * simd - 1)
    accumulator = _accumulator_bits(dot_length, width, signed)
    return np.asarray(np.floor(300 + 1.1 * pe * (products + adders + accumulator)))


def _accumulator_bits(dot_length: Ints, width: Ints, signed: NDArray[np.bool_]) -> Floats:
    alpha = np.log2(dot_length) + width - 1 - signed
    return np.asarray(np.minimum(32, np.ceil(alpha + np.log2(1 + np.exp2(-alpha)) + 1)))


def buildable(table: LayerTable, pe: Ints, simd: Ints) -> NDArray[np.bool_]:
    """Whether FINN can build stages with some foldings, shape (N, F).

    PE divides the output channels and SIMD the input channels of a group, of which a depthwise layer has one;
    SIMD is at least a 1024th of the products of a sum; and the streams of inputs, weights and sums are at
    most 8191 bits wide. FINN joins neighbours of different widths by a converter, which exists for every
    pair of such foldings: both widths divide the values of an image.

    Args:
        table: N layers, dense or depthwise.
        pe, simd: shape (N, F), or broadcasting to it.

    Source: Xilinx/finn, ``calc_wmem`` and ``defines`` of the MVAU, ``get_ap_int_max_w``, ``SetFolding``,
    ``InsertDWC``.
    """
    rows = _rows(table)
    products = rows.window * rows.in_group
    # A depthwise unit gets as many channels per cycle as it works on.
    lanes = np.where(table.depthwise[:, None], pe * simd, simd)
    sums = _accumulator_bits(products, rows.weight_bits + rows.act_bits, rows.act_bits == 1)
    widest = np.maximum.reduce(
        np.broadcast_arrays(pe * simd * rows.weight_bits, lanes * rows.act_bits, pe * sums)
    )
    divides = (rows.out_channels % pe == 0) & (rows.in_group % simd == 0)
    return np.asarray(divides & (simd * MAX_SIMD_FOLDS >= products) & (widest <= WIDEST_STREAM_BITS))


def weight_bram18s(width: Ints, words: Ints) -> Ints:
    """18-Kbit block RAMs for a memory of ``words`` words of ``width`` bits, in simple dual-port shapes."""
    return np.select(
        [width == 1, width == 2, width <= 4, width <= 9, (width <= 18) | (words > 512)],
        [
            ceil_div(words, 16384),
            ceil_div(words, 8192),
            ceil_div(words, 4096),
            ceil_div(words, 2048),
            ceil_div(words, 1024) * ceil_div(width, 18),
        ],
        default=ceil_div(words, 512) * ceil_div(width, 36),
    )


def fastest_within(table: LayerTable, capacity: Sequence[float], *, multipliers: str) -> Folding:
    """The legal folding with the shortest interval whose resources fit a device.

    Exact as long as at most :data:`MAX_FRONT` partial designs are worth keeping, which holds for a few
    layers; beyond that the front is thinned evenly and the result may be a little slower than the best.

    Args:
        table: the layers of one network.
        capacity: LUTs, 18-Kbit block RAMs and DSP slices that may be used.
        multipliers: ``lut`` or ``dsp``.

    Raises:
        InfeasibleBudgetError: even the smallest folding does not fit.
    """
    options = _legal(table, multipliers)
    levels = np.unique(np.concatenate([o.costs.cycles for o in options]))
    levels = levels[levels >= max(o.costs.cycles.min() for o in options)]
    low, high = 0, len(levels) - 1
    best = _choose(options, int(levels[high]), capacity)
    if best is None:
        least = np.sum([o.resources.min(axis=0) for o in options], axis=0)
        raise InfeasibleBudgetError(
            f"the network does not fit: it needs at least {least[0]:,.0f} LUTs, {least[1]:,.0f} 18-Kbit "
            f"block RAMs and {least[2]:,.0f} DSP slices, the device offers {capacity[0]:,.0f}, "
            f"{capacity[1]:,.0f} and {capacity[2]:,.0f}; use fewer bits or channels, or a larger device"
        )
    while low < high:
        middle = (low + high) // 2
        found = _choose(options, int(levels[middle]), capacity)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def cheapest_at(
    table: LayerTable, interval_cycles: int, capacity: Sequence[float], *, multipliers: str
) -> Folding:
    """The legal folding that reaches an interval with the smallest share of a device.

    Args:
        table: the layers of one network.
        interval_cycles: no stage may take longer.
        capacity: LUTs, 18-Kbit block RAMs and DSP slices that may be used; the sum of the three shares is
            what is minimised.
        multipliers: ``lut`` or ``dsp``.

    Raises:
        InfeasibleBudgetError: no legal folding is that fast and fits.
    """
    best = _choose(_legal(table, multipliers), interval_cycles, capacity)
    if best is None:
        fastest = fastest_within(table, capacity, multipliers=multipliers)
        raise InfeasibleBudgetError(
            f"no folding reaches {interval_cycles:,} cycles per image; the shortest interval that fits is "
            f"{fastest.interval_cycles:,}; lower the rate or use a larger device"
        )
    return best


@dataclass(frozen=True, eq=False)
class _Rows:
    """Columns of a table that decide a stage, of shape (N, 1)."""

    out_channels: Ints
    in_group: Ints
    window: Ints
    pixels: Ints
    weight_bits: Ints
    act_bits: Ints


def _rows(table: LayerTable) -> _Rows:
    columns = (
        table.out_channels,
        table.in_channels // table.groups,
        table.kernel_h * table.kernel_w,
        table.out_h * table.out_w,
        table.weight_bits,
        table.act_bits,
    )
    return _Rows(*(column[:, None] for column in columns))


def _window_unit(table: LayerTable, pe: Ints, simd: Ints) -> tuple[Ints, Ints, Ints]:
    """Cycles, LUTs and block RAMs of the sliding-window units, 0 for layers that need none."""
    kernel_h, kernel_w = table.kernel_h[:, None], table.kernel_w[:, None]
    stride_h, stride_w = table.stride_h[:, None], table.stride_w[:, None]
    out_h, out_w = table.out_h[:, None], table.out_w[:, None]
    depthwise = table.depthwise[:, None]
    needed = (kernel_h * kernel_w * stride_h * stride_w > 1) & (table.linear[:, None] == 0)
    wide = np.maximum(table.in_w[:, None], (out_w - 1) * stride_w + kernel_w)  # padding is streamed too
    lanes = np.where(depthwise, pe, simd)
    folds = ceil_div(table.in_channels[:, None], lanes)
    first = ((kernel_h - 1) * wide + kernel_w) * folds
    row = np.maximum(out_w * kernel_h * kernel_w * folds, stride_w * wide * folds)
    row = row + np.where(depthwise, out_w * (stride_w - 1) * (folds - 1), 0)
    cycles = first + out_h * row + np.where(depthwise, (stride_h - 1) * wide * folds, 0)
    positions = kernel_h * kernel_w
    depth = first + np.maximum(0, (stride_w - 1 - positions) * folds)
    depth = depth + np.maximum(0, ((stride_h - 1) * wide - positions) * folds)
    brams = _buffer_bram18s(lanes * table.act_bits[:, None], depth)
    return np.where(needed, cycles, 0), np.where(needed, 300, 0), np.where(needed, brams, 0)


def _buffer_bram18s(width: Ints, depth: Ints) -> Ints:
    """Block RAMs of a window buffer: columns of the shape its depth allows, the remainder in a wider one."""
    remainder = depth % 16384
    deep = depth > 16384
    columns = ceil_div(width, _column_width(depth))
    saved = np.where(deep, columns - ceil_div(width, _column_width(remainder)), 0)
    return ceil_div(depth, 16384) * columns - saved


def _column_width(depth: Ints) -> Ints:
    limits = (512, 1024, 2048, 4096, 8192)
    return np.select([depth <= limit for limit in limits], (36, 18, 9, 4, 2), default=1)


@dataclass(frozen=True, eq=False)
class _Options:
    """The legal foldings of one layer; arrays of shape (F,)."""

    pe: Ints
    simd: Ints
    costs: StageCosts

    def at(self, chosen: Ints | NDArray[np.bool_]) -> _Options:
        c = self.costs
        costs = StageCosts(c.cycles[chosen], c.luts[chosen], c.brams[chosen], c.dsps[chosen])
        return _Options(self.pe[chosen], self.simd[chosen], costs)

    @property
    def resources(self) -> Floats:
        return np.stack([self.costs.luts, self.costs.brams, self.costs.dsps], axis=1)


def _legal(table: LayerTable, multipliers: str) -> list[_Options]:
    """Every folding of each layer that FINN accepts.

    Raises:
        UnsupportedLayerError: layers without any.
    """
    options = []
    for i in range(len(table)):
        row = table.take(np.array([i]))
        out, group = int(row.out_channels[0]), int(row.in_channels[0] // row.groups[0])
        pe, simd = (grid.ravel() for grid in np.meshgrid(_divisors(out), _divisors(group)))
        allowed = buildable(row, pe[None], simd[None])[0]
        pe, simd = pe[allowed], simd[allowed]
        costs = stage_costs(row, pe[None], simd[None], multipliers=multipliers)
        flat = StageCosts(*(values[0] for values in vars(costs).values()))
        options.append(_Options(pe, simd, flat))
    refuse(
        (
            np.array([not len(option.pe) for option in options]),
            f"FINN has no folding: SIMD must divide the inputs, be at least a {MAX_SIMD_FOLDS}th of the "
            f"products of a sum and keep streams within {WIDEST_STREAM_BITS} bits; use channels with more "
            "divisors",
        )
    )
    return options


def _divisors(number: int) -> Ints:
    return np.array([d for d in range(1, number + 1) if number % d == 0], dtype=np.int64)


def _choose(options: Sequence[_Options], interval: int, capacity: Sequence[float]) -> Folding | None:
    """The folding of the smallest total share with every stage within an interval; None if nothing fits."""
    limits = np.asarray(capacity, dtype=np.float64)
    kept: list[_Options] = []
    totals, steps = np.zeros((1, 3)), []
    for option in options:
        quick = option.at(option.costs.cycles <= interval)
        if not len(quick.pe):
            return None
        quick = quick.at(_front(quick.resources))
        sums = (totals[:, None] + quick.resources[None]).reshape(-1, 3)
        alive = np.flatnonzero((sums <= limits).all(axis=1))
        if not len(alive):
            return None
        alive = alive[_front(sums[alive])]
        if len(alive) > MAX_FRONT:
            alive = alive[np.linspace(0, len(alive) - 1, MAX_FRONT).astype(np.int64)]
        kept.append(quick)
        steps.append(alive)
        totals = sums[alive]
    state = int((totals / np.maximum(limits, 1.0)).sum(axis=1).argmin())
    picks = []
    for quick, alive in zip(reversed(kept), reversed(steps), strict=True):
        state, pick = divmod(int(alive[state]), len(quick.pe))
        picks.append(quick.at(np.array([pick])))
    return _folding(picks[::-1])


def _front(resources: Floats) -> Ints:
    """Indices of the rows no other row matches or beats in every column, by ascending first column."""
    _, first = np.unique(resources, axis=0, return_index=True)  # unique sorts rows lexicographically
    rows = resources[first]
    matched_by = np.count_nonzero(np.all(rows[None] <= rows[:, None], axis=2), axis=1)
    return np.asarray(first[matched_by == 1])  # by itself only


def _folding(picks: Sequence[_Options]) -> Folding:
    pe, simd = (tuple(int(getattr(p, name)[0]) for p in picks) for name in ("pe", "simd"))
    names = ("cycles", "luts", "brams", "dsps")
    columns = (np.concatenate([getattr(p.costs, name) for p in picks]) for name in names)
    return Folding(pe, simd, StageCosts(*columns))
