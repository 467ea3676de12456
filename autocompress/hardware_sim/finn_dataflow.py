"""A streaming FPGA pipeline in the manner of FINN: one stage per layer, all of them running at once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from autocompress.core.cost import Metric
from autocompress.core.graph import LayerGraph
from autocompress.hardware_sim.energy import HOROWITZ, on_chip_pj
from autocompress.hardware_sim.finn_folding import (
    WIDEST_STREAM_BITS,
    Folding,
    StageCosts,
    cheapest_at,
    fastest_within,
    stage_costs,
)
from autocompress.hardware_sim.finn_latency import first_image_cycles
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, UnsupportedLayerError, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable, ceil_div

MAX_BITS = 8
"""FINN's MVAU_rtl takes up to 8 bits, and a wider activation needs more than 255 thresholds per channel."""
PLANS_AT_ONCE = 4096
"""Networks fitted together; bounds the memory of large batches."""


@dataclass(frozen=True)
class FinnDataflow(HardwareModel):
    """Cost of a network as FINN builds it: every layer its own hardware, weights on chip, images streamed.

    ``latency_ms`` is the interval between two images in steady state, set by the slowest stage; it does not
    depend on the batch. One image alone takes longer: :meth:`single_image_ms`.

    Without ``frames_per_s`` each network gets the fastest folding that fits the device, and only latency and
    energy are metrics: the resources of that folding are in ``extra``, and fill the device whatever the
    network. With ``frames_per_s`` each layer gets the smallest folding that keeps up, and ``luts``,
    ``brams`` (of 18 Kbit) and ``dsps``, sums over the layers, are metrics too.

    So that a larger network never costs less, foldings come from one ladder of (PE, SIMD) pairs for all
    layers, channels are padded with zeros to whole folds, and a layer's block RAMs are the fewest that FINN
    estimates on its own rung or any faster one. Where block RAMs or the widths of streams decide, prices are
    therefore optimistic against a folding that can be built (by a factor of up to 1.5 in the examples of
    ``docs/hardware/finn_dataflow.md``, which has both): check a chosen plan with :meth:`folding`, which
    gives one FINN accepts. A network that does not fit even at PE = SIMD = 1 is priced at that folding's
    interval times the factor by which it exceeds the device (``extra["device_share"]`` above 1): a penalty
    that lets searches cross the region, not a prediction.

    Args:
        name: of the target.
        clock_mhz: of the pipeline.
        device_luts, device_bram18s, device_dsps: what the device has; block RAMs in units of 18 Kbit.
        usable_lut_share, usable_bram_share, usable_dsp_share: shares of them a design may take.
        multipliers: what multiplies are made of, ``lut`` or ``dsp``.
        frames_per_s: rate to reach; None for the fastest that fits.
        batch: samples priced together; changes nothing here.

    Raises:
        ValueError: ``multipliers`` is neither, a share exceeds 1, or a number is not positive.

    Differs from FINN in that SIMD unrolls input channels only, not window positions, and that a stage's
    window unit has the SIMD of its multipliers; pooling, thresholds, FIFOs and width converters are not
    counted.
    """

    kind: ClassVar[str] = "finn_dataflow"
    mapping: ClassVar[str] = "streaming pipeline; PE x SIMD multipliers per layer, weights in block RAM"
    energy_table: ClassVar[str] = f"{HOROWITZ}; block RAM as an SRAM of 2.25 KiB"
    additive: ClassVar[bool] = False
    plans_at_once: ClassVar[int] = 50_000  # plans share layers, and each is put on every rung once

    name: str
    clock_mhz: float
    device_luts: int
    device_bram18s: int
    device_dsps: int
    usable_lut_share: float = 0.7
    usable_bram_share: float = 0.8
    usable_dsp_share: float = 0.8
    multipliers: str = "lut"
    frames_per_s: float | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        faults = []
        if self.multipliers not in ("lut", "dsp"):
            faults.append(f"multipliers must be lut or dsp, got {self.multipliers!r}")
        for share in ("usable_lut_share", "usable_bram_share", "usable_dsp_share"):
            if not 0 < getattr(self, share) <= 1:
                faults.append(f"{share} must be in (0, 1], got {getattr(self, share)}")
        if self.frames_per_s is not None and not (
            isinstance(self.frames_per_s, (int, float)) and self.frames_per_s > 0
        ):
            faults.append(f"frames_per_s must be a number > 0, got {self.frames_per_s!r}")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Latency and energy; resources too when a rate is given."""
        if self.frames_per_s is None:
            return ("latency_ms", "energy_mj")
        return ("latency_ms", "energy_mj", "luts", "brams", "dsps")

    @property
    def capacity(self) -> tuple[float, float, float]:
        """LUTs, 18-Kbit block RAMs and DSP slices a design may take."""
        return (
            self.device_luts * self.usable_lut_share,
            self.device_bram18s * self.usable_bram_share,
            self.device_dsps * self.usable_dsp_share,
        )

    @property
    def target_cycles(self) -> int | None:
        """Longest stage that keeps the asked rate; None without one."""
        return None if self.frames_per_s is None else max(1, int(self.clock_mhz * 1e6 / self.frames_per_s))

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of the stages of one network; all rows share the device."""
        return self.network_costs(table, len(table))

    def totals(self, costs: LayerCosts, num_layers: int) -> dict[Metric, Floats]:
        """Interval, energy and, when a rate is given, resources of whole networks."""
        shape = (-1, num_layers)
        totals = super().totals(costs, num_layers)
        interval = costs.latency_ms.reshape(shape).max(axis=1)
        if self.frames_per_s is None:
            interval *= np.maximum(1.0, costs.extra["device_share"].reshape(shape)[:, 0])
        else:
            # The stages wait for each other, so a pipeline with time to spare still runs at the asked rate.
            interval = np.maximum(interval, 1e3 / self.frames_per_s)
            resources: tuple[Metric, ...] = ("luts", "brams", "dsps")
            totals |= {name: costs.extra[name].reshape(shape).sum(axis=1) for name in resources}
        totals["latency_ms"] = interval
        return totals

    def single_image_ms(self, graph: LayerGraph, folding: Folding | None = None) -> float:
        """Time of one image through an empty pipeline; see :func:`.first_image_cycles`.

        Args:
            graph: the network.
            folding: a folding of it; None for the one it is priced at.
        """
        table = LayerTable.of(graph.layers)
        cycles = self.layer_costs(table).extra["cycles"] if folding is None else folding.costs.cycles
        return first_image_cycles(table, cycles) / (self.clock_mhz * 1e3)

    def folding(self, graph: LayerGraph) -> Folding:
        """The best folding that FINN can build; see :func:`.buildable`.

        The fastest that fits the device or, when a rate is given, the smallest that reaches it.

        Raises:
            InfeasibleBudgetError: nothing fits, or nothing reaches the rate.
            UnsupportedLayerError: layers FINN cannot build, by name.
        """
        table = LayerTable.of(graph.layers)
        try:
            self._check(table)
            if self.target_cycles is None:
                return fastest_within(table, self.capacity, multipliers=self.multipliers)
            return cheapest_at(table, self.target_cycles, self.capacity, multipliers=self.multipliers)
        except UnsupportedLayerError as fault:
            raise fault.named(graph.layers) from None

    def folding_config(self, graph: LayerGraph) -> dict[str, dict[str, Any]]:
        """:meth:`folding` as the content of FINN's folding configuration file.

        Nodes are numbered by kind in execution order, as FINN names them after specialising its layers.
        Thresholds, pools and FIFOs are left to FINN.
        """
        folding = self.folding(graph)
        config: dict[str, dict[str, Any]] = {"Defaults": {}}
        counts: dict[str, int] = defaultdict(int)

        def add(kind: str, values: dict[str, Any]) -> None:
            config[f"{kind}_{counts[kind]}"] = values
            counts[kind] += 1

        for layer, pe, simd in zip(graph.layers, folding.pe, folding.simd, strict=True):
            lanes = pe if layer.is_depthwise else simd
            if layer.kind == "conv" and layer.kernel != (1, 1):
                add("ConvolutionInputGenerator_rtl", {"SIMD": lanes, "ram_style": "auto"})
            elif layer.stride != (1, 1):
                add("DownSampler_hls", {"SIMD": lanes})
            fold = {"PE": pe, "SIMD": simd, "ram_style": "auto", "resType": self.multipliers}
            add("VVAU_hls" if layer.is_depthwise else "MVAU_hls", fold)
        return config

    def network_costs(self, table: LayerTable, num_layers: int) -> LayerCosts:
        """Costs of the stages of several networks of ``num_layers`` layers, each with a device of its own."""
        self._check(table)
        distinct, row = _distinct(table)
        rungs = _rungs(distinct, self.multipliers)
        rows = row.reshape(-1, num_layers)
        parts = [
            self._choose(rungs, rows[start : start + PLANS_AT_ONCE])
            for start in range(0, len(rows), PLANS_AT_ONCE)
        ]
        rung = np.concatenate([chosen.ravel() for chosen, _ in parts])
        device_share = np.concatenate([np.repeat(share, num_layers) for _, share in parts])
        cycles = rungs.cycles[row, rung]
        interval = np.repeat(cycles.reshape(-1, num_layers).max(axis=1), num_layers)
        pe, simd = (lanes[row, rung] for lanes in _lanes(distinct))
        return LayerCosts(
            latency_ms=cycles / (self.clock_mhz * 1e3),
            # Images enter and results leave by DRAM, which is not attributed to a layer.
            energy_pj=on_chip_pj(table),
            utilisation=table.macs / (interval * pe * simd),
            memory_bound=np.zeros(len(table), dtype=np.bool_),
            extra={
                "cycles": cycles.astype(np.float64),
                "pe": pe.astype(np.float64),
                "simd": simd.astype(np.float64),
                "luts": rungs.luts[row, rung],
                "brams": rungs.brams[row, rung],
                "dsps": rungs.dsps[row, rung],
                "device_share": device_share,
            },
        )

    def _choose(self, rungs: StageCosts, rows: Ints) -> tuple[Ints, Floats]:
        """Rung of every layer, shape of ``rows``, and the largest share of the device each network takes."""
        if self.target_cycles is not None:
            rung = _rung_at(rungs, rows, np.full(len(rows), self.target_cycles, dtype=np.int64))
            return rung, self._device_share(rungs, rows, rung)
        levels = np.unique(rungs.cycles)
        low, high = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), len(levels) - 1)
        # A network's interval is at least the last rung of its slowest layer.
        low = np.maximum(low, np.searchsorted(levels, rungs.cycles[:, -1][rows].max(axis=1)))
        while (low < high).any():
            middle = (low + high) // 2
            fits = self._device_share(rungs, rows, _rung_at(rungs, rows, levels[middle])) <= 1
            high = np.where(fits, middle, high)
            low = np.where(fits, low, np.minimum(middle + 1, high))
        rung = _rung_at(rungs, rows, levels[high])
        return rung, self._device_share(rungs, rows, rung)

    def _device_share(self, rungs: StageCosts, rows: Ints, rung: Ints) -> Floats:
        """Largest share of a resource each network takes."""
        used = (rungs.luts, rungs.brams, rungs.dsps)
        shares = [
            part[rows, rung].sum(axis=1) / limit for part, limit in zip(used, self.capacity, strict=True)
        ]
        return np.asarray(np.max(shares, axis=0))

    def _check(self, table: LayerTable) -> None:
        """Refuse what FINN has no unit for."""
        depthwise = (table.groups == table.in_channels) & (table.in_channels == table.out_channels)
        refuse(
            (table.weight_bits > MAX_BITS, f"weights must have 1 to {MAX_BITS} bits; give the layer bits"),
            (table.act_bits > MAX_BITS, f"activations must have 1 to {MAX_BITS} bits; give the layer bits"),
            (
                (table.groups > 1) & ~depthwise,
                "grouped convolutions must be depthwise with as many outputs as inputs",
            ),
            (table.transposed == 1, "transposed convolutions have no streaming unit here"),
            (
                (table.kernel_h * table.kernel_w == 1)
                & (table.stride_h * table.stride_w > 1)
                & ((table.stride_h != table.stride_w) | (table.in_h != table.in_w)),
                "1x1 convolutions with strides must have equal ones on a square map",
            ),
        )


