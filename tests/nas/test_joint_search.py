"""Joint searches: scores, predictors, learned searches, and a second target for nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from joint_problems import few_knobs, made_up_problem, made_up_score, tiny_space

from autocompress.agents import DDPGSearch, Greedy, RandomSearch, Uniform
from autocompress.core import Bits, Budget, Plan, SearchResult
from autocompress.core.errors import RecipeError
from autocompress.hardware_sim import load_target
from autocompress.nas import (
    AccuracyPredictor,
    ElasticSupernet,
    ElitistEvolution,
    JointScore,
    JointScoreSettings,
    PredictorSearch,
    PredictorSettings,
    RegularizedEvolution,
    fit_elastic,
    joint_chain,
    joint_problem,
    learned_predictor,
)
from autocompress.nas.joint_search import values_of
from autocompress.quant import QuantTables
from autocompress.testing import check_search
from autocompress.training import Data, TrainSettings, evaluate, load_data, subset

JOINT = tiny_space()
BUDGET = Budget("latency_ms", 0.4)
SMALL = PredictorSettings(hidden=(32, 32), steps=100, lr=3e-3)
QUICK = PredictorSearch(num_predicted=60, search=ElitistEvolution(population=15), settings=SMALL)


def digits(num: int = 80) -> Data:
    data = load_data("digits", search_size=0.5, seed=0)
    train, search = (subset(split, np.arange(num)) for split in (data.train, data.search))
    return replace(data, train=train, search=search)


@pytest.fixture(scope="module")
def score() -> JointScore:
    """Of a supernet that has seen few digits."""
    torch.set_num_threads(1)
    supernet = ElasticSupernet(JOINT, seed=0)
    fit_elastic(supernet, digits(), TrainSettings(epochs=1, batch_size=40, lr=0.05), seed=0)
    return JointScore(supernet, digits(), seed=0, settings=JointScoreSettings(calibration_images=40))


def test_a_plan_without_bits_is_scored_as_the_float_member(score: JointScore) -> None:
    for plan in (JOINT.largest, JOINT.smallest):
        found = evaluate(score.member(plan), digits().search)
        assert score(plan) == pytest.approx(np.exp(-found.loss), rel=1e-5)


def test_bits_are_rounded_in_the_member_that_they_belong_to(score: JointScore) -> None:
    skipped = replace(JOINT.reference, arch={**JOINT.reference.arch, "block01": "skip"})
    network, plan = score.network(skipped), JOINT.effective(skipped)
    assert torch.equal(
        network(torch.ones(2, 1, 8, 8)), score.tables(plan).network(plan)(torch.ones(2, 1, 8, 8))
    )
    weights = network.get_submodule("features.block03.conv.3").weight
    assert isinstance(weights, torch.Tensor)
    assert max(len(row.unique()) for row in weights.flatten(1)) <= 25
    coarse = replace(plan, bits={**plan.bits, "features.block03.conv.3": Bits(2, 8)})
    weights = score.network(coarse).get_submodule("features.block03.conv.3").weight
    assert isinstance(weights, torch.Tensor)
    assert max(len(row.unique()) for row in weights.flatten(1)) <= 3  # -1, 0 and 1 times a scale
    assert isinstance(score.tables(plan), QuantTables)


def test_no_plan_is_evaluated_twice_whatever_the_target_or_the_bits_of_a_skipped_block(
    score: JointScore,
) -> None:
    skipped = replace(JOINT.reference, arch={**JOINT.reference.arch, "block02": "skip"})
    first, before = score(skipped), score.num_evaluated
    other = replace(skipped, bits={**skipped.bits, "features.block02.conv.0": Bits(4, 4)})
    assert score(other) == first
    assert score.num_evaluated == before


def test_scores_are_identified_by_weights_images_and_settings(score: JointScore) -> None:
    same = JointScore(score.supernet, digits(), seed=0, settings=score.settings)
    others = [
        JointScore(score.supernet, digits(), seed=1, settings=score.settings),
        JointScore(score.supernet, digits(), seed=0, settings=replace(score.settings, score="accuracy")),
        JointScore(ElasticSupernet(JOINT, seed=0), digits(), seed=0, settings=score.settings),
    ]
    assert same.identity == score.identity
    assert len({other.identity for other in others} | {score.identity}) == 4
    with pytest.raises(RecipeError, match="calibration_images is 200, but there are 80"):
        JointScore(score.supernet, digits(), seed=0)
    with pytest.raises(RecipeError) as caught:
        JointScoreSettings(calibration_images=1, score_images=0, score="f1")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    "search",
    [
        ElitistEvolution(population=5),
        RegularizedEvolution(population=5, sample=2),
        RandomSearch(),
        Uniform(),
        DDPGSearch(hidden=(8,)),
        QUICK,
    ],
    ids=lambda search: type(search).__name__,
)
def test_one_problem_serves_every_search(search: Any) -> None:
    problem = few_knobs(made_up_problem("bitfusion", BUDGET, Budget("weight_bytes", 0.7)))
    check_search(search, problem, num_plans=10)


def test_greedy_descends_a_joint_problem_into_its_budget() -> None:
    problem = few_knobs(made_up_problem("bitfusion", BUDGET))
    found = Greedy()(problem, num_plans=40, seed=0)
    assert found.best.cost["latency_ms"] <= problem.budgets[0].limit


def test_random_plans_take_their_share_of_the_cut_from_every_kind_of_knob() -> None:
    problem = made_up_problem("bitfusion", BUDGET)
    trials = RandomSearch()(problem, num_plans=12, seed=0).trials
    bits = {b.weight for t in trials for n, b in t.plan.bits.items() if n.startswith("features.block")}
    widths = {size for t in trials for size in t.plan.channels.values()}
    assert bits == {4, 8}
    assert len(widths) > 2


def test_a_search_on_predictions_beats_random_plans_at_equal_evaluations() -> None:
    """On the 30 knobs of the chain for digits; random plans spend the budget as well."""
    joint, search = joint_chain((1, 8, 8), 10, bits=(3, 4, 6, 8)), replace(QUICK, num_predicted=300, rounds=2)
    found = []
    for seed in range(3):
        problem = made_up_problem("bitfusion", Budget("latency_ms", 0.3), seed=seed, joint=joint)
        found.append([s(problem, num_plans=50, seed=seed).best.score for s in (search, RandomSearch())])
    predicted, random = np.mean(found, axis=0)
    assert predicted > random + 0.02


def test_float_networks_are_evaluated_first_and_count() -> None:
    problem, seen = few_knobs(made_up_problem("bitfusion", BUDGET)), list[Plan]()

    def evaluate_plan(plan: Plan) -> float:
        seen.append(plan)
        return problem.evaluate(plan)

    result = QUICK(replace(problem, evaluate=evaluate_plan), num_plans=20, seed=0)
    assert len(seen) == 20
    assert [bool(plan.bits) for plan in seen] == [False] * 4 + [True] * 16
    assert [trial.source for trial in result.trials] == ["sample"] * 8 + ["predicted"] * 8
    with pytest.raises(ValueError, match="num_plans >= 8, got 7"):
        QUICK(problem, num_plans=7, seed=0)
    with pytest.raises(RecipeError) as caught:
        PredictorSearch(float_share=-0.1, sample_share=1.0, rounds=0, num_predicted=0)
    assert len(caught.value.faults) >= 4


def test_the_assignment_of_a_plan_gives_the_plan() -> None:
    problem = made_up_problem(None)
    for plan in (problem.plan([]), problem.plan([knob.choices[0] for knob in problem.knobs])):
        assert problem.plan(values_of(problem, plan)) == plan


def searched(target: str, limit: float, predictor: AccuracyPredictor) -> tuple[Any, SearchResult]:
    """What a supernet and a predictor that are there already cost on another target: one evaluation."""
    calls = list[Plan]()
    score = made_up_score(JOINT, 0)

    def evaluate_plan(plan: Plan) -> float:
        calls.append(plan)
        return score(plan)

    machine = load_target(target)
    problem = joint_problem(JOINT, machine, [Budget("latency_ms", limit)], evaluate=evaluate_plan)
    search = PredictorSearch(predictor, num_predicted=300, search=ElitistEvolution(population=30))
    result = search(problem, num_plans=3, seed=0)
    assert len(calls) <= 3
    return problem, result


def test_a_second_target_costs_no_training_and_gets_another_network_that_is_better_there() -> None:
    truth = made_up_problem(None)
    predictor, _ = learned_predictor(truth, num_float=60, num_samples=80, seed=0, settings=SMALL)
    phone, on_phone = searched("phone-pixel1", 0.8, predictor)
    fpga, on_fpga = searched("bismo-zynq7020", 0.3, predictor)
    assert on_phone.best.plan != on_fpga.best.plan
    for problem, own, other in ((phone, on_phone, on_fpga), (fpga, on_fpga, on_phone)):
        borrowed = other.best.plan
        fits = problem.meets_budgets(problem.price(borrowed))
        assert not fits or own.best.score > truth.evaluate(borrowed)


def test_a_predictor_of_other_knobs_is_refused() -> None:
    predictor, _ = learned_predictor(
        made_up_problem(None), num_float=0, num_samples=4, seed=0, settings=SMALL
    )
    other = made_up_problem("bitfusion", joint=tiny_space(bits=(2, 8)))
    with pytest.raises(ValueError, match="other knobs"):
        PredictorSearch(predictor)(other, num_plans=1, seed=0)


@pytest.mark.slow
def test_joint_search_on_digits_meets_its_budget_and_beats_the_smallest_bits_of_the_largest_network() -> None:
    data = load_data("digits", search_size=0.3, seed=0)
    joint = tiny_space(bits=(2, 4, 8))
    supernet = ElasticSupernet(joint, seed=0)
    settings = TrainSettings(15, 64, 0.1, distill_weight=1.0, distill_temperature=1.0, clip_norm=5.0)
    fit_elastic(supernet, data, settings, seed=0)
    truth = JointScore(supernet, data, seed=0)
    problem = joint_problem(joint, load_target("bitfusion"), [Budget("latency_ms", 0.3)], evaluate=truth)
    result = PredictorSearch(num_predicted=500)(problem, num_plans=40, seed=0)
    assert all(problem.meets_budgets(trial.cost) for trial in result.trials)
    blind = {name: Bits(2, 2) if bits.weight < 8 else bits for name, bits in result.best.plan.bits.items()}
    assert result.best.score > truth(replace(joint.reference, bits={**joint.reference.bits, **blind}))
    best_random = RandomSearch()(problem, num_plans=10, seed=0).best.score
    assert result.best.score > best_random
