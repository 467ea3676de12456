from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hawq_problem import OPTIMA, hawq_tables, limit_at
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_devices import rows_of

from autocompress.agents import allocate_bits
from autocompress.core import Metric
from autocompress.core.errors import InfeasibleBudgetError

METRICS: tuple[Metric, ...] = ("weight_bytes", "bitops", "latency_ms")


def solved(metric, fraction):
    loss, cost, ties = hawq_tables()
    limits = {metric: limit_at(cost[metric], fraction)}
    chosen = [i for (i,) in allocate_bits(list(loss), {metric: list(cost[metric])}, limits, decisions=ties)]
    assert cost[metric][np.arange(19), chosen].sum() <= limits[metric] * (1 + 1e-12)
    return chosen, loss[np.arange(19), chosen].sum()


@pytest.mark.parametrize(("metric", "fraction", "limit", "optimum", "num_eight"), OPTIMA)
def test_the_nine_optima_of_hawq_v3s_resnet18_are_found(metric, fraction, limit, optimum, num_eight):
    assert limit_at(hawq_tables()[1][metric], fraction) == pytest.approx(limit, abs=1e-5)
    chosen, loss = solved(metric, fraction)
    assert loss == pytest.approx(optimum, abs=5e-7)
    assert sum(chosen) == num_eight


def test_half_the_bit_operations_gives_the_bits_known_to_be_best():
    chosen, _ = solved("bitops", 0.5)
    assert " ".join("48"[i] for i in chosen) == "8 8 8 4 8 8 8 8 4 8 8 8 4 4 4 4 4 4 4"


def test_all_limits_at_once_hold_and_cost_at_least_as_much_loss_as_each_alone():
    loss, cost, ties = hawq_tables()
    limits = {metric: limit_at(cost[metric], 0.5) for metric in METRICS}
    chosen = [
        i for (i,) in allocate_bits(list(loss), {m: list(cost[m]) for m in METRICS}, limits, decisions=ties)
    ]
    assert all(cost[m][np.arange(19), chosen].sum() <= limits[m] for m in METRICS)
    total = loss[np.arange(19), chosen].sum()
    assert total >= max(solved(m, 0.5)[1] for m in METRICS) - 1e-9
    assert all(chosen[i] == chosen[j] for i, j in ((4, 6), (9, 11), (14, 16)))


def test_a_limit_that_everything_just_meets_allows_everything():
    loss, cost, ties = hawq_tables()
    limits = {"latency_ms": float(cost["latency_ms"][:, 1].sum())}
    chosen = allocate_bits(list(loss), {"latency_ms": list(cost["latency_ms"])}, limits, decisions=ties)
    assert chosen == [(1,)] * 19
    limits = {"latency_ms": float(cost["latency_ms"][:, 0].sum())}
    chosen = allocate_bits(list(loss), {"latency_ms": list(cost["latency_ms"])}, limits, decisions=ties)
    assert chosen == [(0,)] * 19


def brute_force(loss, cost, limits, decisions):
    """Least loss over all choices that meet the limits and the ties; None if none does."""
    best = None
    for chosen in itertools.product(*(np.ndindex(array.shape) for array in loss)):
        of_name = {}
        if any(
            of_name.setdefault(name, i) != i
            for names, places in zip(decisions, chosen, strict=True)
            for name, i in zip(names, places, strict=True)
        ):
            continue
        if all(sum(t[c] for t, c in zip(cost[m], chosen, strict=True)) <= limits[m] for m in limits):
            total = sum(array[c] for array, c in zip(loss, chosen, strict=True))
            best = total if best is None else min(best, total)
    return best


@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.1), tied=st.booleans())
@settings(max_examples=60, deadline=None)
def test_small_instances_agree_with_trying_everything(seed, share, tied):
    rng = np.random.default_rng(seed)
    shapes = [(3, 2), (2,), (3, 2), (2, 2)]
    # The weights of layers 0 and 2 are tied, and the activations of layers 0 and 3.
    ties = [("w", "a"), ("x",), ("w", "b"), ("y", "a")]
    decisions = ties if tied else [tuple((i, k) for k in range(len(s))) for i, s in enumerate(shapes)]
    loss = [rng.lognormal(0, 3, shape) for shape in shapes]
    cost = {m: [rng.uniform(-1, 3, shape) for shape in shapes] for m in ("latency_ms", "energy_mj")}
    least = {m: sum(t.min() for t in tables) for m, tables in cost.items()}
    most = {m: sum(t.max() for t in tables) for m, tables in cost.items()}
    limits = {m: least[m] + share * (most[m] - least[m]) for m in cost}
    best = brute_force(loss, cost, limits, decisions)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            allocate_bits(loss, cost, limits, decisions=decisions)
        return
    chosen = allocate_bits(loss, cost, limits, decisions=decisions)
    assert sum(array[c] for array, c in zip(loss, chosen, strict=True)) == pytest.approx(best, rel=1e-6)
    for m, tables in cost.items():
        assert sum(t[c] for t, c in zip(tables, chosen, strict=True)) <= limits[m] + 1e-9


