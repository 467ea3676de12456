"""A fully mapped binary CNN on an FPGA: XNOR and popcount lanes per layer, all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Cost, Metric
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.core.graph import LayerGraph
from autocompress.hardware_sim.energy import HOROWITZ, on_chip_pj, with_rest
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, UnsupportedLayerError, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable, ceil_div

MAX_ACT_BITS = 8
TITAN_X_ADVANTAGE = {"small batch": (8.3, 75.0), "large batch": (1.0, 9.5)}
"""Batch size -> (times faster, times less energy) than a Titan X GPU: abstract of arXiv 1702.06392; "on a
par" at large batch is taken as 1.0."""


@dataclass(frozen=True)
class BinaryDataflow(HardwareModel):
    """Cost of a binary CNN whose layers each have their own lanes and work on different images.

    A lane takes one binary product per cycle. Layer ``l`` with ``UF`` unrolled products and ``P`` outputs in
    parallel has ``UF * P`` lanes and needs ``macs / (UF * P)`` cycles. The LUT budget is shared out so that
    the slowest layer is as fast as possible, with any whole number of lanes per layer; ``latency_ms`` is
    then the interval between images, whatever the batch. :func:`balance` gives lanes as (UF, P) that divide
    the layer's sizes. An activation of ``b`` bits counts as ``b`` bit planes, each with lanes of its own.
    Energy is the board's power times the interval, shared among the layers by their products; ``rest`` is
    what it takes beyond arithmetic and block RAM as a table prices them.

    Source: Li et al., "A GPU-Outperforming FPGA Accelerator Architecture for Binary Convolutional Neural
    Networks", arXiv 1702.06392, JETC 14(2) 2018. Differs from the paper in that lanes come from the LUT
    budget instead of by hand, and in that every lane costs the same.

    Args:
        name: of the target.
        clock_mhz: of the pipeline.
        device_luts: of the device.
        usable_lut_share: share of them the lanes may take.
        luts_per_lane: everything included.
        pipeline_overhead: measured over ideal cycles of the slowest layer.
        power_w: of the board while it runs.
        batch: samples priced together; changes nothing here.

    Raises:
        ValueError: a share above 1 or an overhead below 1.
    """

    kind: ClassVar[str] = "binary_dataflow"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj")
    mapping: ClassVar[str] = "streaming pipeline; UF x P XNOR lanes per layer, balanced within the LUTs"
    energy_table: ClassVar[str] = f"board power times time; of it arithmetic and block RAM by {HOROWITZ}"
    additive: ClassVar[bool] = False

    name: str
    clock_mhz: float
    device_luts: int
    usable_lut_share: float
    luts_per_lane: float
    pipeline_overhead: float
    power_w: float
    batch: int = 1

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.usable_lut_share <= 1:
            faults.append(f"usable_lut_share must be in (0, 1], got {self.usable_lut_share}")
        if self.pipeline_overhead < 1:
            faults.append(f"pipeline_overhead must be >= 1, got {self.pipeline_overhead}")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def lane_budget(self) -> int:
        """Lanes that fit."""
        return int(self.device_luts * self.usable_lut_share / self.luts_per_lane)

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of the stages of one network; all rows share the device."""
        return self.network_costs(table, len(table))

    def totals(self, costs: LayerCosts, num_layers: int) -> dict[Metric, Floats]:
        """Interval of the slowest stage and energy of whole networks."""
        totals = super().totals(costs, num_layers)
        totals["latency_ms"] = costs.latency_ms.reshape(-1, num_layers).max(axis=1)
        return totals

    def design(self, graph: LayerGraph) -> list[tuple[int, int]]:
        """(UF, P) of every layer, dividing its dot length and output channels; see :func:`balance`."""
        table = LayerTable.of(graph.layers)
        _check(table)
        dot = table.kernel_h * table.kernel_w * (table.in_channels // table.groups)
        shapes = list(zip(dot.tolist(), table.out_channels.tolist(), strict=True))
        return balance((table.macs * table.act_bits).tolist(), shapes, self.lane_budget)

    def network_costs(self, table: LayerTable, num_layers: int) -> LayerCosts:
        """Costs of the stages of several networks of ``num_layers`` layers, each with a device of its own."""
        _check(table)
        work = (table.macs * table.act_bits).reshape(-1, num_layers)
        pixels = (table.macs // table.kernel_weights).reshape(-1, num_layers)
        if num_layers > self.lane_budget:
            raise UnsupportedLayerError(
                f"{num_layers} layers need a lane each, the device has room for {self.lane_budget}; "
                "use a larger device"
            )
        cycles = self._shortest_interval(work, pixels)
        lanes = ceil_div(work, cycles[:, None])
        seconds = cycles * self.pipeline_overhead / (self.clock_mhz * 1e6)
        stage = ceil_div(work, lanes)
        share = work / work.sum(axis=1, keepdims=True)
        board_pj = np.asarray(share * (1e12 * self.power_w * seconds)[:, None]).ravel()
        return LayerCosts(
            latency_ms=np.asarray(stage * self.pipeline_overhead / (self.clock_mhz * 1e3)).ravel(),
            energy_pj=with_rest(on_chip_pj(table), board_pj),
            utilisation=(work / (lanes * cycles[:, None] * self.pipeline_overhead)).ravel(),
            memory_bound=np.zeros(len(table), dtype=np.bool_),
            extra={
                "lanes": lanes.ravel().astype(np.float64),
                "luts": np.asarray(lanes * self.luts_per_lane).ravel(),
                "cycles": stage.ravel().astype(np.float64),
            },
        )

    def _shortest_interval(self, work: Ints, pixels: Ints) -> Ints:
        """Fewest cycles per image of each network, shape (P,): bisection, more cycles never take more lanes.

        Args:
            work: binary products per layer, shape (P, L).
            pixels: cycles of each layer with every product of an output position in parallel.
        """
        low, high = pixels.max(axis=1), np.maximum(pixels.max(axis=1), work.max(axis=1))
        while (low < high).any():
            middle = (low + high) // 2
            fits = ceil_div(work, middle[:, None]).sum(axis=1) <= self.lane_budget
            low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
        return np.asarray(high)


@dataclass(frozen=True, eq=False)
class Threshold:
    """Batch normalisation and sign as a comparison of popcounts.

    Args:
        popcount: smallest (``rising``) or largest (falling) popcount that gives +1, shape (channels,).
        rising: whether +1 lies above the threshold, shape (channels,); False where gamma is negative.
    """

    popcount: Ints
    rising: NDArray[np.bool_]

    def __call__(self, popcount: Ints) -> NDArray[np.bool_]:
        """Whether the output is +1; ``popcount`` has the channels last."""
        return np.where(self.rising, popcount >= self.popcount, popcount <= self.popcount)


def xnor_popcount(weights: NDArray[np.bool_], inputs: NDArray[np.bool_]) -> Ints:
    """Number of equal bits along the last axis.

    With +1 stored as True and -1 as False, the dot product of K values is ``2 * popcount - K``.
    """
    return np.asarray(np.count_nonzero(np.equal(weights, inputs), axis=-1), dtype=np.int64)


def fold_batch_norm(
    gamma: Floats, beta: Floats, *, mean: Floats, deviation: Floats, dot_length: int
) -> Threshold:
    """The comparison that equals ``sign(gamma * (dot - mean) / deviation + beta)``, with sign(0) = +1.

    ``dot = 2 * popcount - dot_length`` is at least ``mean - beta * deviation / gamma`` for a positive gamma,
    at most that for a negative one, which turns max-pooling before it into min-pooling.

    Args:
        gamma, beta, mean, deviation: of the normalisation, shape (channels,); deviation > 0.
        dot_length: number of products.

    Source: Li et al., arXiv 1702.06392 (NormBinarize).
    """
    rising = gamma >= 0
    safe = np.where(gamma == 0, 1.0, gamma)
    bound = (mean - beta * deviation / safe + dot_length) / 2
    popcount = np.where(rising, np.ceil(bound), np.floor(bound))
    constant = np.where(beta >= 0, 0, dot_length + 1)  # without gamma the input does not matter
    popcount = np.clip(np.where(gamma == 0, constant, popcount), -1, dot_length + 1)
    return Threshold(popcount.astype(np.int64), rising)


def balance(
    products: Sequence[int], shapes: Sequence[tuple[int, int]], lane_budget: int
) -> list[tuple[int, int]]:
    """(UF, P) per layer that make the slowest layer as fast as a number of lanes allows.

    Exact: for a given number of cycles each layer takes the fewest lanes on its own, and more cycles never
    need more lanes, so the smallest number of cycles is found by bisection.

    Args:
        products: binary products of each layer for one image.
        shapes: (dot length, output channels) of each layer; UF divides the one, P the other.
        lane_budget: sum of ``UF * P`` over the layers.

    Raises:
        InfeasibleBudgetError: fewer lanes than layers.
    """
    if lane_budget < len(products):
        raise InfeasibleBudgetError(f"{len(products)} layers need as many lanes, got {lane_budget}")
    options = [_lane_options(*shape) for shape in shapes]
    cycles = [ceil_div(np.array(work), lanes) for work, (lanes, _) in zip(products, options, strict=True)]
    levels = np.unique(np.concatenate(cycles))
    low, high = int(np.searchsorted(levels, max(c.min() for c in cycles))), len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        used = sum(int(o[0][c <= levels[middle]][0]) for o, c in zip(options, cycles, strict=True))
        low, high = (low, middle) if used <= lane_budget else (middle + 1, high)
    return [o[1][int(np.argmax(c <= levels[high]))] for o, c in zip(options, cycles, strict=True)]


def titan_x_costs(ours: Cost) -> dict[str, Cost]:
    """What the paper's ratios say a Titan X takes for the network that costs ``ours``, by batch size."""
    return {
        batch: Cost({"latency_ms": ours["latency_ms"] * faster, "energy_mj": ours["energy_mj"] * leaner})
        for batch, (faster, leaner) in TITAN_X_ADVANTAGE.items()
    }


def _lane_options(dot_length: int, out_channels: int) -> tuple[Ints, list[tuple[int, int]]]:
    """Numbers of lanes, ascending, and the (UF, P) of each; of equal products the larger UF."""
    pairs = {
        unroll * parallel: (unroll, parallel)
        for unroll in range(1, dot_length + 1)
        if dot_length % unroll == 0
        for parallel in range(1, out_channels + 1)
        if out_channels % parallel == 0
    }
    lanes = sorted(pairs)
    return np.array(lanes, dtype=np.int64), [pairs[n] for n in lanes]


def _check(table: LayerTable) -> None:
    refuse(
        (table.weight_bits != 1, "weights must have 1 bit"),
        (table.act_bits > MAX_ACT_BITS, f"activations must have 1 to {MAX_ACT_BITS} bits"),
        (table.transposed == 1, "transposed convolutions are not mapped"),
    )
