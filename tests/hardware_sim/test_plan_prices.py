from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.core import Bits, ChannelGroup, Cost, Knob, LayerGraph, LayerSpec, Plan, Problem, Width
from autocompress.hardware_sim import (
    HardwareModel,
    LayerTable,
    MacsModel,
    PlanPricer,
    UnsupportedLayerError,
    bundled_targets,
    load_target,
    plan_prices,
)
from autocompress.hardware_sim.choice_tables import Choices, ChoiceTables, TooManyEntriesError
from autocompress.hardware_sim.lookup import Lookup

MODELS: list[HardwareModel | MacsModel] = [MacsModel(), *map(load_target, bundled_targets())]
ADDITIVE = [model for model in MODELS if model.additive]
GROUPS = {"a": 12, "b": 9}


def network() -> LayerGraph:
    """A stem, a depthwise layer, equal layers, a concatenation, a flatten, a reused layer."""
    a, b = Width(terms=(("a", 1),)), Width(terms=(("b", 2),))
    both, flat = a + b, 9 * (a + b)
    stem = LayerSpec("stem", "conv", 3, 12, (3, 3), (2, 2), in_hw=(12, 12), out_hw=(6, 6), bias=True)
    square = LayerSpec("x", "conv", 12, 12, (3, 3), in_hw=(6, 6), out_hw=(6, 6), in_width=a, out_width=a)
    layers = (
        replace(stem, in_width=Width(3), out_width=a),
        replace(square, name="dw", groups=12),
        replace(square, name="one"),
        replace(square, name="two"),
        replace(square, name="wide", out_channels=18, kernel=(1, 1), out_width=b),
        replace(square, name="join", in_channels=30, kernel=(1, 1), in_width=both, out_width=a),
        replace(square, name="half", stride=(2, 2), out_hw=(3, 3)),
        LayerSpec("fc", "linear", 270, 270, in_width=flat, out_width=flat, bias=True),
        LayerSpec("fc@2", "linear", 270, 270, in_width=flat, out_width=flat, bias=True, reuses="fc"),
        LayerSpec("out", "linear", 270, 10, in_width=flat, out_width=Width(10)),
    )
    groups = tuple(ChannelGroup(name, size, (), ()) for name, size in GROUPS.items())
    graph = LayerGraph(layers, groups, Width(5, (("a", 4), ("b", 8))), input_shape=(3, 12, 12))
    return graph.with_bits({layer.name: Bits(8, 8) for layer in layers})


def knobs_for(model: HardwareModel | MacsModel) -> tuple[Knob, ...]:
    """Sizes of both groups, weight and activation bits of every layer that the model runs."""
    weight = (1,) if model.kind == "binary_dataflow" else (1, 2, 5, 8)
    sizes = (Knob("channels", "a", (1, 4, 7, 12)), Knob("channels", "b", (2, 3, 9)))
    names = [layer.name for layer in network().layers if layer.reuses is None]
    bits = [(Knob("weight_bits", name, weight), Knob("act_bits", name, (1, 3, 8))) for name in names]
    return (*sizes, *(knob for pair in bits for knob in pair))


def problem_of(knobs: Sequence[Knob]) -> Problem:
    return Problem(tuple(knobs), (), lambda plan: Cost({}), lambda plan: 0.0)


def assert_equal_costs(ours: Cost, theirs: Cost) -> None:
    assert ours.totals.keys() == theirs.totals.keys()
    for metric, value in theirs.totals.items():
        assert ours[metric] == pytest.approx(value, rel=1e-12), metric


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_plans_cost_what_their_graphs_cost(model: HardwareModel | MacsModel) -> None:
    graph, knobs = network(), knobs_for(model)
    pricer, problem = PlanPricer(model, graph, knobs), problem_of(knobs)
    assert pricer.looks_up == model.additive

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.tuples(*(st.integers(0, len(k.choices) - 1) for k in knobs)), min_size=1, max_size=4))
    def check(choices: list[tuple[int, ...]]) -> None:
        plans = [
            problem.plan([knob.choices[c] for knob, c in zip(knobs, row, strict=True)]) for row in choices
        ]
        expected = [model(plan.apply(graph)) for plan in plans]
        together = pricer.price_choices(np.array(choices))
        for p, cost in enumerate(expected):
            assert_equal_costs(pricer(plans[p]), cost)
            assert_equal_costs(Cost({metric: values[p] for metric, values in together.items()}), cost)

    check()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ADDITIVE), st.integers(0, 2**32 - 1))
def test_a_population_that_repeats_its_choices_costs_what_its_graphs_cost(
    model: HardwareModel | MacsModel, seed: int
) -> None:
    graph, rng = network(), np.random.default_rng(seed)
    names = [layer.name for layer in graph.layers if layer.reuses is None]
    sizes = {group: rng.integers(size - 2, size + 1, 400) for group, size in GROUPS.items()}
    bits = {name: rng.choice([4, 8], 400) for name in names}
    together = model.price_plans(graph, sizes=sizes, weight_bits=bits, act_bits=bits)
    for p in (0, 199, 399):
        plan = Plan(
            channels={name: int(values[p]) for name, values in sizes.items()},
            bits={name: Bits(int(values[p]), int(values[p])) for name, values in bits.items()},
        )
        assert_equal_costs(
            Cost({metric: values[p] for metric, values in together.items()}), model(plan.apply(graph))
        )


