"""Two machines get two networks: the best of 117,649 for each, and each dearer on the other machine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from nas_tables import search_table, table_costs, table_space
from numpy.typing import NDArray

from autocompress.core import Budget, Cost, Knob, Plan, Problem
from autocompress.nas.evolution import RegularizedEvolution
from autocompress.nas.supernet import Adam, CostTerm, ProxylessNAS

# Six blocks of seven operations: none, then kernel 3, 5, 7 at expansion 3 and at expansion 6.
KERNEL = np.array([0.0, 1, 2, 3, 1, 2, 3])
EXPAND = np.array([0.0, 1, 1, 1, 2, 2, 2])
# Errors fall with both, less so in later blocks; every block differs a little, so that no two networks tie.
ERRORS = np.stack(
    [
        -(1 - 0.05 * block) * (0.5 * np.sqrt(KERNEL) + 0.7 * np.sqrt(EXPAND))
        + 0.01 * np.random.default_rng(block).uniform(size=7)
        for block in range(6)
    ]
)
MACHINES = {
    "kernels cost": np.tile(0.45 * KERNEL + 0.05 * EXPAND, (6, 1)),
    "width costs": np.tile(0.05 * KERNEL + 0.60 * EXPAND, (6, 1)),
}


def totals(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of every one of the 117,649 networks."""
    total = np.zeros(1)
    for row in table:
        total = (total[:, None] + row).ravel()
    return total


def chosen(machine: str, variant: str) -> list[int]:
    cost = CostTerm(table_costs(MACHINES[machine]), 1.0, weight=1.0)
    method, alpha = ProxylessNAS(variant), Adam(0.05, (0.0, 0.999))  # type: ignore[arg-type]
    supernet = search_table(table_space(ERRORS), method, num_steps=300, seed=0, alpha=alpha, cost=cost)
    return [int(op[1:]) for op in supernet.derive().values()]


def value(table: NDArray[np.float64], network: list[int]) -> float:
    return float(sum(row[op] for row, op in zip(table, network, strict=True)))


@pytest.mark.parametrize("variant", ["full", pytest.param("two", marks=pytest.mark.slow)])
def test_each_machine_gets_its_own_best_of_117649_networks(variant: str) -> None:
    found = {machine: chosen(machine, variant) for machine in MACHINES}
    for machine, network in found.items():
        objective = ERRORS + MACHINES[machine]
        assert value(objective, network) == pytest.approx(totals(objective).min())
        (other,) = (n for m, n in found.items() if m != machine)
        assert value(objective, other) > value(objective, network) + 0.5
    assert totals(ERRORS).size == 117_649
    kernels, widths = ([np.mean(scale[found[machine]]) for machine in MACHINES] for scale in (KERNEL, EXPAND))
    assert kernels[0] < kernels[1]
    assert widths[0] > widths[1]


def test_evolution_within_a_latency_finds_other_networks_for_other_machines_near_their_best() -> None:
    found = {}
    for machine, latency in MACHINES.items():
        all_costs, all_errors = totals(latency), totals(ERRORS)
        limit = float(np.quantile(all_costs, 0.2))
        names = [f"d{block}" for block in range(6)]

        def total(table: NDArray[np.float64], plan: Plan, names: list[str] = names) -> float:
            return value(table, [int(plan.arch[name]) for name in names])

        knobs = tuple(
            Knob("arch", name, tuple(str(i) for i in np.argsort(latency[0], kind="stable"))) for name in names
        )
        problem = Problem(
            knobs,
            (Budget("latency_ms", limit, relative=False),),
            lambda plan, latency=latency, total=total: Cost({"latency_ms": total(latency, plan)}),
            lambda plan, total=total: -total(ERRORS, plan),
        )
        best = RegularizedEvolution()(problem, num_plans=300, seed=0).best
        fitting = np.sort(all_errors[all_costs <= limit + 1e-9])
        assert best.cost["latency_ms"] <= limit + 1e-9
        # Among the best thousandth of all that fit.
        assert -best.score <= fitting[len(fitting) // 1000]
        found[machine] = [int(best.plan.arch[name]) for name in names]
    kernel_machine, width_machine = found.values()
    assert value(MACHINES["width costs"], kernel_machine) > value(MACHINES["width costs"], width_machine)
    assert value(MACHINES["kernels cost"], width_machine) > value(MACHINES["kernels cost"], kernel_machine)


def test_the_table_is_summed_in_the_order_of_its_members() -> None:
    small = ERRORS[:2]
    assert totals(small).tolist() == pytest.approx([a + b for a, b in itertools.product(*small)])
