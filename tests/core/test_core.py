"""Laws of graphs, plans, budgets, problems, results and the ledger."""

from __future__ import annotations

import itertools
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import (
    Bits,
    Budget,
    ChannelGroup,
    Cost,
    Entry,
    Knob,
    LayerGraph,
    LayerSpec,
    Ledger,
    Plan,
    Problem,
    Result,
    SearchResult,
    Trial,
    Width,
    finalists,
)
from autocompress.core.errors import InfeasibleBudgetError, RunDirectoryError
from autocompress.hardware_sim import MacsModel


def chain() -> LayerGraph:
    """conv 3->8 with BatchNorm, depthwise, then linear over 4 positions."""
    a = Width(0, (("a", 1),))
    return LayerGraph(
        layers=(
            LayerSpec("a", "conv", 3, 8, (3, 3), (1, 1), 1, (4, 4), (4, 4), False, Width(3), a),
            LayerSpec("dw", "conv", 8, 8, (3, 3), (2, 2), 8, (4, 4), (2, 2), True, a, a),
            LayerSpec("fc", "linear", 32, 10, bias=True, in_width=Width(0, (("a", 4),)), out_width=Width(10)),
        ),
        groups=(
            ChannelGroup("a", 8, ("a", "dw"), ("dw", "fc")),
            ChannelGroup("fc", 10, ("fc",), (), "its channels are the network's output"),
        ),
        other_params=Width(0, (("a", 2),)),
    )


def test_macs_and_params_follow_their_closed_forms() -> None:
    cost = MacsModel()(chain())
    assert cost["macs"] == 8 * 3 * 9 * 16 + 8 * 9 * 4 + 32 * 10
    assert cost["params"] == 8 * 3 * 9 + (8 * 9 + 8) + (32 * 10 + 10) + 2 * 8
    assert cost["bitops"] == cost["macs"] * 32 * 32
    assert cost["weight_bytes"] == 4 * cost["params"]
    small = MacsModel()(chain().with_channels({"a": 3}))
    assert small["macs"] == 3 * 3 * 9 * 16 + 3 * 9 * 4 + 12 * 10
    assert small["params"] == 3 * 3 * 9 + (3 * 9 + 3) + (12 * 10 + 10) + 2 * 3


def test_four_bit_weights_take_an_eighth_of_the_bytes_and_biases_stay() -> None:
    cost = MacsModel()(chain().with_bits({"fc": Bits(4, 8)}))
    assert cost.layers["fc"]["weight_bytes"] == 320 / 2 + 4 * 10
    assert cost.layers["fc"]["bitops"] == 320 * 4 * 8


