"""Tilings and loop orders of the bit-fusion array, searched exhaustively for many layers at once.

A layer is three nested loops over tiles: positions (samples times pixels), input channels and output
channels. Tiles are powers of two. A tensor whose tiles of all inner loops fit into half its buffer (the
other half is being filled) stays there while loops it does not depend on turn; otherwise each turn of every
outer loop moves it again. That is the traffic rule of the published simulator, derived anew.

For a fixed tiling and order every figure grows with the layer, and every schedule of a layer is also one of
any smaller layer. So the least time and the least energy over all schedules never fall when a layer grows.
The energy of the fastest schedule has no such property, hence the two are minimised apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from autocompress.hardware_sim.table import Floats

ACCUMULATOR_BITS = 32
"""Width of partial sums; they are read and written (published simulator: ``oprec`` of 32)."""

_ELEMENTS = 1 << 15
"""Layers times tilings worked on together, so that a block's arrays stay in the processor's cache."""


@dataclass(frozen=True)
class FusionArray:
    """What a schedule depends on.

    Args:
        rows, columns: of fusion units; rows hold input channels, columns output channels.
        weight_half_bits, act_half_bits, out_half_bits: half of each double buffer.
        dram_bits_per_cycle: memory interface.
        core_pj_per_cycle: of the whole array while it computes.
        weight_pj, act_pj, out_pj: picojoules per bit (read, write) of the three buffers.
        dram_pj_per_bit: either direction.
    """

    rows: int
    columns: int
    weight_half_bits: float
    act_half_bits: float
    out_half_bits: float
    dram_bits_per_cycle: float
    core_pj_per_cycle: float
    weight_pj: tuple[float, float]
    act_pj: tuple[float, float]
    out_pj: tuple[float, float]
    dram_pj_per_bit: float


@dataclass(frozen=True, eq=False)
class DenseLayers:
    """Ungrouped layers, each a float array of shape (N,).

    Args:
        inputs, outputs: channels.
        kernel_h, kernel_w, stride_h, stride_w: of the window.
        out_h, out_w: spatial size of the output of one sample.
        weight_bits, act_bits: as moved in memory.
        fusion: multiplications one fusion unit does per cycle.
    """

    inputs: Floats
    outputs: Floats
    kernel_h: Floats
    kernel_w: Floats
    stride_h: Floats
    stride_w: Floats
    out_h: Floats
    out_w: Floats
    weight_bits: Floats
    act_bits: Floats
    fusion: Floats

    def take(self, index: NDArray[np.int64]) -> DenseLayers:
        """Some of the layers."""
        return DenseLayers(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(frozen=True, eq=False)
class Figures:
    """What schedules do to a batch; arrays of one shape, infinite where a tile does not fit.

    Args:
        cycles: until the last output has left.
        compute: cycles in which the array works.
        macs: multiply-accumulates, with those on the rims of tiles that overhang the layer.
        weights, acts, outs: bits moved between DRAM and the buffers; ``outs`` moves both ways.
        sums: bits of partial sums the array reads from its buffer and writes back.
    """

    cycles: Floats
    compute: Floats
    macs: Floats
    weights: Floats
    acts: Floats
    outs: Floats
    sums: Floats

    @property
    def dram_bits(self) -> Floats:
        """Traffic in both directions."""
        return self.weights + self.acts + 2 * self.outs

    def energy_parts(self, weight_bits: Floats, act_bits: Floats, array: FusionArray) -> dict[str, Floats]:
        """Component -> picojoules."""
        return {
            "core": array.core_pj_per_cycle * self.compute,
            "weight_buffer": array.weight_pj[0] * weight_bits * self.macs + array.weight_pj[1] * self.weights,
            "input_buffer": array.act_pj[0] * act_bits * self.macs + array.act_pj[1] * self.acts,
            "output_buffer": sum(array.out_pj) * (self.sums + self.outs),
            "dram": array.dram_pj_per_bit * self.dram_bits,
        }


class _Best:
    """The best schedule found so far of each layer: least ``goal``, then least ``tie``."""

    def __init__(self, num_layers: int) -> None:
        self.goal = np.full(num_layers, np.inf)
        self.tie = np.full(num_layers, np.inf)
        self.figures = Figures(*(np.zeros(num_layers) for _ in fields(Figures)))

    def offer(self, goal: Floats, tie: Floats, figures: Figures) -> None:
        """Compare with T more schedules per layer; arguments have shape (N, T)."""
        least = goal.min(axis=1)
        pick = np.where(goal == least[:, None], tie, np.inf).argmin(axis=1)
        ties = np.take_along_axis(tie, pick[:, None], axis=1)[:, 0]
        better = np.flatnonzero((least < self.goal) | ((least == self.goal) & (ties < self.tie)))
        self.goal[better], self.tie[better] = least[better], ties[better]
        for f in fields(Figures):
            getattr(self.figures, f.name)[better] = getattr(figures, f.name)[better, pick[better]]


def best_schedules(layers: DenseLayers, batch: int, array: FusionArray) -> tuple[Figures, Figures]:
    """The fastest and the thriftiest schedule of each layer.

    Args:
        layers: N layers; the smallest tile of each fits the buffers.
        batch: samples processed together.
        array: the machine.

    Returns:
        Figures of the fastest schedule (of equally fast ones the thriftiest) and of the one with the least
        energy (of equally thrifty ones the fastest), each array of shape (N,).
    """
    num_layers = len(layers.inputs)
    chosen = tuple(Figures(*(np.zeros(num_layers) for _ in fields(Figures))) for _ in range(2))
    for index in _blocks(layers, batch, array):
        for figures, found in zip(chosen, _search(layers.take(index), batch, array), strict=True):
            for f in fields(Figures):
                getattr(figures, f.name)[index] = getattr(found, f.name)
    return chosen[0], chosen[1]


def least_costs(layers: DenseLayers, batch: int, array: FusionArray) -> tuple[Floats, Floats]:
    """Cycles of the fastest and picojoules of the thriftiest schedule of each layer, each of shape (N,).

    The same minima as those of :func:`best_schedules`, without what else the two schedules do.
    """
    cycles, energy = np.zeros(len(layers.inputs)), np.zeros(len(layers.inputs))
    for index in _blocks(layers, batch, array):
        cycles[index], energy[index] = _least(layers.take(index), batch, array)
    return cycles, energy


def smallest_tile(layers: DenseLayers, array: FusionArray) -> tuple[Floats, Floats, Floats]:
    """Bits of weights, activations and outputs for one pixel, one input channel, one pass of the columns."""
    window, outputs = layers.kernel_h * layers.kernel_w, np.minimum(layers.outputs, array.columns)
    return window * outputs * layers.weight_bits, window * layers.act_bits, outputs * ACCUMULATOR_BITS


def _search(layers: DenseLayers, batch: int, array: FusionArray) -> tuple[Figures, Figures]:
    """Offer every schedule of a block of layers."""
    num_layers = len(layers.inputs)
    fast, thrifty = _Best(num_layers), _Best(num_layers)
    fill = _fill_cycles(layers, array)[:, None]
    weight_bits, act_bits = layers.weight_bits[:, None], layers.act_bits[:, None]
    for compute, macs, weights, acts, outs, sums in _schedules(layers, batch, array):
        transfer = np.ceil((weights + acts + 2 * outs) / array.dram_bits_per_cycle)
        figures = Figures(np.maximum(compute + fill, transfer), compute, macs, weights, acts, outs, sums)
        energy = np.asarray(sum(figures.energy_parts(weight_bits, act_bits, array).values()))
        fast.offer(figures.cycles, energy, figures)
        thrifty.offer(energy, figures.cycles, figures)
    return fast.figures, thrifty.figures


def _least(layers: DenseLayers, batch: int, array: FusionArray) -> tuple[Floats, Floats]:
    """:func:`least_costs` of a block of layers."""
    tiles = _Tiles.of(layers, batch, array)
    # Picojoules per bit that a tensor moves; outputs move both ways.
    prices = (array.weight_pj[1] + array.dram_pj_per_bit, array.act_pj[1] + array.dram_pj_per_bit)
    moved_pj = (*prices, sum(array.out_pj) + 2 * array.dram_pj_per_bit)
    traffic = _least_sum(tiles, (1.0, 1.0, 2.0))
    traffic[~tiles.fits] = np.inf
    transfer = np.ceil(traffic / array.dram_bits_per_cycle)
    fill = _fill_cycles(layers, array)[:, None, None, None]
    cycles = np.maximum(tiles.compute + fill, transfer)
    weight_bits, act_bits = (b[:, None, None, None] for b in (layers.weight_bits, layers.act_bits))
    reads_pj = array.weight_pj[0] * weight_bits + array.act_pj[0] * act_bits
    energy = _least_sum(tiles, moved_pj) + array.core_pj_per_cycle * tiles.compute
    energy += reads_pj * tiles.macs + sum(array.out_pj) * tiles.sums
    axes = (1, 2, 3)
    return cycles.min(axis=axes), energy.min(axis=axes)


def _least_sum(tiles: _Tiles, prices: tuple[float, float, float]) -> Floats:
    """Least of the six loop orders: what weights, activations and outputs move, each times its price."""
    (p, i, o), half = tiles.turns, tiles.half
    weight, act, out = (once * price for once, price in zip(tiles.once, prices, strict=True))
    again = (weight * p, act * o, out * i)
    w_i, w_o, w_io = (np.where(tiles.weight * t > half[0], again[0], weight) for t in (i, o, i * o))
    a_p, a_i, a_pi = (np.where(tiles.act * t > half[1], again[1], act) for t in (p, i, p * i))
    o_p, o_o, o_po = (np.where(tiles.out * t > half[2], again[2], out) for t in (p, o, p * o))
    least = weight + a_pi + o_p  # the orders of _repeats; a tile alone always fits
    for parts in (
        (weight, a_p, o_po),
        (w_i, a_pi, out),
        (w_o, act, o_po),
        (w_io, a_i, out),
        (w_io, act, o_o),
    ):
        np.minimum(least, parts[0] + parts[1] + parts[2], out=least)
    return least


def _fill_cycles(layers: DenseLayers, array: FusionArray) -> Floats:
    """Cycles in which the first operands arrive and the last outputs leave, with the array idle.

    The published simulator counts the first and last buffer contents instead, which is shorter for a larger
    layer whose tensors no longer fit; the array's own size keeps the cost of a layer from ever falling.
    """
    inputs, outputs = np.minimum(layers.inputs, array.rows), np.minimum(layers.outputs, array.columns)
    operands = inputs * layers.act_bits + inputs * outputs * layers.weight_bits
    return np.asarray(np.ceil((operands + 2 * outputs * ACCUMULATOR_BITS) / array.dram_bits_per_cycle))


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Tilings of N layers: positions along axis 1, input channels along axis 2, output channels along axis 3.

    Args:
        fits: whether every tile fits half its buffer.
        compute, macs, sums: as in :class:`Figures`; ``compute`` is infinite where a tile does not fit.
        weight, act, out: bits of one tile.
        once: bits of all tiles of weights, activations and outputs, each moved once.
        turns: of the loops over positions, input channels and output channels.
        half: bits of half of each buffer.
    """

    fits: NDArray[np.bool_]
    compute: Floats
    macs: Floats
    sums: Floats
    weight: Floats
    act: Floats
    out: Floats
    once: tuple[Floats, Floats, Floats]
    turns: tuple[Floats, Floats, Floats]
    half: tuple[float, float, float]

    @classmethod
    def of(cls, layers: DenseLayers, batch: int, array: FusionArray) -> _Tiles:
        def wide(values: Floats) -> Floats:
            return values[:, None, None, None]

        pixels, pixels_in, turns_p = (v[:, :, None, None] for v in _position_tiles(layers, batch))
        blocks = np.ceil(layers.outputs / array.columns)
        ic = np.minimum(_powers(layers.inputs)[None, None, :, None], wide(layers.inputs))
        oc = np.minimum(array.columns * _powers(blocks)[None, None, None, :], wide(layers.outputs))
        turns_i, turns_o = np.ceil(wide(layers.inputs) / ic), np.ceil(wide(layers.outputs) / oc)
        window, lanes = wide(layers.kernel_h * layers.kernel_w), wide(array.rows * layers.fusion)
        # With fewer channels than rows the window is unrolled along the rows, as for published first layers.
        unrolled = wide(layers.inputs) < array.rows
        steps = np.where(unrolled, np.ceil(window * ic / lanes), window * np.ceil(ic / lanes))
        weight = window * ic * oc * wide(layers.weight_bits)
        act = pixels_in * ic * wide(layers.act_bits)
        out = pixels * oc * ACCUMULATOR_BITS
        half = (array.weight_half_bits, array.act_half_bits, array.out_half_bits)
        fits = (weight <= half[0]) & (act <= half[1]) & (out <= half[2])
        passes = (pixels * turns_p) * (turns_i * steps * (turns_o * np.ceil(oc / array.columns)))
        return cls(
            fits=fits,
            compute=np.where(fits, passes, np.inf),
            macs=(pixels * turns_p) * (turns_i * ic * window * (turns_o * oc)),
            sums=(out * turns_p * turns_o) * turns_i,
            weight=weight,
            act=act,
            out=out,
            once=(weight * turns_i * turns_o, act * turns_p * turns_i, out * turns_p * turns_o),
            turns=(turns_p, turns_i, turns_o),
            half=half,
        )


