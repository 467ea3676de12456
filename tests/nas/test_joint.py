"""Joint problems: plans fit their members, prices are the models' own, and the laws of problems hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from joint_problems import at_bits, few_knobs, made_up_problem, tiny_space, wishes

from autocompress.core import Bits, Budget, Plan
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.hardware_sim import MacsModel, load_target
from autocompress.nas import (
    ElitistEvolution,
    JointPricer,
    JointSpace,
    RegularizedEvolution,
    joint_chain,
    joint_problem,
)
from autocompress.nas.joint import FEATURES
from autocompress.nas.spaces import mbconv_chain
from autocompress.trace import keep_first, shrink, trace

JOINT = tiny_space()
TARGETS = ("bitfusion", "phone-pixel1", "eyeriss", "bismo-zynq7020")
SKIPPED = Plan(
    arch={"block01": "skip", "block02": "k5e4", "block03": "k3e4"},
    channels={"features.block01.conv.0": 8, "features.block02.conv.0": 16},
    bits=at_bits(["features.block01.conv.3", "features.block03.conv.6"], 4),
)


def any_plan(seed: int) -> Plan:
    problem = made_up_problem(None)
    return problem.plan(wishes(problem, 1, seed)[0])


def test_a_plan_names_nothing_that_its_own_architecture_leaves_out() -> None:
    found = JOINT.effective(SKIPPED)
    assert found.channels == {"features.block02.conv.0": 16}
    assert set(found.bits) == {"features.block03.conv.6"}
    assert JOINT.effective(found) == found
    graph = found.apply(JOINT.space.graph(found.arch))
    assert graph == JOINT.graph(SKIPPED)
    assert {layer.name: layer.out_channels for layer in graph.layers}["features.block02.conv.3"] == 16


def test_a_misspelt_name_is_refused_not_dropped() -> None:
    for wrong in (
        Plan(SKIPPED.arch, {"features.block09.conv.0": 8}),
        Plan(SKIPPED.arch, {}, at_bits("x", 4)),
    ):
        with pytest.raises(ValueError, match=r"block09|'x'"):
            JOINT.graph(wrong)
        with pytest.raises(ValueError, match=r"block09|'x'"):
            JointPricer(JOINT, [MacsModel()])(wrong)


def test_assignments_that_make_equal_networks_give_equal_plans() -> None:
    problem = made_up_problem(None)
    values = dict(zip([(k.kind, k.name) for k in problem.knobs], wishes(problem, 1)[0], strict=True))
    values |= {("arch", "block01"): "skip", ("channels", "features.block01.conv.0"): 16}
    other = {**values, ("channels", "features.block01.conv.0"): 8}
    first, second = problem.plan([*values.values()]), problem.plan([*other.values()])
    assert values != other
    assert first == second
    assert not any("block01" in name for name in (*first.channels, *first.bits))


@pytest.mark.parametrize("seed", range(3))
def test_a_built_member_is_the_largest_one_shrunk_and_has_the_predicted_graph(seed: int) -> None:
    plan = any_plan(seed)
    network = JOINT.build(plan, seed=0)
    whole = JOINT.space.build(plan.arch, seed=0)
    traced = trace(whole, (1, 8, 8))
    small = shrink(whole, traced, keep_first(traced, plan.channels))
    assert {n: t.shape for n, t in network.state_dict().items()} == {
        n: t.shape for n, t in small.state_dict().items()
    }
    found = trace(network, (1, 8, 8)).graph
    expected = JOINT.graph(Plan(plan.arch, plan.channels))
    assert found.layers == expected.layers
    assert found.other_params.at(found.sizes) == expected.other_params.at(expected.sizes)


@pytest.mark.parametrize("target", [*TARGETS, "finn-zynq7020"])
def test_prices_are_what_the_models_say_of_the_plans_graph(target: str) -> None:
    machine = load_target(target)
    price = JointPricer(JOINT, [MacsModel(), machine])
    problem = made_up_problem(None)
    for values in wishes(problem, 6 if machine.additive else 2, seed=1):
        plan = problem.plan(values)
        graph = JOINT.graph(plan)
        expected = {**MacsModel()(graph).totals, **machine(graph).totals}
        cost = price(plan)
        assert cost.totals == pytest.approx(expected, rel=1e-9)
        assert set(cost.layers) == {layer.name for layer in graph.layers}
        assert sum(layer["macs"] for layer in cost.layers.values()) == cost["macs"]


def test_each_variant_of_a_layer_is_priced_once() -> None:
    price, problem = JointPricer(JOINT, [MacsModel()]), made_up_problem(None)
    price(problem.plan([]))
    before = price.num_priced
    assert before == len(JOINT.graph(JOINT.largest).layers)
    price(problem.plan([]))
    assert price.num_priced == before
    price(replace(problem.plan([]), arch={**JOINT.largest.arch, "block01": "k3e4"}))
    assert price.num_priced == before + 3  # of the block, in which only one layer became another
    price(JOINT.smallest)
    assert price.num_priced == before + 3 + 3


def test_layers_without_bits_are_priced_at_the_bits_of_the_reference() -> None:
    price = JointPricer(JOINT, [load_target("bitfusion")])
    assert price(JOINT.largest).totals == price(JOINT.reference).totals


@pytest.mark.parametrize("target", TARGETS)
def test_no_metric_rises_when_a_knob_moves_to_an_earlier_choice(target: str) -> None:
    problem = made_up_problem(target)
    for values in wishes(problem, 3, seed=2):
        before = problem.price(problem.plan(values))
        for index, knob in enumerate(problem.knobs):
            place = knob.choices.index(values[index])
            for lower in knob.choices[max(place - 1, 0) : place]:
                after = problem.price(problem.plan([*values[:index], lower, *values[index + 1 :]]))
                risen = [m for m in before.totals if after[m] > before[m] * (1 + 1e-9)]
                assert not risen, f"{knob.name} at {lower} instead of {values[index]} raises {risen}"


@pytest.mark.parametrize("target", ["bitfusion", "finn-zynq7020"])
def test_clip_gives_a_feasible_choice_and_is_idempotent(target: str) -> None:
    budgets = (Budget("latency_ms", 0.4), Budget("weight_bytes", 0.6))
    problem = few_knobs(made_up_problem(target, *budgets))
    for wanted in wishes(problem, 2, seed=3):
        values = problem.bounded(wanted)
        assert problem.meets_budgets(problem.price(problem.plan(values)))
        assert problem.bounded(values) == values


def test_a_budget_out_of_reach_is_refused_with_the_floor() -> None:
    problem = made_up_problem("bitfusion", Budget("latency_ms", 1e-4))
    with pytest.raises(InfeasibleBudgetError, match=r"smallest reachable latency_ms .* held up by"):
        problem.reachable()


def test_the_largest_plan_is_the_reference_and_the_first_and_last_layer_keep_8_bits() -> None:
    problem = made_up_problem(None)
    assert problem.plan([]) == JOINT.reference
    for values in wishes(problem, 3):
        bits = problem.plan(values).bits
        assert bits["features.stem.0"] == bits["classifier"] == Bits(8, 8)
        assert len({bits.get(f"features.block01.conv.{i}") for i in (0, 6)}) == 1  # pointwise layers share


def test_a_relative_budget_refers_to_the_largest_member() -> None:
    problem = made_up_problem("bitfusion", Budget("latency_ms", 0.5))
    assert problem.budgets[0].limit == pytest.approx(0.5 * problem.price(JOINT.reference)["latency_ms"])


def test_what_is_decided_before_stays_and_a_skipped_block_leaves_nothing_to_decide() -> None:
    fixed = JOINT.effective(SKIPPED)
    problem = joint_problem(JOINT, None, [], evaluate=lambda plan: 0.0, decide=("channels",), fixed=fixed)
    assert [knob.name for knob in problem.knobs] == ["features.block02.conv.0", "features.block03.conv.0"]
    plan = problem.plan([8, 16])
    assert plan.arch == fixed.arch
    assert plan.channels == {"features.block02.conv.0": 8, "features.block03.conv.0": 16}
    assert plan.bits["features.block03.conv.6"] == Bits(4, 4)
    bits = joint_problem(JOINT, None, [], evaluate=lambda plan: 0.0, decide=("bits",), fixed=plan)
    assert not any("block01" in knob.name for knob in bits.knobs)
    assert bits.plan([]).channels == plan.channels


def test_every_knob_has_the_named_features_and_blocks_are_decided_in_turn() -> None:
    knobs = made_up_problem(None).knobs
    assert {len(knob.features) for knob in knobs} == {len(FEATURES)}
    block = [(k.kind, k.name.rpartition(".")[2]) for k in knobs if "block02" in k.name]
    assert block == [
        ("arch", "block02"),
        ("channels", "0"),
        ("weight_bits", "pointwise"),
        ("act_bits", "pointwise"),
        ("weight_bits", "depthwise"),
        ("act_bits", "depthwise"),
    ]
    starts = [k.features[0] for k in knobs if k.kind == "arch"]
    assert starts == sorted(starts)


def test_hidden_widths_are_multiples_from_twice_to_six_times_the_input() -> None:
    joint = joint_chain((1, 8, 8), 10)
    assert {block.place.in_channels: block.widths for block in joint.blocks}[8] == (16, 24, 32, 40, 48)
    assert [block.operations for block in joint.blocks[:2]] == [
        ("k3e6", "k5e6", "k7e6"),
        ("skip", "k3e6", "k5e6", "k7e6"),
    ]


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        ({"space": mbconv_chain((1, 8, 8), 10), "round_to": 0}, 2),  # expansions 3 and 6
        ({"min_expand": 5.0, "round_to": -1}, 2),
        ({"weight_bits": (8, 4)}, 1),
    ],
)
def test_impossible_spaces_are_refused_with_all_their_faults(settings: dict[str, Any], faults: int) -> None:
    with pytest.raises(RecipeError) as caught:
        JointSpace(**({"space": JOINT.space} | settings))
    assert len(caught.value.faults) == faults


def test_nothing_to_decide_and_unknown_parts_are_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to decide"):
        tiny_space(bits=(8,)).knobs(("bits",))
    with pytest.raises(RecipeError, match="arch, channels, bits, got width"):
        JOINT.knobs(("width",))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(2))
def test_evolution_finds_the_best_of_all_plans_of_three_blocks(seed: int) -> None:
    problem = few_knobs(made_up_problem("bitfusion", Budget("latency_ms", 0.5), seed=seed))
    plans = {problem.plan(values) for values in itertools.product(*(k.choices for k in problem.knobs))}
    inside = [plan for plan in plans if problem.meets_budgets(problem.price(plan))]
    scores = sorted(map(problem.evaluate, inside))
    assert 300 < len(inside) < len(plans)
    assert scores[-3] < scores[-1]  # not a plateau
    search = ElitistEvolution(population=20, mutation_probability=0.2)
    result = search(problem, num_plans=110, seed=seed)
    assert result.best.score == scores[-1]
    assert {trial.source for trial in result.trials} == {"random", "mutation", "crossover"}
    assert len({trial.plan for trial in result.trials}) == 110


@pytest.mark.parametrize("search", [ElitistEvolution(population=6), RegularizedEvolution(6, 2)])
def test_evolution_goes_through_all_of_a_small_space_and_never_leaves_the_budget(search: Any) -> None:
    budget, score = Budget("latency_ms", 0.7), made_up_problem(None).evaluate
    problem = joint_problem(JOINT, load_target("bitfusion"), [budget], evaluate=score, decide=("arch",))
    plans = {problem.plan(values) for values in itertools.product(*(k.choices for k in problem.knobs))}
    inside = {plan for plan in plans if problem.meets_budgets(problem.price(plan))}
    assert 1 < len(inside) < len(plans)
    trials = search(problem, num_plans=2 * len(plans), seed=0).trials
    assert {trial.plan for trial in trials} == inside
