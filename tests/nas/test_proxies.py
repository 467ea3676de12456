"""Scores without training against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from autocompress.hardware_sim import MacsModel
from autocompress.nas.proxies import (
    PROXIES,
    fisher,
    grad_norm,
    grasp,
    jacob_cov,
    naswot,
    num_macs,
    snip,
    synflow,
    zen,
)
from autocompress.nas.spaces import NASBench201


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b, bias=False) for a, b in ((12, 6), (6, 5), (5, 3))))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 2, 2, generator=generator), torch.tensor([0, 1, 2, 0])


def test_every_layer_of_a_linear_chain_has_the_same_synaptic_flow() -> None:
    model = chain()
    images, labels = batch()
    x = torch.ones(1, 12, dtype=torch.float64)
    for layer in (1, 2, 3):
        x = x @ model[layer].weight.detach().double().abs().T
    # The sum over a layer of w * dR/dw is R for a function that is linear in that layer.
    assert synflow(model, images, labels) == pytest.approx(3 * float(x.sum()), rel=1e-9)


def test_snip_and_grad_norm_are_sums_over_the_gradient_of_one_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = batch()
    x, weight = images.flatten(1), model[1].weight.detach()
    p = torch.softmax(model(images).detach(), 1) - F.one_hot(labels, 3)
    gradient = p.T @ x / len(x)
    assert snip(model, images, labels) == pytest.approx(float((weight * gradient).abs().sum()), rel=1e-5)
    assert grad_norm(model, images, labels) == pytest.approx(float(gradient.norm()), rel=1e-5)
    # Per sample and output: a * dL/da, with dL/da = (softmax - onehot) / batch; 12 weights per output.
    products = model(images).detach() * p / len(x)
    expected = 12 * float(0.5 * (products**2).mean(0).sum())
    assert fisher(model, images, labels) == pytest.approx(expected, rel=1e-5)


def test_fisher_counts_a_channel_of_a_convolution_once_per_weight() -> None:
    torch.manual_seed(0)
    convolution, images, labels = nn.Conv2d(3, 4, 3, padding=1, bias=False), *batch()
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    a = convolution(images).detach().requires_grad_(True)
    F.cross_entropy(a.mean((2, 3)), labels).backward()
    assert a.grad is not None
    channels = 0.5 * ((a.detach() * a.grad).sum((2, 3)) ** 2).mean(0)
    assert fisher(model, images, labels) == pytest.approx(3 * 9 * float(channels.sum()), rel=1e-4)


def test_grasp_is_minus_the_weights_times_the_hessian_times_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    images, labels = batch()
    weights = tuple(model[i].weight.detach().clone() for i in (1, 3))

    def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.tanh(images.flatten(1) @ first.T) @ second.T, labels)

    gradient = torch.autograd.functional.jacobian(loss, weights)
    _, product = torch.autograd.functional.hvp(loss, weights, gradient)
    expected = -sum(float((w * p).sum()) for w, p in zip(weights, product, strict=True))
    assert grasp(model, images, labels) == pytest.approx(expected, rel=1e-4)


def test_networks_that_react_alike_to_all_images_score_lower() -> None:
    images, labels = batch()
    linear = chain()  # the gradient by the input is the same for every image
    torch.manual_seed(1)
    curved = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 3))
    assert jacob_cov(linear, images, labels) < jacob_cov(curved, images, labels)
    # Perfectly correlated gradients: eigenvalues 4, 0, 0, 0.
    expected = -(math.log(4 + 1e-5) + 1 / (4 + 1e-5) + 3 * (math.log(1e-5) + 1e5))
    assert jacob_cov(linear, images, labels) == pytest.approx(expected, rel=1e-3)


def test_naswot_is_the_determinant_of_agreeing_signs_and_minus_infinity_for_equal_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    images = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, 1, 1, 1]]).reshape(3, 1, 2, 2)
    kernel = torch.tensor([[4.0, 2, 2], [2, 4, 2], [2, 2, 4]], dtype=torch.float64)  # agreeing signs
    labels = torch.zeros(3, dtype=torch.int64)
    assert naswot(model, images, labels) == pytest.approx(float(torch.logdet(kernel)))
    assert naswot(model, torch.cat([images, images[:1]]), torch.zeros(4, dtype=torch.int64)) == -math.inf


def test_zen_grows_by_what_batchnorm_divides_away() -> None:
    images, labels = torch.zeros(64, 3, 8, 8), torch.zeros(64, dtype=torch.int64)
    narrow = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(576, 2)
    )
    score = zen(narrow, images, labels)
    # One layer of N(0, 1) weights on N(0, 1) images: variance 27 per channel. The output moves by
    # 0.01 * sqrt(27) * N(0, 1) / sqrt(27) per value: E|.| = 0.01 * sqrt(2 / pi) over 576 values.
    expected = math.log(576 * 0.01 * math.sqrt(2 / math.pi)) + 0.5 * math.log(27)
    assert score == pytest.approx(expected, abs=0.1)


def test_macs_are_those_of_the_graph() -> None:
    space = NASBench201((3, 8, 8), 10, channels=4, cells_per_stage=1)
    arch = dict.fromkeys(space.decisions, "nor_conv_3x3")
    images, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    assert num_macs(space.build(arch, seed=0), images, labels) == MacsModel()(space.graph(arch))["macs"]


@pytest.mark.parametrize("name", list(PROXIES))
def test_scores_are_repeatable_leave_the_network_alone_and_rank_no_network_above_a_dead_one(
    name: str,
) -> None:
    space = NASBench201((3, 8, 8), 10, channels=4, cells_per_stage=1)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8)
    model = space.build(dict.fromkeys(space.decisions, "nor_conv_3x3"), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = PROXIES[name](model, images, labels), PROXIES[name](model, images, labels)
    assert first == second
    assert math.isfinite(first)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_synflow_ranks_cells_as_well_as_the_published_scores_of_the_same_cells(shared: Path) -> None:
    published = json.loads((shared / "data/nas/zc_nasbench201.json").read_text())["cifar10"]
    known = {key: scores for key, scores in published.items() if "synflow" in scores}
    keys = [str(key) for key in np.random.default_rng(0).permutation(sorted(known))[:100]]
    operations = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
    space, ours = NASBench201(), []
    for number, key in enumerate(keys):
        codes = [int(code) for code in key.strip("()").split(",")]
        arch = {
            name: operations[code]
            for name, code in zip(sorted(space.decisions, key=edge), codes, strict=True)
        }
        ours.append(synflow(space.build(arch, seed=number), torch.zeros(1, 3, 32, 32), torch.zeros(1)))
    accuracy = [known[key]["val_accuracy"] for key in keys]
    theirs = spearmanr([known[key]["synflow"]["score"] for key in keys], accuracy).statistic
    assert spearmanr(ours, accuracy).statistic == pytest.approx(theirs, abs=0.1)
    assert theirs > 0.5


def edge(name: str) -> tuple[int, int]:
    """Edges by source and then by target, the order of the published tuples."""
    source, target = name.removeprefix("cell.").split("_")
    return int(source), int(target)