def test_what_a_plan_does_not_name_stays_as_the_graph_has_it() -> None:
    graph, model = network(), load_target("bismo-zynq7020")
    pricer = PlanPricer(model, graph, knobs_for(model))
    for plan in (Plan(), Plan(channels={"b": 3}), Plan(bits={"fc": Bits(2, 3)})):
        assert_equal_costs(pricer(plan), model(plan.apply(graph)))


def test_plans_beyond_the_choices_are_priced_by_the_model() -> None:
    graph, model = network(), MacsModel()
    pricer = PlanPricer(model, graph, [Knob("channels", "a", (4, 12)), Knob("weight_bits", "fc", (4, 8))])
    for plan in (Plan(channels={"a": 5}), Plan(channels={"b": 3}), Plan(bits={"one": Bits(3, 3)})):
        assert_equal_costs(pricer(plan), model(plan.apply(graph)))
    with pytest.raises(ValueError, match="no channel group named 'c'"):
        pricer(Plan(channels={"c": 3}))


def test_a_knob_for_one_side_leaves_the_other_in_floating_point_as_plans_do() -> None:
    graph, model = network(), load_target("phone-pixel1")
    knobs = [Knob("act_bits", "one", (4, 8)), Knob("weight_bits", "two", (4, 8))]
    pricer, problem = PlanPricer(model, graph, knobs), problem_of(knobs)
    for row in ((0, 0), (1, 1)):
        plan = problem.plan([knob.choices[c] for knob, c in zip(knobs, row, strict=True)])
        assert plan.bits["one"].weight == 32 == plan.bits["two"].act
        assert_equal_costs(pricer(plan), model(plan.apply(graph)))
        together = pricer.price_choices(np.array([row]))
        assert together["latency_ms"][0] == pytest.approx(pricer(plan)["latency_ms"], rel=1e-12)


def test_bits_that_a_target_refuses_are_an_error_only_in_plans_that_have_them() -> None:
    graph, model = network(), load_target("bitfusion")
    knobs = [Knob("weight_bits", "one", (4, 8, 16)), Knob("act_bits", "one", (4, 8))]
    pricer = PlanPricer(model, graph, knobs)
    assert pricer.looks_up
    allowed = Plan(bits={"one": Bits(4, 4)})
    assert_equal_costs(pricer(allowed), model(allowed.apply(graph)))
    with pytest.raises(UnsupportedLayerError, match="layers one: bitfusion multiplies"):
        pricer(Plan(bits={"one": Bits(16, 4)}))
    with pytest.raises(UnsupportedLayerError, match="layers one: bitfusion multiplies"):
        pricer.price_choices(np.array([[0, 0], [2, 0]]))


def test_a_float_graph_can_have_knobs_for_an_integer_target() -> None:
    graph, model = network(), load_target("systolic-16x16")
    graph = graph.with_bits({layer.name: Bits() for layer in graph.layers})
    knobs = knobs_for(model)
    problem, pricer = problem_of(knobs), PlanPricer(model, graph, knobs)
    plan = problem.plan([knob.choices[0] for knob in knobs])
    assert pricer.looks_up
    assert_equal_costs(pricer(plan), model(plan.apply(graph)))
    with pytest.raises(UnsupportedLayerError, match="stem, dw, one"):
        pricer(Plan())


def test_more_choices_than_the_limit_are_priced_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, model = network(), load_target("systolic-16x16")
    knobs = knobs_for(model)
    plans = np.zeros((3, len(knobs)), dtype=np.int64)
    looked_up = PlanPricer(model, graph, knobs).price_choices(plans)
    monkeypatch.setattr(plan_prices, "MAX_ENTRIES", 100)
    pricer = PlanPricer(model, graph, knobs)
    assert not pricer.looks_up
    for metric, values in pricer.price_choices(plans).items():
        np.testing.assert_allclose(values, looked_up[metric], rtol=1e-12)


def test_a_model_that_prices_graphs_only_will_do() -> None:
    class Depth:
        """Costs its number of channels."""

        name = "channels"
        metrics = ("params",)

        def __call__(self, graph: LayerGraph) -> Cost:
            return Cost({"params": float(sum(layer.out_channels for layer in graph.layers))})

        def price_many(self, graphs: Sequence[LayerGraph]) -> dict[str, np.ndarray]:
            return {"params": np.array([self(graph)["params"] for graph in graphs])}

    graph, model = network(), Depth()
    pricer = PlanPricer(model, graph, [Knob("channels", "a", (4, 12)), Knob("act_bits", "one", (4, 8))])  # type: ignore[arg-type]
    assert not pricer.looks_up
    expected = [model(graph.with_channels({"a": size}))["params"] for size in (4, 12)]
    assert pricer.price_choices(np.array([[0, 0], [1, 1]]))["params"].tolist() == expected


