from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.hardware_sim.energy import DRAM_PJ_PER_BIT, mac_pj, sram_pj_per_bit


@pytest.mark.parametrize(
    ("bits", "picojoules"),
    [
        (8, 0.2 + 0.1),  # 8-bit multiply, 32-bit add
        (32, 3.7 + 0.9),  # single-precision multiply and add
    ],
)
def test_a_multiply_accumulate_costs_what_horowitz_gives(bits: int, picojoules: float) -> None:
    assert mac_pj(bits, bits) == pytest.approx(picojoules)


def test_the_integer_rule_passes_through_the_table_at_both_ends() -> None:
    # 32-bit operands are floats to the package, so the 3.1 pJ point is reached by extrapolating from below.
    products = np.array([8 * 8, 31 * 31])
    slope = np.diff(np.log(mac_pj([8, 31], [8, 31]) - 0.1)) / np.diff(np.log(products))
    at_32 = 0.2 * (32 * 32 / 64) ** slope[0]
    assert at_32 == pytest.approx(3.1)


@settings(max_examples=100)
@given(st.integers(1, 31), st.integers(1, 32))
def test_a_wider_operand_never_costs_less(weight: int, act: int) -> None:
    assert mac_pj(weight + 1, act) >= mac_pj(weight, act)
    assert mac_pj(act, weight + 1) >= mac_pj(act, weight)
    assert mac_pj(weight, act) == mac_pj(act, weight)


@pytest.mark.parametrize(("kib", "picojoules"), [(8, 10), (32, 20), (1024, 100)])
def test_sram_costs_what_horowitz_gives_per_64_bits(kib: float, picojoules: float) -> None:
    assert 64 * sram_pj_per_bit(kib) == pytest.approx(picojoules)


@settings(max_examples=50)
@given(st.floats(0.01, 1e5), st.floats(1.001, 10))
def test_a_larger_sram_costs_more_per_bit_and_less_than_its_size(kib: float, factor: float) -> None:
    ratio = sram_pj_per_bit(kib * factor) / sram_pj_per_bit(kib)
    assert 1 < ratio < factor


def test_dram_costs_640_pj_per_32_bits() -> None:
    assert DRAM_PJ_PER_BIT * 32 == 640


def test_a_buffer_without_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity must be > 0 KiB, got 0"):
        sram_pj_per_bit(0)