def _ladder() -> Ints:
    """Pairs (PE, SIMD), each at least as parallel as the one before in both: steps of 4/3 or 3/2."""
    sizes = [1, 2] + [step << power for power in range(15) for step in (3, 4)]
    pe, simd, pairs = 0, 0, [(1, 1)]
    while simd + 1 < len(sizes):
        # SIMD leads by up to two steps: adder trees cost fewer LUTs than accumulators.
        if simd - pe < 3 and (simd + pe) % 4 < 2:
            simd += 1
        else:
            pe += 1
        pairs.append((sizes[pe], sizes[simd]))
    pairs += [(size, sizes[simd]) for size in sizes[pe + 1 :]]
    return np.array(pairs, dtype=np.int64)


LADDER = _ladder()
"""The foldings layers are priced at, shape (number of rungs, 2)."""


def _most_lanes() -> Ints:
    """By weight bits: most lanes, 2^k or 3 * 2^k, whose weights fit one word of FINN's widest stream."""
    sizes = np.unique([step << power for power in range(14) for step in (1, 3)])
    widest = WIDEST_STREAM_BITS // np.arange(1, MAX_BITS + 1)
    return np.concatenate([[0], sizes[np.searchsorted(sizes, widest, side="right") - 1]])


_MOST_LANES = _most_lanes()


