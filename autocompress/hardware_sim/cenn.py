"""A mixed-signal cellular neural network: layers as settling analogue arrays of 3x3-coupled cells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autocompress.core.cost import Cost, Metric
from autocompress.hardware_sim.energy import HOROWITZ, mac_pj
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable, ceil_div

TEMPLATE_SIDE = 3
"""Cells are coupled to their eight neighbours (Chua and Yang, 1988)."""


@dataclass(frozen=True)
class CellularNetwork(HardwareModel):
    """Cost of a CNN whose convolutions settle on an array of analogue cells.

    A convolution is, for every pair of input and output channel, every 3x3 part of the kernel and every
    array-sized tile of the output, one template operation: load, then settle for
    :func:`settling_time_ns`. Partial results add up as currents; each output is converted once. Linear
    layers run on digital multipliers beside the array.

    Source: Lou et al., "A mixed signal architecture for convolutional neural networks", arXiv 1811.02636,
    for the architecture; cell dynamics of Chua and Yang, IEEE TCAS 35(10) 1988. The paper's circuit figures
    are not published in a form this model could take, so every constant is the user's: compare designs
    priced with one set, and read nothing into absolute values of the illustrative target.

    Args:
        name: of the target.
        cell_rows, cell_columns: size of one array.
        num_arrays: arrays that work at once, each on a template operation of its own.
        tau_ns: time constant of a cell, resistance times capacitance.
        load_ns: time to load a template and its inputs before settling.
        cell_uw: power of one cell while it settles.
        adc_fj_per_level: energy of a conversion per level; a ``b``-bit conversion has ``2**b`` levels.
        memory_pj_per_bit: to read a weight or an activation.
        digital_macs_per_ns: rate of the multipliers of linear layers.
        widest_bits: most bits of weights and activations the circuit resolves.
        batch: samples priced together; the energy to read templates is shared by all of them. Time is not
            saved: ``load_ns`` is mostly the inputs', which every sample loads anew.
    """

    kind: ClassVar[str] = "cenn"
    metrics: ClassVar[tuple[Metric, ...]] = ("latency_ms", "energy_mj")
    mapping: ClassVar[str] = "3x3 templates on analogue cell arrays, linear layers digital"
    energy_table: ClassVar[str] = f"cell power, converter and memory energies of the target; MACs {HOROWITZ}"

    name: str
    cell_rows: int
    cell_columns: int
    num_arrays: int
    tau_ns: float
    load_ns: float
    cell_uw: float
    adc_fj_per_level: float
    memory_pj_per_bit: float
    digital_macs_per_ns: float
    widest_bits: int
    batch: int = 1

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of every layer of a table.

        Raises:
            UnsupportedLayerError: transposed layers, or bits the circuit does not resolve.
        """
        self._check(table)
        linear = table.linear == 1
        operations = np.where(linear, 0, self._operations(table))
        settle_ns = operations * settling_time_ns(self.tau_ns, table.act_bits)
        digital_macs = np.where(linear, table.macs, 0)
        rounds = ceil_div(operations, self.num_arrays)
        array_ns = rounds * (self.load_ns + settling_time_ns(self.tau_ns, table.act_bits))
        return LayerCosts(
            latency_ms=(array_ns + digital_macs / self.digital_macs_per_ns) * 1e-6,
            energy_pj={
                # microwatts times nanoseconds are femtojoules
                "cells": settle_ns * self.cell_rows * self.cell_columns * self.cell_uw * 1e-3,
                "adc": self._conversion_levels(table) * self.adc_fj_per_level * 1e-3,
                "mac": digital_macs * mac_pj(table.weight_bits, table.act_bits),
                "memory": self._memory_bits(table, operations) * self.memory_pj_per_bit,
            },
            utilisation=self._occupancy(table, operations),
            memory_bound=np.zeros(len(table), dtype=np.bool_),
            extra={"operations": operations.astype(np.float64)},
        )

    def _operations(self, table: LayerTable) -> Ints:
        """Template operations of one sample."""
        parts = ceil_div(table.kernel_h, TEMPLATE_SIDE) * ceil_div(table.kernel_w, TEMPLATE_SIDE)
        tiles = ceil_div(table.out_h, self.cell_rows) * ceil_div(table.out_w, self.cell_columns)
        return np.asarray((table.in_channels // table.groups) * table.out_channels * parts * tiles)

    def _conversion_levels(self, table: LayerTable) -> Floats:
        """Outputs times levels of each conversion."""
        outputs = np.where(table.linear == 1, 0, table.out_channels * table.out_h * table.out_w)
        return np.asarray(outputs * np.exp2(table.act_bits), dtype=np.float64)

    def _memory_bits(self, table: LayerTable, operations: Ints) -> Floats:
        """Bits read: templates once per operation and batch, inputs of a tile once per operation."""
        side = TEMPLATE_SIDE**2
        tile = np.minimum(table.out_h, self.cell_rows) * np.minimum(table.out_w, self.cell_columns)
        analogue = operations * (side * table.weight_bits / self.batch + tile * table.act_bits)
        weights, inputs = table.kernel_weights * table.weight_bits / self.batch, table.macs * table.act_bits
        return np.asarray(np.where(table.linear == 1, weights + inputs, analogue), dtype=np.float64)

    def _occupancy(self, table: LayerTable, operations: Ints) -> Floats:
        """Share of cell-operations that hold an output of the layer; 1 for digital layers."""
        cells = operations * self.cell_rows * self.cell_columns
        tiles = ceil_div(table.out_h, self.cell_rows) * ceil_div(table.out_w, self.cell_columns)
        used = operations // np.maximum(tiles, 1) * table.out_h * table.out_w
        return np.asarray(np.where(table.linear == 1, 1.0, used / np.maximum(cells, 1)))

    def _check(self, table: LayerTable) -> None:
        limit = f"1 to {self.widest_bits} bits on {self.name}; give the layer bits"
        refuse(
            (table.weight_bits > self.widest_bits, f"weights must have {limit}"),
            (table.act_bits > self.widest_bits, f"activations must have {limit}"),
            (table.transposed == 1, "transposed convolutions have no template"),
        )


def settling_time_ns(tau_ns: float, bits: Ints) -> Floats:
    """Time until a cell is within half a step of ``bits`` bits: ``tau * ln(2**(bits + 1))``."""
    return np.asarray(tau_ns * math.log(2) * (np.asarray(bits) + 1.0))


def energy_delay_product(cost: Cost) -> float:
    """Energy times time of one sample, in mJ ms."""
    return cost["energy_mj"] * cost["latency_ms"]


def saturate(state: Floats) -> Floats:
    """Output of a cell: its state limited to [-1, 1] (Chua and Yang, equation 2c)."""
    return np.asarray((np.abs(state + 1) - np.abs(state - 1)) / 2)


def rectify(values: Floats) -> Floats:
    """ReLU of values up to 2 by one saturation: the lower bend is shifted to zero."""
    return saturate(values - 1) + 1


def larger(first: Floats, second: Floats) -> Floats:
    """Maximum of two values in [-1, 1] as ``first + relu(second - first)``: one step of a max-pool."""
    return first + rectify(second - first)


def settle(
    inputs: Floats, template: Floats, bias: float, *, num_tau: float, step_tau: float = 0.01
) -> Floats:
    """State of an array of cells that start at zero, driven by a feed-forward template.

    Explicit Euler on ``tau dx/dt = -x + template * inputs + bias``; at rest the state is the correlation of
    the inputs with the template, as in a convolutional layer.

    Args:
        inputs: shape (rows, columns); cells beyond the border are zero.
        template: shape (3, 3).
        bias: added to every cell.
        num_tau: time simulated, in time constants.
        step_tau: step, in time constants.
    """
    rows, columns = inputs.shape
    padded = np.pad(inputs, 1)
    drive = np.full(inputs.shape, bias, dtype=np.float64)
    for i in range(TEMPLATE_SIDE):
        for j in range(TEMPLATE_SIDE):
            drive += template[i, j] * padded[i : i + rows, j : j + columns]
    state = np.zeros(inputs.shape)
    for _ in range(round(num_tau / step_tau)):
        state += step_tau * (drive - state)
    return state