@given(st.integers(1, 8), st.integers(1, 8))
def test_fewer_channels_never_raise_any_metric(a: int, b: int) -> None:
    low, high = (MacsModel()(chain().with_channels({"a": n})) for n in sorted((a, b)))
    assert all(low[metric] <= high[metric] for metric in MacsModel.metrics)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"a": 0}, "from 1 to 8"),
        ({"a": 9}, "from 1 to 8"),
        ({"b": 1}, "no channel group"),
        ({"fc": 5}, "locked"),
    ],
)
def test_impossible_channel_choices_are_refused(channels: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain().with_channels(channels)


def test_bits_of_an_unknown_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer named"):
        chain().with_bits({"conv9": Bits(8, 8)})


names = st.text("abc.0_", min_size=1, max_size=6)
plans = st.builds(
    Plan,
    arch=st.dictionaries(names, names, max_size=3),
    channels=st.dictionaries(names, st.integers(1, 999), max_size=3),
    bits=st.dictionaries(names, st.builds(Bits, st.integers(1, 32), st.integers(1, 32)), max_size=3),
)


@given(plans)
def test_plans_survive_json_and_equal_plans_have_equal_digests(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    reordered = Plan(plan.arch, dict(reversed(plan.channels.items())), plan.bits)
    assert reordered.digest == plan.digest


@pytest.mark.parametrize(
    "text", ["", "[]", '{"channel":{}}', '{"bits":{"a":[99,1]}}', '{"channels":{"a":"x"}}']
)
def test_texts_that_are_no_plan_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(text)


def test_the_empty_plan_changes_nothing() -> None:
    assert Plan().apply(chain()) == chain()


@pytest.mark.parametrize(
    ("metric", "limit", "relative", "message"),
    [
        ("macs", 0.0, True, "must be > 0, got 0"),
        ("macs", float("nan"), False, "must be > 0"),
        ("macs", 1.5, True, "relative: false"),
        ("flops", 0.5, True, "one of macs"),
    ],
)
def test_impossible_budgets_are_refused(metric: str, limit: float, relative: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(metric, limit, relative)  # type: ignore[arg-type]


def problem(budget: float, sizes: tuple[int, ...] = (5, 4, 7), params: float | None = None) -> Problem:
    """Cost: a coupled product of neighbouring widths, as in a chain of layers."""

    def price(plan: Plan) -> Cost:
        widths = [1.0, *(plan.channels.get(f"k{i}", n) for i, n in enumerate(sizes)), 1.0]
        pairs = list(itertools.pairwise(widths))
        return Cost({"macs": sum(a * b for a, b in pairs), "params": sum(widths)})

    knobs = tuple(Knob("channels", f"k{i}", tuple(range(1, n + 1))) for i, n in enumerate(sizes))
    largest = price(Plan())
    budgets = [Budget("macs", budget).resolve(largest)]
    if params is not None:
        budgets.append(Budget("params", params).resolve(largest))
    return Problem(knobs, tuple(budgets), price, lambda plan: float(sum(plan.channels.values())))


@settings(max_examples=200)
@given(st.floats(0.1, 1.0), st.floats(0.4, 1.0), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_every_bounded_assignment_meets_every_budget_and_clip_is_idempotent(
    macs: float, params: float, fractions: list[float]
) -> None:
    p = problem(macs, params=params)
    if not p.meets_budgets(p.smallest):
        with pytest.raises(InfeasibleBudgetError):
            p.reachable()
        return
    values: list[int | str] = []
    for knob, fraction in zip(p.knobs, fractions, strict=True):
        clipped = p.clip(values, knob.at(fraction))
        assert p.feasible([*values, clipped])
        assert p.clip(values, clipped) == clipped
        above = [c for c in knob.choices if clipped < c <= knob.at(fraction)]  # type: ignore[operator]
        assert not any(p.feasible([*values, c]) for c in above)  # the largest that can still be met
        values.append(clipped)
    assert p.meets_budgets(p.assess(values, index=0).cost)


def test_an_impossible_budget_says_the_smallest_reachable() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"smallest reachable macs is 4 \(6.7% of 60\)"):
        problem(0.01).reachable()


def test_a_relative_budget_in_a_problem_is_refused() -> None:
    p = problem(0.5)
    with pytest.raises(ValueError, match="relative"):
        Problem(p.knobs, (Budget("macs", 0.5),), p.price, p.evaluate)


def test_a_plan_over_budget_is_never_assessed() -> None:
    with pytest.raises(ValueError, match="over budget"):
        problem(0.5).assess([5, 4, 7], index=0)


def test_a_score_that_is_not_finite_is_refused() -> None:
    p = problem(1.0)
    broken = Problem(p.knobs, p.budgets, p.price, lambda plan: float("nan"))
    with pytest.raises(ValueError, match="finite"):
        broken.assess([1, 1, 1], index=0)


@given(st.integers(1, 9), st.floats(-1, 2))
def test_fractions_map_to_equal_bins_and_back(count: int, fraction: float) -> None:
    knob = Knob("channels", "k", tuple(range(1, count + 1)))
    assert all(knob.at(knob.fraction_of(choice)) == choice for choice in knob.choices)
    assert knob.at(fraction) == min(max(int(min(max(fraction, 0), 1) * count), 0), count - 1) + 1


def test_knobs_with_unsorted_choices_or_wild_features_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Knob("channels", "k", (2, 1))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Knob("channels", "k", (1, 2), (1.5,))


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    points = [(10.0, 0.5), (20.0, 0.4), (30.0, 0.9), (30.0, 0.8), (40.0, 0.9)]
    trials = tuple(Trial(Plan(), score, Cost({"macs": macs}), i) for i, (macs, score) in enumerate(points))
    result = SearchResult(trials)
    assert [t.index for t in result.pareto("macs")] == [0, 2]
    assert result.best.index == 2


def test_finalists_are_the_best_plans_once_each_and_the_best_of_every_search() -> None:
    def searched(*scores: float) -> SearchResult:
        return SearchResult(tuple(Trial(Plan(channels={"a": int(100 * s)}), s, Cost({}), 0) for s in scores))

    results = [searched(0.9, 0.2, 0.8, 0.9), searched(0.1, 0.3), searched(0.8)]
    assert [t.score for t in finalists(results, 1)] == [0.9, 0.3, 0.8]
    assert [t.score for t in finalists(results, 3)] == [0.9, 0.8, 0.3]
    assert [t.score for t in finalists(results, 0)] == [0.9, 0.3, 0.8]


def test_a_problem_scored_in_part_has_finals_that_ledgers_keep_apart() -> None:
    whole = problem(1.0)
    part = replace(whole, evaluate=lambda plan: 0.25, evaluate_fully=whole.evaluate)
    plan = whole.plan([whole.knobs[0].choices[0]])
    finals = part.finals()
    assert finals is not None
    assert finals.evaluate(plan) == whole.evaluate(plan) != part.evaluate(plan)
    assert finals.digest != part.digest == whole.digest
    assert finals.finals() is None is whole.finals()


def test_results_survive_json() -> None:
    result = Result("r", {"macs": 2.0}, {"macs": 1.0}, Plan(channels={"a": 3}), {"macs": 1.0}, {"n": 1})
    assert Result.from_json(result.to_json()) == result


def test_a_ledger_answers_for_what_it_has_seen_and_only_for_that_problem(tmp_path: Path) -> None:
    calls: list[Plan] = []
    p = problem(1.0)

    def counted(plan: Plan) -> float:
        calls.append(plan)
        return p.evaluate(plan)

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        recorded = ledger.in_front_of(Problem(p.knobs, p.budgets, p.price, counted))
        first = recorded.assess([1, 2, 3], index=0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        again = ledger.in_front_of(Problem(p.knobs, p.budgets, p.price, counted)).assess([1, 2, 3], index=0)
        assert (again.score, len(calls)) == (first.score, 1)
        other = ledger.in_front_of(Problem(p.knobs, p.budgets, p.price, counted, identity="other weights"))
        other.assess([1, 2, 3], index=0)
        assert len(calls) == 2
        assert len(ledger.entries()) == 2
        assert len(ledger.entries(other)) == 1


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(RunDirectoryError, match="ledger"):
        Ledger(path)


def test_a_full_disk_keeps_earlier_rows(tmp_path: Path) -> None:
    p = problem(1.0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.put(p, Entry(p.plan([1, 1, 1]), 0.5, {"macs": 1.0}, 0.0))
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count={pages}")
        big = Plan(channels={f"k{i}": 1 for i in range(20000)})
        with pytest.raises(RunDirectoryError, match="full"):
            ledger.put(p, Entry(big, 0.5, {"macs": 1.0}, 0.0))
        assert len(ledger.entries()) == 1
    assert sqlite3.connect(tmp_path / "ledger.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)