def test_layers_of_equal_facts_share_their_entries() -> None:
    graph, sizes = network(), {"a": np.array([4, 12]), "b": np.array([3, 9])}
    # stem, dw, one (two is equal), wide, join (a decides both its widths), half, fc, its later call, out
    entries = 2 + 2 + 2 + 4 + 4 + 2 + 4 + 4 + 4
    assert ChoiceTables(graph, Choices(sizes, {}, {}), max_entries=entries).num_entries == entries
    bits = {"one": np.array([4, 8])}  # with bits of its own it is no longer equal
    assert ChoiceTables(graph, Choices(sizes, bits, {}), max_entries=99).num_entries == entries + 2 * 2
    with pytest.raises(TooManyEntriesError):
        ChoiceTables(graph, Choices(sizes, {}, {}), max_entries=entries - 1)


@pytest.mark.parametrize("model", ADDITIVE, ids=lambda model: model.name)
def test_a_table_of_layers_sums_to_the_network(model: HardwareModel | MacsModel) -> None:
    graph, weight, act = network(), (2, 4, 8), (3, 8)
    table, beyond = model.layer_table(graph, weight, act), model.beyond_layers(graph)
    assert table.keys() == beyond.keys() & set(model.metrics)
    for w, a in np.ndindex(len(weight), len(act)):
        bits = Bits(weight[w], act[a])
        cost = model(graph.with_bits({layer.name: bits for layer in graph.layers}))
        for metric, entries in table.items():
            assert entries.shape == (len(graph.layers), 3, 2)
            assert entries[:, w, a].sum() + beyond[metric] == pytest.approx(cost[metric], rel=1e-12)


@pytest.mark.parametrize("model", [m for m in MODELS if not m.additive], ids=lambda model: model.name)
def test_a_pipeline_has_no_table_of_layers(model: HardwareModel) -> None:
    with pytest.raises(ValueError, match=f"{model.name} has no table of layers"):
        model.layer_table(network(), (1,), (1,))


def test_a_table_of_layers_names_what_a_target_refuses() -> None:
    with pytest.raises(UnsupportedLayerError, match="layers stem, dw, one, two, wide, join, half, fc"):
        load_target("bitfusion").layer_table(network(), (8, 32), (8,))


def test_wrong_knobs_are_all_named_at_once() -> None:
    knobs = [
        Knob("arch", "depth", ("small", "large")),
        Knob("channels", "c", (1, 2)),
        Knob("channels", "a", (1, 13)),
        Knob("act_bits", "fc@2", (4, 8)),
    ]
    with pytest.raises(ValueError, match=r"'depth' .*'c': no such .*'a': sizes .*'fc@2': no such"):
        PlanPricer(MacsModel(), network(), knobs)


@pytest.mark.parametrize(
    "choices", [np.zeros(2, dtype=np.int64), np.array([[0]]), np.array([[0, 2]]), np.array([[-1, 0]])]
)
def test_choices_that_are_none_are_an_error(choices: np.ndarray) -> None:
    pricer = PlanPricer(
        MacsModel(), network(), [Knob("channels", "a", (1, 2)), Knob("channels", "b", (1, 2))]
    )
    with pytest.raises(ValueError, match="choices"):
        pricer.price_choices(choices)


def test_a_table_of_single_layers_adds_up_and_one_of_blocks_does_not(tmp_path: Path) -> None:
    header = "in_channels,out_channels,kernel,stride,groups,in_h,in_w,weight_bits,act_bits,latency_ms"
    rows = [f"3,12,3,2,1,12,12,{w},8,{w / 8}" for w in (2, 4, 8)]
    path = tmp_path / "layers.csv"
    path.write_text("\n".join(["# source: made up", header, *rows]))
    model = Lookup("board", str(path))
    assert model.additive
    graph = LayerGraph(network().layers[:1], network().groups, input_shape=(3, 12, 12))
    assert model.layer_table(graph, (2, 4, 8), (8,))["latency_ms"].ravel().tolist() == [0.25, 0.5, 1.0]
    blocks = "op,input,output,expand,kernel,stride,mean_ms\nexpanded_conv,8x8x4,8x8x4,3,3,1,1.0\n"
    path.write_text("# source: made up\n" + blocks)
    assert not Lookup("phone", str(path)).additive


def test_rows_taken_and_joined_are_the_table_again() -> None:
    table = LayerTable.of(network().layers)
    parts = [table.take(np.arange(4)), table.take(np.arange(4, len(table)))]
    joined = LayerTable.joined(parts)
    assert joined.macs.tolist() == table.macs.tolist()
    assert joined.owns_weights.tolist() == table.owns_weights.tolist()