def _schedules(layers: DenseLayers, batch: int, array: FusionArray) -> Iterator[tuple[Floats, ...]]:
    """For each loop order: compute, macs, weights, acts, outs, sums, each of shape (N, tilings)."""
    tiles = _Tiles.of(layers, batch, array)
    flat = (len(layers.inputs), -1)
    shared = [
        np.broadcast_to(part, tiles.fits.shape).reshape(flat)
        for part in (tiles.compute, tiles.macs, tiles.sums)
    ]
    for repeats in _repeats((tiles.weight, tiles.act, tiles.out), tiles.half, tiles.turns):
        moved = (
            np.broadcast_to(bits * times, tiles.fits.shape).reshape(flat)
            for bits, times in zip(tiles.once, repeats, strict=True)
        )
        yield (shared[0], shared[1], *moved, shared[2])


def _repeats(
    tile: tuple[Floats, Floats, Floats],
    half: tuple[float, float, float],
    turns: tuple[Floats, Floats, Floats],
) -> Iterator[tuple[Floats, Floats, Floats]]:
    """How often weights, activations and outputs are moved, for the six orders of the three loops.

    Weights do not depend on the loop over positions (p), activations not on output channels (o), outputs
    not on input channels (i). A tensor moves again with each turn of that loop unless its tiles of the loops
    further in fit half its buffer.
    """
    (weight, act, out), (p, i, o) = tile, turns

    def again(size: Floats, limit: float, times: Floats) -> Floats:
        return np.where(size > limit, times, 1.0)

    one = np.ones(())
    for inside_p, inside_o, inside_i in (
        (one, p * i, p),  # from the innermost loop out: p i o
        (one, p, p * o),  # p o i
        (i, i * p, one),  # i p o
        (o, one, o * p),  # o p i
        (i * o, i, one),  # i o p
        (i * o, one, o),  # o i p
    ):
        yield (
            again(weight * inside_p, half[0], p),
            again(act * inside_o, half[1], o),
            again(out * inside_i, half[2], i),
        )