def _rungs(table: LayerTable, multipliers: str) -> StageCosts:
    """Costs of every layer on every rung, shape (N, rungs): cycles never rise, resources never fall."""
    pe, simd = _lanes(table)
    costs = stage_costs(table, pe, simd, multipliers=multipliers)
    least = np.minimum.accumulate(costs.brams[:, ::-1], axis=1)[:, ::-1]
    fewest = ceil_div(table.macs, _MOST_LANES[table.weight_bits])
    return replace(costs, cycles=np.maximum(costs.cycles, fewest[:, None]), brams=least)


def _lanes(table: LayerTable) -> tuple[Ints, Ints]:
    """PE and SIMD of every layer on every rung, shape (N, rungs)."""
    pe, simd = LADDER[None, :, 0], LADDER[None, :, 1]
    # A depthwise layer has no input channels to unroll: all its lanes are output channels.
    pe = np.where(table.depthwise[:, None], pe * simd, pe)
    in_group = (table.in_channels // table.groups)[:, None]
    return np.minimum(pe, table.out_channels[:, None]), np.minimum(simd, in_group)


def _rung_at(rungs: StageCosts, rows: Ints, target: Ints) -> Ints:
    """First rung of every layer with at most ``target`` cycles, the last one where none is.

    Args:
        rungs: costs, shape (N, rungs).
        rows: layers of P networks, shape (P, L).
        target: cycles, shape (P,).
    """
    low = np.zeros(rows.shape, dtype=np.int64)
    high = np.full(rows.shape, rungs.cycles.shape[1] - 1)
    while (low < high).any():
        middle = (low + high) // 2
        quick = rungs.cycles[rows, middle] <= target[:, None]
        low = np.where(quick, low, np.minimum(middle + 1, high))
        high = np.where(quick, middle, high)
    return low


def _distinct(table: LayerTable) -> tuple[LayerTable, Ints]:
    """The different rows of a table, and which of them each row is."""
    key = np.zeros(len(table), dtype=np.int64)
    room = 1
    for column in vars(table).values():
        span = int(column.max()) + 1
        if room * span >= 2**62:  # so that the mixed-radix key cannot overflow
            _, key = np.unique(key, return_inverse=True)
            room = len(key)
        key, room = key * span + column, room * span
    _, first, row = np.unique(key, return_index=True, return_inverse=True)
    return table.take(first), row
