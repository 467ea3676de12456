"""What plans cost on a recipe's target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core import Bits, Budget, Knob, LayerGraph, Plan, Problem
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.hardware_sim import MacsModel, load_target
from autocompress.hardware_sim.lookup import Lookup
from autocompress.pipeline.costs import Costs, content_digest, share_for_first
from autocompress.pipeline.price import traced_graph
from autocompress.pipeline.recipe import Recipe

EIGHT = Bits(8, 8)


@pytest.fixture(scope="module")
def graph() -> LayerGraph:
    return traced_graph("digits_vgg", input_shape=(1, 8, 8), num_classes=10)


def at(graph: LayerGraph, bits: Bits) -> LayerGraph:
    return graph.with_bits({layer.name: bits for layer in graph.layers})


def test_a_plan_costs_what_is_counted_and_what_the_target_says_layer_by_layer(graph: LayerGraph) -> None:
    target = load_target("bismo-zynq7020")
    group = graph.prunable[0]
    plan = Plan(channels={group.name: group.size // 2}, bits={graph.layers[1].name: Bits(3, 5)})
    cost = Costs(graph, target, bits=EIGHT)(plan)
    changed = plan.apply(at(graph, EIGHT))
    counts, figures = MacsModel()(changed), target(changed)
    assert cost.totals == {**counts.totals, **figures.totals}
    for layer in graph.layers:
        assert cost.layers[layer.name] == {**counts.layers[layer.name], **figures.layers[layer.name]}
    assert Costs(graph)(plan).totals == MacsModel()(plan.apply(graph)).totals


@pytest.mark.parametrize("name", [None, "bismo-zynq7020", "finn-zynq7020", "bitfusion"])
def test_tabulated_prices_are_the_prices(name: str | None, graph: LayerGraph) -> None:
    costs = Costs(graph, load_target(name) if name else None, bits=EIGHT)
    groups = [Knob("channels", g.name, tuple(range(2, g.size + 1))) for g in graph.prunable]
    first, *others = [layer.name for layer in graph.layers]
    tied = [Knob(kind, others[0], (2, 4, 8), layers=tuple(others)) for kind in ("weight_bits", "act_bits")]  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for knobs, base in (
        (groups, Plan()),
        (tied, Plan(channels={groups[0].name: 3}, bits={first: Bits(8, 4)})),
    ):
        problem = Problem(tuple(knobs), (), costs.tabulated(knobs, base), lambda plan: 0.0, base=base)
        for _ in range(10):
            plan = problem.plan([knob.at(rng.random()) for knob in knobs])
            fast, slow = problem.price(plan), costs(plan)
            assert fast.totals == pytest.approx(slow.totals, rel=1e-12)
            assert dict(fast.layers) == dict(slow.layers)


def test_an_impossible_budget_names_the_layers_that_hold_it_up(graph: LayerGraph) -> None:
    costs = Costs(graph, load_target("bismo-zynq7020"), bits=EIGHT)
    knobs = tuple(Knob("channels", g.name, tuple(range(2, g.size + 1))) for g in graph.prunable)
    budgets = (Budget("latency_ms", 1e-6, relative=False),)
    problem = Problem(knobs, budgets, costs.tabulated(knobs), lambda plan: 0.0)
    smallest = costs(problem.plan([knob.choices[0] for knob in knobs]))
    worst = max(smallest.layers, key=lambda name: smallest.layers[name]["latency_ms"])
    share = smallest.layers[worst]["latency_ms"] / smallest["latency_ms"]
    with pytest.raises(InfeasibleBudgetError, match=rf"held up by {worst} \({share:.0%}\)"):
        problem.reachable()


@pytest.mark.parametrize(
    ("bits", "reference_bits", "expected"),
    [(None, None, 32), (EIGHT, None, 32), (EIGHT, EIGHT, 8), (None, EIGHT, 8)],
)
def test_relative_budgets_refer_to_the_network_at_the_reference_bits(
    graph: LayerGraph, bits: Bits | None, reference_bits: Bits | None, expected: int
) -> None:
    target = load_target("xeon-amx")  # runs 32 bits too
    costs = Costs(graph, target, bits=bits, reference_bits=reference_bits)
    reference = at(graph, Bits(expected, expected))
    latency, packed, absolute = costs.resolve(
        [Budget("latency_ms", 0.5), Budget("weight_bytes", 0.25), Budget("macs", 7.0, relative=False)]
    )
    assert latency == Budget("latency_ms", 0.5 * target(reference)["latency_ms"], relative=False)
    assert packed.limit == 0.25 * MacsModel()(reference)["weight_bytes"]
    assert absolute == Budget("macs", 7.0, relative=False)


@pytest.mark.parametrize("name", ["finn-zynq7020", "bismo-zynq7020", "bitfusion"])
def test_a_target_of_integers_asks_for_bits_and_names_the_layers(name: str, graph: LayerGraph) -> None:
    target = load_target(name)
    with pytest.raises(
        RecipeError, match=rf"(?s)target {name} cannot run .*{graph.layers[0].name}.*set bits: {{weight"
    ):
        Costs(graph, target)(Plan())
    assert Costs(graph, target, bits=EIGHT)(Plan())["latency_ms"] > 0
    float_reference = Costs(graph, target, bits=EIGHT, reference_bits=Bits())
    with pytest.raises(RecipeError, match="set reference_bits: 8"):
        float_reference.resolve([Budget("latency_ms", 0.5)])
    # What can be counted of the floating-point network still can be.
    assert float_reference.resolve([Budget("weight_bytes", 0.5)])[0].limit > 0
    assert "latency_ms" not in float_reference.reference.totals


def test_costs_of_a_recipe_take_target_and_bits_from_it(graph: LayerGraph) -> None:
    text = "target: bismo-zynq7020\nbits: {weight: 4, act: 6}\nreference_bits: 8\nbudgets: {latency_ms: 0.5}"
    costs = Costs.of(Recipe.parse(text), graph)
    target = load_target("bismo-zynq7020")
    assert costs(Plan())["latency_ms"] == target(at(graph, Bits(4, 6)))["latency_ms"]
    assert costs.reference["latency_ms"] == target(at(graph, EIGHT))["latency_ms"]
    assert Costs.of(Recipe.parse("budgets: {macs: 0.5}"), graph).target is None


shares = st.floats(0.01, 0.99)


@given(start=st.floats(1e-3, 1e3), channels=shares, bits=shares, part=st.floats(0, 1))
def test_the_part_for_pruning_can_be_reached_and_leaves_enough_for_bits(
    start: float, channels: float, bits: float, part: float
) -> None:
    limit = start * (channels * bits) ** part
    found = share_for_first(limit, start=start, smallest=[start * channels, start * bits])
    near = 1 + 1e-9
    assert start * channels <= found * near
    assert found <= start * near
    assert found * bits <= limit * near
    # Each goes the same part of its own way, on a logarithmic scale.
    assert found == pytest.approx(start * channels**part)


def test_pruning_gets_all_of_a_budget_that_bits_do_not_touch_and_none_of_a_loose_one() -> None:
    assert share_for_first(40.0, start=100.0, smallest=[10.0, 100.0]) == 40
    assert share_for_first(150.0, start=100.0, smallest=[10.0, 20.0]) == 100
    # Equal ranges: the geometric mean.
    assert share_for_first(25.0, start=100.0, smallest=[10.0, 10.0]) == pytest.approx(50)


def test_identity_follows_the_targets_content_and_the_bits(graph: LayerGraph) -> None:
    target = load_target("bismo-zynq7020")
    same = Costs(graph, load_target("bismo-zynq7020"), bits=EIGHT).identity
    assert Costs(graph, target, bits=EIGHT).identity == same
    faster: Any = replace(target, clock_mhz=201)  # type: ignore[type-var]
    others = [
        Costs(graph, faster, bits=EIGHT),
        Costs(graph, target, bits=Bits(8, 4)),
        Costs(graph, bits=EIGHT),
        Costs(graph),
    ]
    assert len({same, *(costs.identity for costs in others)}) == 5


def test_a_table_is_identified_by_its_measurements_not_by_its_path(tmp_path: Path) -> None:
    header = "in_channels,out_channels,kernel,stride,groups,in_h,in_w,weight_bits,act_bits,latency_ms"

    def digest(name: str, latency_ms: float) -> str:
        row = f"1,8,3,1,1,8,8,32,32,{latency_ms}"
        (tmp_path / name).write_text(f"# source: made up\n{header}\n{row}\n")
        return content_digest(Lookup("phone", str(tmp_path / name)))

    assert digest("a.csv", 1.5) == digest("b.csv", 1.5) != digest("a.csv", 1.6)
