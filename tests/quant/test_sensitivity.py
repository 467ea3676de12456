from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import TinyResNet, seeded
from scipy.stats import spearmanr
from torch import Tensor, nn

from autocompress.agents.allocate import allocate_bits
from autocompress.core import Bits, Knob, Plan
from autocompress.core.errors import DataError
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, bit_knobs, reference_bits
from autocompress.quant.curvature import hutchinson_traces
from autocompress.quant.sensitivity import Replay, Sensitivity, sensitivity
from autocompress.trace import trace
from autocompress.training import TrainSettings, fit, load_data
from autocompress.zoo.models import build

METHODS = ("measured", "hessian", "fisher")


@cache
def digits() -> tuple[QuantTables, tuple[Knob, ...], Plan, list[tuple[Tensor, Tensor]]]:
    """A trained network of digits, its knobs, the reference, and 256 training images in four batches."""
    data = load_data("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("digits_vgg", num_classes=10, in_channels=1)
    fit(model, data, TrainSettings(epochs=6, batch_size=64, lr=0.05, warmup_epochs=1), seed=0)
    images, labels = data.train.batch(torch.arange(256), None)  # type: ignore[union-attr]
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    skeleton = Skeleton(model.eval())
    tables = QuantTables(skeleton, Calibration(skeleton, images.split(64), QuantSettings()))
    graph = trace(model, tuple(images.shape[1:])).graph
    return tables, bit_knobs(graph), Plan(bits=reference_bits(graph)), batches


@cache
def found(method: str) -> Sensitivity:
    tables, knobs, reference, batches = digits()
    return sensitivity(tables, knobs, batches, method=method, reference=reference, seed=0)  # type: ignore[arg-type]


def divergence(
    tables: QuantTables, plan: Plan, reference: Plan, batches: list[tuple[Tensor, Tensor]]
) -> float:
    """Kullback-Leibler divergence of a plan's answers from the reference's, in nats per image."""
    with torch.no_grad():
        images = torch.cat([x for x, _ in batches])
        expected = F.log_softmax(tables.network(reference)(images), dim=1)
        answer = F.log_softmax(tables.network(plan)(images), dim=1)
        return float(F.kl_div(answer, expected, reduction="batchmean", log_target=True))


def test_trace_of_a_quadratic_is_met_within_its_standard_error() -> None:
    """2,000 draws on a 50 x 50 matrix; the variance of one is twice the sum of squares off the diagonal."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    x = torch.randn(50, generator=generator, dtype=torch.float64).requires_grad_()
    samples = hutchinson_traces(x @ matrix @ x / 2, [x], num_probes=2000, generator=generator)[:, 0]
    off_diagonal = matrix - matrix.diagonal().diag()
    standard_error = float((2 * off_diagonal.square().sum() / 2000).sqrt())
    assert float(samples.std()) / 2000**0.5 == pytest.approx(standard_error, rel=0.1)
    assert abs(float(samples.mean()) - float(matrix.trace())) < 3 * standard_error


def test_traces_are_those_of_each_weights_own_block() -> None:
    """Of a Hessian whose blocks are [[2, .], [., 6]] and [[10]], tied by products between the blocks."""
    a, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    loss = a[0] ** 2 + 3 * a[1] ** 2 + 5 * b[0] ** 2 + 0.3 * a[0] * b[0]
    samples = hutchinson_traces(loss, [a, b], num_probes=500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(dim=0), torch.tensor([8.0, 10.0]).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_of_every_knob_has_a_prediction_that_falls_with_the_bits(method: str) -> None:
    _, knobs, _, _ = digits()
    for knob, array in zip(knobs, found(method).per_knob(knobs), strict=True):
        assert array.shape == (len(knob.choices),)
        assert array[-1] == 0.0
        assert bool((np.diff(array) <= 0).all())
        assert array[0] > 0.0


def test_measured_predictions_are_divergences_of_single_changes() -> None:
    tables, knobs, reference, batches = digits()
    for knob in (knobs[0], knobs[3], knobs[-1]):
        before = reference.bits[knob.name]
        side = "weight" if knob.kind == "weight_bits" else "act"
        bits = Bits(2, before.act) if side == "weight" else Bits(before.weight, 2)
        plan = Plan(bits={**reference.bits, knob.name: bits})
        predicted = getattr(found("measured"), side)[knob.name][2]
        assert predicted == pytest.approx(divergence(tables, plan, reference, batches), rel=1e-3)


def test_replaying_a_changed_layer_equals_running_the_changed_network() -> None:
    model, draw = seeded(TinyResNet), random.Random(0)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton(model)
    tables = QuantTables(skeleton, Calibration(skeleton, [images], QuantSettings()))
    bits = {name: Bits(draw.choice((4, 8)), draw.choice((4, 8, 32))) for name in skeleton.layers}
    with torch.inference_mode():
        kept = Replay(tables.network(Plan(bits=bits), keep_inputs=True))
        assert torch.equal(kept.record(images), tables.network(Plan(bits=bits))(images))
        for name in skeleton.layers:
            for changed in (Bits(2, bits[name].act), Bits(bits[name].weight, 2), Bits(bits[name].weight, 5)):
                plan = Plan(bits={**bits, name: changed})
                replayed = kept.run(tables.network(plan, keep_inputs=True), changed=name)
                assert torch.equal(replayed, tables.network(plan)(images))


def test_fisher_of_a_linear_classifier_is_the_quadratic_form_of_its_softmax() -> None:
    """There the information is exact: error^T (diag(p) - p p^T) error, with the error of the logits."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 12, generator=generator) / 2)
    images = torch.randn(4000, 3, 2, 2, generator=generator)
    skeleton = Skeleton(model)
    tables = QuantTables(skeleton, Calibration(skeleton, [images], QuantSettings(bias_correction=False)))
    knobs = (Knob("weight_bits", "1", (2, 3, 8)), Knob("act_bits", "1", (2, 3, 8)))
    batches = [(images, torch.zeros(len(images), dtype=torch.long))]
    result = sensitivity(tables, knobs, batches, method="fisher", reference=Plan(), seed=0)
    with torch.no_grad():
        logits = model(images)
        p = logits.softmax(dim=1)
        for width in (2, 3):
            by_weight = F.linear(images.flatten(1), tables.weight("1", width).values - model[1].weight)
            rounded = tables.input_grid("1", width).quantise(images)
            by_act = F.linear((rounded - images).flatten(1), model[1].weight)
            for error, value in ((by_weight, result.weight["1"][width]), (by_act, result.act["1"][width])):
                form = (p * error.square()).sum(dim=1) - (p * error).sum(dim=1).square()
                assert value == pytest.approx(float(form.mean()) / 2, rel=0.05)


def test_fisher_and_hessian_agree_in_rank_where_the_network_fits() -> None:
    ranks = [
        [row[width] for row in found(method).weight.values() for width in (2, 3, 4, 6)]
        for method in ("fisher", "hessian")
    ]
    assert spearmanr(*ranks).statistic > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_predictions_rank_what_random_plans_lose(method: str) -> None:
    tables, knobs, reference, batches = digits()
    arrays, draw = found(method).per_knob(knobs), random.Random(0)
    predicted, lost = [], []
    for _ in range(40):
        values = [draw.choice((2, 3, 4)) for _ in knobs]
        bits = {name: [b.weight, b.act] for name, b in reference.bits.items()}
        for knob, value in zip(knobs, values, strict=True):
            bits[knob.name][knob.kind == "act_bits"] = value
        plan = Plan(bits={name: Bits(*sides) for name, sides in bits.items()})
        lost.append(divergence(tables, plan, reference, batches))
        predicted.append(sum(a[k.choices.index(v)] for a, k, v in zip(arrays, knobs, values, strict=True)))
    assert spearmanr(predicted, lost).statistic > 0.6


def test_an_exact_allocation_by_fisher_loses_less_than_uniform_bits_of_the_same_sum() -> None:
    tables, knobs, reference, batches = digits()
    arrays = found("fisher").per_knob(knobs)
    costs = {"bitops": [np.array(knob.choices, np.float64) for knob in knobs]}
    chosen = allocate_bits(arrays, costs, {"bitops": 3.0 * len(knobs)})  # type: ignore[arg-type]
    best, uniform = dict(reference.bits), dict(reference.bits)
    for knob, (index,) in zip(knobs, chosen, strict=True):
        old, value = best[knob.name], int(knob.choices[index])
        best[knob.name] = Bits(value, old.act) if knob.kind == "weight_bits" else Bits(old.weight, value)
        uniform[knob.name] = Bits(3, 3)
    loss = divergence(tables, Plan(bits=best), reference, batches)
    assert loss < divergence(tables, Plan(bits=uniform), reference, batches)


def test_equal_seeds_give_equal_predictions() -> None:
    tables, knobs, reference, batches = digits()
    again = sensitivity(tables, knobs, batches, method="fisher", reference=reference, seed=0)
    other = sensitivity(tables, knobs, batches, method="fisher", reference=reference, seed=1)
    assert again == found("fisher")
    assert other != again


def test_layers_that_share_a_knob_add_up() -> None:
    rows = Sensitivity(weight={"a": {2: 3.0, 4: 1.0}, "b": {2: 5.0, 4: 0.5}}, act={})
    (array,) = rows.per_knob([Knob("weight_bits", "ab", (2, 4), layers=("a", "b"))])
    assert array.tolist() == [6.5, 0.0]


def test_wrong_questions_are_refused() -> None:
    tables, knobs, reference, batches = digits()
    with pytest.raises(DataError, match="at least one batch"):
        sensitivity(tables, knobs, [], reference=reference, seed=0)
    with pytest.raises(ValueError, match="measured, hessian, fisher"):
        sensitivity(tables, knobs, batches, method="guess", reference=reference, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['conv'\] decide something else"):
        sensitivity(tables, [Knob("channels", "conv", (1, 2))], batches, reference=reference, seed=0)
