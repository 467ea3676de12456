"""Scores and BatchNorm recalibration."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress import zoo
from autocompress.core.errors import DataError, DivergenceError, RecipeError, UnsupportedModelError
from autocompress.training import Images, evaluate, load_data, recalibrate_batchnorm


class _Logits(nn.Module):
    """Returns the pixels of the image as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def _rows(rows: list[list[float]], labels: list[int]) -> Images:
    return Images(torch.tensor(rows)[:, :, None, None], torch.tensor(labels))


def test_accuracy_and_loss_follow_their_formulas() -> None:
    rows, labels = [[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]], [0, 0, 0, 1]
    losses = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(rows, labels, strict=True)]
    for batch_size in (1, 3, 4):
        scores = evaluate(_Logits(), _rows(rows, labels), batch_size=batch_size)
        assert (scores.accuracy, scores.num_samples) == (0.75, 4)
        assert scores.loss == pytest.approx(sum(losses) / 4)


def test_rows_that_are_not_finite_are_wrong_answers() -> None:
    nan, inf = math.nan, math.inf
    scores = evaluate(_Logits(), _rows([[nan, 0.0], [inf, 0.0], [nan, nan], [1.0, 1.0]], [0, 0, 0, 0]))
    assert scores.accuracy == 0.25
    assert scores.loss == pytest.approx(math.log(2))


def test_a_network_of_nan_does_not_score_on_class_0() -> None:
    with pytest.raises(DivergenceError, match="no logit of samples 0 to 1 is finite"):
        evaluate(_Logits(), _rows([[math.nan, math.nan]] * 2, [0, 0]))


def test_evaluation_leaves_modes_and_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = _rows([[1.0, 0.0]] * 8, [0] * 8)
    assert evaluate(model, data) == evaluate(model, data)
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_limit_takes_that_many_samples() -> None:
    data = _rows([[1.0, 0.0]] * 50 + [[0.0, 1.0]] * 50, [0] * 100)
    assert evaluate(_Logits(), data, limit=10).accuracy == 0.5
    assert evaluate(_Logits(), data, limit=10).num_samples == 10
    assert evaluate(_Logits(), data, limit=1000).num_samples == 100
    with pytest.raises(RecipeError, match="limit must be >= 1, got 0"):
        evaluate(_Logits(), data, limit=0)


def test_bfloat16_scores_lie_near_those_of_float32() -> None:
    data = load_data("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.build("digits_vgg", num_classes=10, in_channels=1)
    full, low = (evaluate(model, data.search, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert low.loss == pytest.approx(full.loss, rel=2e-2)
    assert low.loss != full.loss


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (nn.Conv2d(3, 2, 1), DataError, r"input of shape \(2, 2, 1, 1\): .*expected input.* 3 channels"),
        (nn.Identity(), UnsupportedModelError, r"got shape \(2, 2, 1, 1\)"),
        (nn.Flatten(2), UnsupportedModelError, r"got shape \(2, 2, 1\)"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(2, 5)),
            DataError,
            "labels 0 to 7 do not fit a network of 5 outputs",
        ),
    ],
)
def test_data_that_does_not_fit_the_network_is_named(model: nn.Module, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        evaluate(model, _rows([[1.0, 0.0]] * 2, [0, 7]))


def test_recalibrated_statistics_are_those_of_the_inputs() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.9), nn.ReLU(), nn.BatchNorm2d(3)
    )
    model[1].momentum = 0.03
    model[4].eval()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for layer in (model[1], model[4]):
        layer.running_mean += 7
    inputs = torch.randn(6, 5, 1, 4, 4)
    recalibrate_batchnorm(model, inputs)
    values = [model[0](x) for x in inputs]
    means = torch.stack([v.mean((0, 2, 3)) for v in values])
    variances = torch.stack([v.var((0, 2, 3)) for v in values])
    assert torch.allclose(model[1].running_mean, means.mean(0), atol=1e-5)
    assert torch.allclose(model[1].running_var, variances.mean(0), atol=1e-5)
    # Dropout was off, so the second layer saw the rectified output of the first.
    after = torch.stack([_normalised(v).relu().mean((0, 2, 3)) for v in values]).mean(0)
    assert torch.allclose(model[4].running_mean, after, atol=1e-5)
    assert [m.training for m in model] == [True, True, True, True, False]
    assert (model[1].momentum, model[4].momentum) == (0.03, 0.1)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def _normalised(x: Tensor) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt()


def test_statistics_measured_in_bfloat16_are_those_in_32_bits_within_its_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
    )
    low, inputs = copy.deepcopy(model), torch.randn(4, 64, 3, 8, 8)
    recalibrate_batchnorm(model, inputs)
    recalibrate_batchnorm(low, inputs, dtype=torch.bfloat16)
    for index in (1, 4):
        spread = model[index].running_var.sqrt()
        assert low[index].running_mean.dtype == low[index].running_var.dtype == torch.float32
        assert not torch.equal(low[index].running_mean, model[index].running_mean)
        assert ((low[index].running_mean - model[index].running_mean).abs() / spread).max() < 0.01
        assert (low[index].running_var / model[index].running_var - 1).abs().max() < 0.02


def test_recalibration_without_inputs_is_refused_and_keeps_the_statistics() -> None:
    model = nn.BatchNorm2d(2)
    model.running_mean += 1
    with pytest.raises(DataError, match="at least one batch"):
        recalibrate_batchnorm(model, [])
    assert model.running_mean.tolist() == [1, 1]


def test_recalibration_reads_nothing_without_batchnorm() -> None:
    stream = iter([torch.zeros(1, 2)])
    recalibrate_batchnorm(nn.Linear(2, 2), stream)
    assert next(stream).shape == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy"),
    # Accuracy the checkpoints are published with.
    [("resnet20", 0.9173), ("resnet56", 0.9339)],
)
def test_public_checkpoints_reach_their_published_accuracy(
    shared: Path, tmp_path: Path, name: str, accuracy: float
) -> None:
    scripts = shared / "data"
    environment = {**os.environ, "PYTHONPATH": str(scripts), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, scripts / "unpack.py", tmp_path], check=True, env=environment)
    model = zoo.build(name, num_classes=10)
    zoo.load_weights(model, scripts / "checkpoints" / f"cifar10_{name}_akamaster.pth")
    data = load_data("cifar10", root=tmp_path)
    assert evaluate(model, data.test).accuracy == pytest.approx(accuracy, abs=1e-4)
