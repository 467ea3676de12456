"""How long one image takes through an empty streaming pipeline: stages overlap row by row."""

from __future__ import annotations

import numpy as np

from autocompress.hardware_sim.table import Floats, Ints, LayerTable


def first_image_cycles(table: LayerTable, cycles: Ints | Floats) -> float:
    """Cycles until the last result of a single image, all stages empty at the start.

    A stage writes its output rows one after the other at an even pace, each as soon as the row before it is
    written and the input rows under its windows have arrived. Sliding windows also wait for the rows that the
    next windows add, because the unit reads those while it writes (finn-hlslib's; FINN's RTL unit reads on
    while it waits and is quicker by that). Linear and 1x1 layers have no such unit. What lies between layers,
    pooling above all, hands rows on as soon as it has them.

    Layers are taken as one chain in execution order, so parallel branches count one after the other. Moving
    the image in and the results out takes no time.

    Args:
        table: the layers of one network.
        cycles: of each stage for one image, shape (layers,).
    """
    written = np.zeros(1)
    for i, total in enumerate(np.asarray(cycles, dtype=np.float64)):
        arrived = _handed_on(written, int(table.in_h[i]))
        waits = arrived[_last_rows(table, i)]
        pace = total / len(waits)
        steps = pace * np.arange(len(waits))
        written = np.maximum.accumulate(waits - steps) + steps + pace
    return float(written[-1])


def _handed_on(written: Floats, rows: int) -> Floats:
    """When each of the rows that the next layer reads is there; fewer rows are pooled ones."""
    last = -(-np.arange(1, rows + 1) * len(written) // rows) - 1
    return written[last]


def _last_rows(table: LayerTable, layer: int) -> Ints:
    """Last input row that must have arrived for each output row, shape (output rows,)."""
    sizes = (table.kernel_h, table.stride_h, table.in_h, table.out_h)
    kernel, stride, rows_in, rows_out = (int(column[layer]) for column in sizes)
    padding = max(0, (rows_out - 1) * stride + kernel - rows_in)
    window_unit = table.kernel_h[layer] * table.kernel_w[layer] * table.stride_h[layer] > 1
    ahead = stride if window_unit else 0
    last = stride * np.arange(rows_out) + kernel - 1 - padding // 2 + ahead
    return np.asarray(np.clip(last, 0, rows_in - 1), dtype=np.int64)