@given(seed=st.integers(0, 10**6), level=st.integers(3, 7))
@settings(max_examples=20, deadline=None)
def test_bits_follow_reverse_water_filling_up_to_rounding(seed, level):
    """min sum c/4**b with sum n*b = B has b = log2(c/n)/2 + const: whole bits must lie within one of it."""
    rng = np.random.default_rng(seed)
    sizes, bits = np.ones(10), np.arange(1, 13)
    loss = 4.0 ** rng.uniform(-2, 2, 10)
    ideal = 0.5 * np.log2(loss / sizes)
    limits = {"weight_bytes": float(level * sizes.sum())}
    exact = ideal + level - ideal.mean()
    cost = {"weight_bytes": [n * bits for n in sizes]}
    chosen = allocate_bits([c * 4.0**-bits for c in loss], cost, limits)
    found = np.array([bits[i] for (i,) in chosen])
    assert found.sum() == limits["weight_bytes"]
    assert (np.abs(found - exact) < 1).all()
    # The integrality gap: rounding one bit up costs at most what rounding another down gains.
    assert (loss * 4.0**-found).sum() >= (loss * 4.0**-exact).sum() - 1e-12


def test_no_limits_allow_the_least_loss_of_every_layer():
    assert allocate_bits([np.array([1.0, 0.0, 2.0]), np.array([[3.0, 1.0]])], {}, {}) == [(1,), (0, 1)]


def test_limits_below_the_least_are_named_with_it():
    with pytest.raises(InfeasibleBudgetError, match="weight_bytes <= 1 cannot be met: the least is 3"):
        allocate_bits([np.ones(2)] * 3, {"weight_bytes": [np.array([1.0, 2.0])] * 3}, {"weight_bytes": 1.0})


def test_ties_that_cannot_both_be_met_are_infeasible():
    cost = [np.array([0.0, 1.0]), np.array([1.0, 0.0])]  # tied layers that are cheap at different bits
    with pytest.raises(
        InfeasibleBudgetError, match=r"no choices of bits meet every limit: latency_ms <= 0\.5"
    ):
        allocate_bits([np.ones(2)] * 2, {"latency_ms": cost}, {"latency_ms": 0.5}, decisions=[("t",), ("t",)])


def test_every_fault_of_wrong_arrays_is_named_at_once():
    with pytest.raises(ValueError, match="shapes of sensitivity") as caught:
        allocate_bits(
            [np.array([1.0, np.nan]), np.ones(3)],
            {"latency_ms": [np.ones(2), np.ones(2)]},
            {"latency_ms": 1.0, "energy_mj": np.inf},
            decisions=[("t",), ("t",)],
        )
    text = str(caught.value)
    assert "sensitivity must be finite; it is not in layers 0" in text
    assert "cost in energy_mj needs one array per layer" in text
    assert "limit on energy_mj must be finite, got inf" in text
    assert "axes of decision 't' must offer as many choices, got [2, 3]" in text


def test_the_solver_writes_nothing_to_the_standard_output(capfd):
    """HiGHS has a debugging line for solutions it repairs; without our guard these two instances show it."""
    rows, bits = rows_of("haq_cloud.csv"), np.arange(2, 9)
    table = [np.array([[int(row[f"w{w}a{a}"]) for a in bits] for w in bits]) for row in rows]
    limit = 0.6 * sum(float(of_layer[-1, -1]) for of_layer in table)
    for seed in (5, 6):
        weights, acts = np.random.default_rng(seed).lognormal(0, 1.2, (53, 2)).T
        loss = [np.add.outer(w * 4.0**-bits, a * 4.0**-bits) for w, a in zip(weights, acts, strict=True)]
        allocate_bits(loss, {"latency_ms": table}, {"latency_ms": limit})
    sys.stdout.write("said by Python\n")
    assert capfd.readouterr().out == "said by Python\n"
