"""A CPU or GPU: each layer is bound by arithmetic or by memory, and costs something to start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Metric
from autocompress.hardware_sim.energy import (
    FLOAT_ADD_PJ,
    FLOAT_BITS,
    FLOAT_MULT_PJ,
    HOROWITZ,
    INT_ADD_PJ,
    INT_MULT_PJ,
)
from autocompress.hardware_sim.model import HardwareModel, LayerCosts
from autocompress.hardware_sim.table import Floats, Ints, LayerTable

WIDTHS = np.array([8, 16, FLOAT_BITS])
"""int8, float16, float32; a layer runs in the narrowest that holds its weights and activations."""
MAC_PJ = np.array(
    [
        INT_MULT_PJ[8] + INT_ADD_PJ[32],
        FLOAT_MULT_PJ[16] + FLOAT_ADD_PJ[16],
        FLOAT_MULT_PJ[32] + FLOAT_ADD_PJ[32],
    ]
)


@dataclass(frozen=True)
class Roofline(HardwareModel):
    """Latency and energy by the roofline model (Williams, Waterman, Patterson, CACM 2009), layer by layer.

    ``latency = max(MACs / rate, activation bytes / bandwidth + weight bytes / bandwidth) + overhead``, with
    the rate of the layer's kind and format. A grouped convolution with ``c`` input channels per group has
    ``1 / rate = 1 / dense + (1 / depthwise - 1 / dense) / c``: it runs at the depthwise rate for c = 1 and
    nears the dense one with more channels to share the cost of gathering a window. Weights are read once per
    batch, activations are read and written once; the overhead is paid once per batch. Energy adds a constant
    power over that time.

    Differs from the paper in rates fitted to measurements instead of peak ones, by kind of layer; in two
    bandwidths, since weights stay in caches while activations also pass through the operations between the
    layers; and in the overhead. Not counted: those operations themselves, and any gain below 8 bits.

    Args:
        name: of the target.
        dense_gmacs_per_s, depthwise_gmacs_per_s, linear_gmacs_per_s: float32, 10^9 MACs per second.
        activation_gb_per_s, weight_gb_per_s: in 10^9 bytes per second.
        overhead_us: per layer and batch.
        dram_pj_per_bit: energy of one bit read or written.
        fp16_speedup, int8_speedup: of all three rates against float32; 1 where there is no faster path.
        static_w: power that does not depend on activity; 0 where none was measured, so that energy is
            the dynamic part alone.
        batch: samples priced together; figures are per sample.

    Raises:
        ValueError: a narrower format slower than a wider one, or depthwise convolutions faster than dense
            ones: a smaller network could then cost more.
    """

    kind: ClassVar[str] = "roofline"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj")
    mapping: ClassVar[str] = "one kernel call per layer; weights and activations at 8, 16 or 32 bits"
    energy_table: ClassVar[str] = f"{HOROWITZ}: arithmetic; DRAM and static power by the target"

    name: str
    dense_gmacs_per_s: float
    depthwise_gmacs_per_s: float
    linear_gmacs_per_s: float
    activation_gb_per_s: float
    weight_gb_per_s: float
    overhead_us: float
    dram_pj_per_bit: float
    fp16_speedup: float = 1.0
    int8_speedup: float = 1.0
    static_w: float = 0.0
    batch: int = 1

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.fp16_speedup <= self.int8_speedup:
            faults.append(
                "speedups must satisfy 1 <= fp16_speedup <= int8_speedup, "
                f"got {self.fp16_speedup:g} and {self.int8_speedup:g}"
            )
        if self.depthwise_gmacs_per_s > self.dense_gmacs_per_s:
            faults.append(
                f"depthwise_gmacs_per_s must be at most dense_gmacs_per_s {self.dense_gmacs_per_s:g}, "
                f"got {self.depthwise_gmacs_per_s:g}"
            )
        if faults:
            raise ValueError("; ".join(faults))

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer; ``extra`` holds compute and memory time and bytes per sample.

        Every layer kind and every width from 1 to 32 bits can be priced.
        """
        formats = np.searchsorted(WIDTHS, np.maximum(table.weight_bits, table.act_bits))
        macs_per_ms = self._macs_per_ms(table, formats)
        activation_bytes, weight_bytes = self._bytes(table, WIDTHS[formats] // 8)
        compute_ms = table.macs / macs_per_ms
        memory_ms = activation_bytes / (self.activation_gb_per_s * 1e6) + weight_bytes / (
            self.weight_gb_per_s * 1e6
        )
        latency_ms = np.maximum(compute_ms, memory_ms) + self.overhead_us * 1e-3 / self.batch
        energy_pj = {
            "mac": table.macs * MAC_PJ[formats],
            "dram": (activation_bytes + weight_bytes) * (8 * self.dram_pj_per_bit),
            "static": latency_ms * (self.static_w * 1e9),  # 1 W for 1 ms is 10^9 pJ
        }
        return LayerCosts(
            latency_ms=latency_ms,
            energy_pj=energy_pj,
            utilisation=compute_ms / latency_ms,
            memory_bound=memory_ms > compute_ms,
            extra={
                "compute_ms": compute_ms,
                "memory_ms": memory_ms,
                "activation_bytes": activation_bytes,
                "weight_bytes": weight_bytes,
            },
        )

    def _macs_per_ms(self, table: LayerTable, formats: NDArray[np.int64]) -> Floats:
        speedup = np.array([self.int8_speedup, self.fp16_speedup, 1.0])[formats]
        window = 1 / self.depthwise_gmacs_per_s - 1 / self.dense_gmacs_per_s
        grouped = 1 / (1 / self.dense_gmacs_per_s + window / (table.in_channels // table.groups))
        per_kind = np.where(table.groups > 1, grouped, self.dense_gmacs_per_s)
        per_kind = np.where(table.linear == 1, self.linear_gmacs_per_s, per_kind)
        return np.asarray(per_kind * speedup * 1e6)

    def _bytes(self, table: LayerTable, bytes_per_value: Ints) -> tuple[Floats, Floats]:
        """Bytes of activations (in and out) and of weights, for one sample."""
        values = table.in_channels * table.in_h * table.in_w + table.out_channels * table.out_h * table.out_w
        weights = table.kernel_weights * bytes_per_value / self.batch
        return (values * bytes_per_value).astype(np.float64), weights.astype(np.float64)
