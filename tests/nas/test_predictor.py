"""The predictor: what it learns from float networks helps where quantised ones are few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from joint_problems import made_up_problem, made_up_score, tiny_space, wishes
from scipy.stats import kendalltau

from autocompress.core import Bits, Plan
from autocompress.core.errors import DivergenceError, RecipeError
from autocompress.nas import AccuracyPredictor, PredictorSettings
from autocompress.nas.predictor import Encoding

JOINT = tiny_space(bits=(3, 4, 6, 8))
PROBLEM = made_up_problem(None, joint=JOINT)
SMALL = PredictorSettings(hidden=(32, 32), steps=150, lr=3e-3)


def floats(number: int, seed: int = 0) -> list[Plan]:
    rng = np.random.default_rng(seed)
    return [JOINT.random(rng) for _ in range(number)]


def quantised(number: int, seed: int = 0) -> list[Plan]:
    return [PROBLEM.plan(values) for values in wishes(PROBLEM, number, seed)]


def test_a_transfer_beats_learning_from_scratch_at_a_tenth_of_the_quantised_pairs() -> None:
    """200 float pairs and 20 quantised ones, a tenth, against the 20 alone; Kendall's tau on 150 others."""
    taus = []
    for seed in range(3):
        score = made_up_score(JOINT, seed)
        few, plain, others = quantised(20, seed), floats(200, seed), quantised(150, seed + 100)
        first = AccuracyPredictor.fit(PROBLEM.knobs, plain, [*map(score, plain)], seed=0, settings=SMALL)
        transferred = first.transfer(few, [*map(score, few)], seed=0)
        scratch = AccuracyPredictor.fit(
            PROBLEM.knobs, few, [*map(score, few)], seed=0, with_bits=True, settings=SMALL
        )
        truth = [*map(score, others)]
        taus.append([kendalltau(p.predict(others), truth).statistic for p in (transferred, scratch, first)])
    transferred_tau, scratch_tau, float_tau = np.mean(taus, axis=0)
    assert transferred_tau > scratch_tau + 0.05
    assert transferred_tau > float_tau + 0.03  # it did learn about bits


def test_without_a_step_a_transfer_predicts_what_the_float_network_did() -> None:
    plain, few = floats(40), quantised(12)
    scores, targets = ([*map(PROBLEM.evaluate, plans)] for plans in (plain, few))
    first = AccuracyPredictor.fit(PROBLEM.knobs, plain, scores, seed=0, settings=SMALL)
    assert np.allclose(first.predict(few), first.predict([Plan(p.arch, p.channels) for p in few]))
    frozen = PredictorSettings(hidden=SMALL.hidden, steps=1, lr=1e-12)
    moved = first.transfer(few, targets, seed=0, settings=frozen)
    np.testing.assert_allclose(*((p.predict(few) - p.mean) / p.std for p in (first, moved)), atol=1e-6)
    again = moved.transfer(few, targets, seed=0, settings=SMALL)  # from the branch it has
    errors = [np.abs(p.predict(few) - targets).mean() for p in (again, moved)]
    assert errors[0] < errors[1] / 4


def test_plans_are_one_hot_and_what_a_skipped_block_leaves_out_is_zero() -> None:
    encoding = Encoding(PROBLEM.knobs)
    values = [knob.choices[0] for knob in PROBLEM.knobs]
    plan = PROBLEM.plan(values)
    choices, bits = encoding([plan, PROBLEM.plan([])])
    assert choices.shape == (2, encoding.num_float)
    assert bits.shape == (2, encoding.num_bits)
    named = [k for k in PROBLEM.knobs if "block01" not in k.name and "block02" not in k.name]
    kept = sum(not k.is_bits for k in named)
    assert choices.sum(axis=1).tolist() == [kept + 2, sum(not k.is_bits for k in PROBLEM.knobs)]
    assert bits.sum(axis=1).tolist() == [sum(k.is_bits for k in named), sum(k.is_bits for k in PROBLEM.knobs)]
    assert sorted(set(np.unique(choices)) | set(np.unique(bits))) == [0.0, 1.0]


def test_equal_seeds_give_equal_predictors_and_leave_the_global_generator_alone() -> None:
    plans = quantised(12)
    scores = [*map(PROBLEM.evaluate, plans)]
    before = torch.get_rng_state()
    found = [
        AccuracyPredictor.fit(PROBLEM.knobs, plans, scores, seed=s, with_bits=True, settings=SMALL)
        for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(found[0].predict(plans), found[1].predict(plans))
    assert not np.array_equal(found[0].predict(plans), found[2].predict(plans))
    assert found[0](plans[3]) == pytest.approx(found[0].predict(plans)[3], abs=1e-6)


def test_what_cannot_be_learnt_from_is_refused() -> None:
    plans = quantised(3)
    with pytest.raises(RecipeError, match="3 plans and 2 scores"):
        AccuracyPredictor.fit(PROBLEM.knobs, plans, [0.1, 0.2], seed=0)
    with pytest.raises(DivergenceError, match="finite"):
        AccuracyPredictor.fit(PROBLEM.knobs, plans, [0.1, 0.2, float("nan")], seed=0)
    wrong = Plan(plans[0].arch, plans[0].channels, {"features.head.0": Bits(5, 5)})
    with pytest.raises(ValueError, match=r"'features.head.0' is 5, not one of \(3, 4, 6, 8\)"):
        Encoding(PROBLEM.knobs)([wrong])
    with pytest.raises(RecipeError) as caught:
        PredictorSettings(hidden=(), steps=0, batch_size=0, lr=0.0, weight_decay=-1.0)
    assert len(caught.value.faults) == 5
    found = AccuracyPredictor.fit(PROBLEM.knobs, plans, [0.1, 0.2, 0.3], seed=0, settings=SMALL)
    with pytest.raises(RecipeError, match="keeps the hidden layers"):
        found.transfer(plans, [0.1, 0.2, 0.3], seed=0, settings=PredictorSettings(hidden=(8,)))
