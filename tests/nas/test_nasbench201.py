"""Hardware-aware search on the measured table of NAS-Bench-201."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nas_tables import CellTable, read_cells

from autocompress.core import Problem
from autocompress.nas.evolution import RegularizedEvolution
from autocompress.nas.reinforce import ReinforceSearch

DEVICES = ("raspi4", "pixel3", "fpga", "eyeriss", "titan_rtx_32", "samsung_s7")


@pytest.fixture(scope="module")
def table(shared: Path) -> CellTable:
    return read_cells(shared / "data/nas/nasbench201_acc_latency.csv")


def median_problem(table: CellTable, device: str) -> tuple[Problem, float]:
    """At most the median latency of all cells, and the best accuracy there is within it."""
    limit = float(np.median(table.latency[device]))
    return table.problem(device, limit), float(table.accuracy[table.latency[device] <= limit].max())


def test_the_table_is_the_published_one(table: CellTable) -> None:
    assert len(table.texts) == 15_625
    assert table.accuracy.max() == pytest.approx(94.37, abs=0.01)
    assert len(table.latency) == 27


@pytest.mark.parametrize("search", [RegularizedEvolution(population=10, sample=4), ReinforceSearch()])
def test_measured_latencies_that_follow_no_order_still_keep_every_budget(
    table: CellTable, search: RegularizedEvolution | ReinforceSearch
) -> None:
    problem, best = median_problem(table, "raspi4")
    trials = search(problem, num_plans=60, seed=0).trials
    assert all(problem.meets_budgets(trial.cost) for trial in trials)
    assert max(trial.score for trial in trials) <= best


@pytest.mark.slow
def test_300_looked_up_cells_come_within_three_tenths_of_the_best_on_four_of_six_devices(
    table: CellTable,
) -> None:
    reached = 0
    for device in DEVICES:
        problem, best = median_problem(table, device)
        found = [RegularizedEvolution()(problem, num_plans=300, seed=seed).best.score for seed in range(3)]
        reached += float(np.mean(found)) >= best - 0.3
    assert reached >= 4
