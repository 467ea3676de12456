"""The models' cycles against Verilog that is simulated here; needs iverilog."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from autocompress.core import Bits, LayerSpec
from autocompress.hardware_sim.bit_serial import BitSerial
from autocompress.hardware_sim.systolic import Systolic
from autocompress.hardware_sim.table import LayerTable

RTL = Path(__file__).resolve().parent / "rtl"
pytestmark = [
    pytest.mark.rtl,
    pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed"),
]


def simulate(source: str, folder: Path, **parameters: int) -> tuple[int, int]:
    """Cycles and the difference from the right result, as the test bench prints them."""
    program = folder / "bench"
    values = [f"-Pbench.{name}={value}" for name, value in parameters.items()]
    subprocess.run(
        ["iverilog", "-g2012", "-s", "bench", *values, "-o", program, RTL / source], check=True, timeout=60
    )
    shown = subprocess.run(
        ["vvp", "-n", program], check=True, timeout=60, capture_output=True, text=True
    ).stdout.split()
    return int(shown[0]), int(shown[1])


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        ((4, 4), (5, 6, 7)),
        ((8, 8), (20, 30, 19)),
        ((3, 9), (14, 7, 11)),
        ((9, 3), (14, 20, 7)),
        ((16, 16), (40, 16, 16)),
        ((1, 5), (6, 3, 4)),
    ],
)
def test_a_weight_stationary_array_in_verilog_takes_the_models_cycles(
    tmp_path: Path, array: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    machine = Systolic("rtl", *array, "ws", 1.0, 1e3, 1e3, 1e3, 1e3, 8, 1.0, 1.0)
    (rows, columns), (m, k, n) = array, shape
    cycles, wrong = simulate("systolic.v", tmp_path, ROWS=rows, COLUMNS=columns, M=m, K=k, N=n)
    assert wrong == 0
    # SCALE-Sim's figure, which the model gives, leaves out the cycle of the last output.
    assert cycles == machine.compute_cycles(np.array([m]), np.array([k]), np.array([n]))[0] + 1


@pytest.mark.parametrize(
    ("lanes", "length", "weight_bits", "act_bits"),
    [(64, 200, 3, 4), (8, 20, 1, 1), (16, 16, 8, 8), (32, 33, 2, 5)],
)
def test_a_bit_serial_dot_product_in_verilog_takes_the_models_cycles(
    tmp_path: Path, lanes: int, length: int, weight_bits: int, act_bits: int
) -> None:
    machine = BitSerial(
        name="rtl",
        rows=1,
        depth=lanes,
        columns=1,
        clock_mhz=1.0,
        dram_bits_per_cycle=1024,
        max_bits=8,
        row_buffer_words=1024,
        column_buffer_words=1024,
        board_w=1.0,
    )
    layer = LayerSpec("dot", "linear", length, 1, bits=Bits(weight_bits, act_bits))
    cycles, error = simulate(
        "bit_serial.v", tmp_path, LANES=lanes, K=length, WEIGHT_BITS=weight_bits, ACT_BITS=act_bits
    )
    assert error == 0
    assert cycles == machine.layer_costs(LayerTable.of([layer])).extra["compute_cycles"][0]