def _position_tiles(layers: DenseLayers, batch: int) -> tuple[Floats, Floats, Floats]:
    """Output pixels and input pixels of a tile, and the number of tiles; each of shape (N, tilings)."""
    samples = np.minimum(2.0 ** np.arange(np.ceil(np.log2(batch)) + 1), batch)[None, :, None]
    side = _powers(np.maximum(layers.out_h, layers.out_w))[None, None, :]

    def wide(values: Floats) -> Floats:
        return values[:, None, None]

    tile_h, tile_w = np.minimum(side, wide(layers.out_h)), np.minimum(side, wide(layers.out_w))
    rows_in = wide(layers.kernel_h) + (tile_h - 1) * wide(layers.stride_h)
    columns_in = wide(layers.kernel_w) + (tile_w - 1) * wide(layers.stride_w)
    turns = np.ceil(wide(layers.out_h) / tile_h) * np.ceil(wide(layers.out_w) / tile_w)
    flat = (len(layers.inputs), -1)
    return (
        (samples * tile_h * tile_w).reshape(flat),
        (samples * rows_in * columns_in).reshape(flat),
        (np.ceil(batch / samples) * turns).reshape(flat),
    )


def _num_powers(sizes: Floats) -> NDArray[np.int64]:
    return np.ceil(np.log2(sizes)).astype(np.int64) + 1


def _powers(sizes: Floats) -> Floats:
    """1, 2, 4, ... up to the first power of two that holds the largest size."""
    return np.asarray(2.0 ** np.arange(int(_num_powers(sizes).max())))


def _blocks(layers: DenseLayers, batch: int, array: FusionArray) -> Iterator[NDArray[np.int64]]:
    """Indices of layers with equal numbers of tilings, few enough to work on together."""
    counts = np.stack(
        [
            _num_powers(np.maximum(layers.out_h, layers.out_w)),
            _num_powers(layers.inputs),
            _num_powers(np.ceil(layers.outputs / array.columns)),
        ],
        axis=1,
    )
    kinds, members = np.unique(counts, axis=0, return_inverse=True)
    for number, kind in enumerate(kinds):
        index = np.flatnonzero(members.reshape(-1) == number)
        size = max(1, _ELEMENTS // int(kind.prod() * (batch.bit_length() + 1)))
        yield from (index[start : start + size] for start in range(0, len(index), size))
