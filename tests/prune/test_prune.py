"""Importance, knobs and least-squares repair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS, TinyInception, TinyResNet, TinyVGG, seeded
from torch import nn

from autocompress.core import Plan
from autocompress.core.errors import DivergenceError
from autocompress.prune import (
    METHODS,
    Reconstruction,
    channel_knobs,
    compress_channels,
    keep_best,
    unit_scores,
)
from autocompress.trace import mask, shrink, trace

SHAPE = (3, 16, 16)


def images(count: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_l1_is_the_mean_normalised_sum_of_absolute_weights_of_producer_and_consumer() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0]]))
        net[2].weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [1.0, -1.0, 4.0]]))
    scores = unit_scores(net, trace(net, (2,)), "l1")["0"]
    produced, read = torch.tensor([2.0, 4.0, 3.0]), torch.tensor([2.0, 1.0, 6.0])
    torch.testing.assert_close(scores, produced / 3 + read / 3)


def test_taylor_is_zero_for_channels_without_influence_on_the_loss() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[2].weight[:, 1] = 0.0
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    scores = unit_scores(net, trace(net, (2,)), "taylor", [(x, (x[:, 0] > 0).long())])["0"]
    assert scores.argmin() == 1
    assert scores[1] == 0


def test_the_geometric_median_drops_the_filter_closest_to_the_others() -> None:
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0], [10.0], [4.0]]))
    scores = unit_scores(net, trace(net, (1,)), "geometric_median")
    assert list(keep_best(scores, {"0": 2})["0"]) == [0, 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_method_scores_every_unit_of_every_prunable_group(kind: type[nn.Module], method: str) -> None:
    model = seeded(kind)
    traced = trace(model, SHAPE)
    batch = [(images(8), torch.arange(8))]
    scores = unit_scores(model, traced, method, batch)
    assert {name: len(s) for name, s in scores.items()} == {g.name: g.size for g in traced.graph.prunable}


def test_scores_of_nan_weights_are_an_error() -> None:
    model = seeded(TinyVGG)
    traced = trace(model, SHAPE)
    with torch.no_grad():
        model.get_submodule("features.0.0").weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(DivergenceError, match="NaN"):
        unit_scores(model, traced, "l1")


def test_of_equal_scores_the_first_units_stay() -> None:
    assert list(keep_best({"g": torch.ones(6)}, {"g": 3})["g"]) == [0, 1, 2]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_knob_choices_ascend_to_the_full_size_and_respect_the_least_share(
    kind: type[nn.Module], round_to: int
) -> None:
    graph = trace(seeded(kind), SHAPE).graph
    for knob in channel_knobs(graph, round_to=round_to, min_keep=0.3):
        size = graph.sizes[knob.name]
        assert knob.choices[-1] == size
        assert knob.choices[0] >= 0.3 * size
        assert len(knob.features) == 8
        step = min(round_to, size // 4)
        assert all(c % step == 0 for c in knob.choices[:-1] if graph.group(knob.name).size >= 4 * round_to)


def test_choices_are_multiples_of_eight_channels_where_there_is_room() -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 2))
    first, second = channel_knobs(trace(net, (4,)).graph, round_to=8, min_keep=0.2)
    assert first.choices == (16, 24, 32, 40, 48, 56, 64)
    assert second.choices == (16, 24, 32, 40, 48, 56, 60)


def test_kept_layers_have_no_knob_and_an_unmatched_pattern_is_an_error() -> None:
    graph = trace(seeded(TinyVGG), SHAPE).graph
    names = {knob.name for knob in channel_knobs(graph, keep=("features.*",))}
    assert names == {"head.1"}
    with pytest.raises(ValueError, match="match no layer"):
        channel_knobs(graph, keep=("fetures.*",))


@pytest.mark.parametrize("kind", NETWORKS)
def test_reconstruction_changes_nothing_when_the_outputs_depend_on_kept_channels_only(
    kind: type[nn.Module],
) -> None:
    model = seeded(kind)
    traced = trace(model, SHAPE)
    kept = {g.name: np.arange(g.size // 2, dtype=np.int64) for g in traced.graph.prunable}
    masked = mask(model, traced, kept)
    small = shrink(masked, traced, kept)
    Reconstruction(masked, traced, [images(64)], num_images=64).apply(small, kept)
    x = images(32, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), atol=1e-3, rtol=1e-3)


def test_a_layer_that_only_ever_reads_zeros_is_left_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    traced, kept = trace(net, (3,)), {"0": np.array([0, 1])}
    small = shrink(net, traced, kept)
    Reconstruction(net, traced, [torch.ones(5, 3)], num_images=5).apply(small, kept)
    torch.testing.assert_close(small[1].weight, net[1].weight[:, :2])


def test_layers_that_run_in_training_only_are_left_as_they_are() -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.auxiliary = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x).relu()
            return self.head(x) + (self.auxiliary(x) if self.training else 0)

    net = seeded(WithAuxiliary)
    traced, kept = trace(net, (3,)), {"body": np.array([0, 2])}
    small = shrink(net, traced, kept)
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    Reconstruction(net, traced, [x], num_images=len(x)).apply(small, kept)
    torch.testing.assert_close(small.auxiliary.weight, net.auxiliary.weight[:, [0, 2]])


def test_reconstruction_is_the_closed_form_for_gaussian_inputs() -> None:
    """W' = W S[:, K] S[K, K]^-1 with S the second moments of the inputs (AMC's least squares)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(mixing)
    traced = trace(net, (6,))
    x = torch.randn(20000, 6, generator=generator)
    kept = {"0": np.array([0, 2, 3, 5])}
    small = shrink(net, traced, kept)
    Reconstruction(net, traced, [x], num_images=len(x), ridge=1e-9).apply(small, kept)
    moments = mixing @ mixing.T
    keep = torch.tensor([0, 2, 3, 5])
    wanted = net[1].weight @ moments[:, keep] @ torch.linalg.inv(moments[keep][:, keep])
    assert (small[1].weight - wanted).abs().max() < 0.07 * wanted.abs().max()


def test_reconstruction_brings_every_refitted_layer_closer_to_its_outputs() -> None:
    model = seeded(TinyResNet)
    traced = trace(model, SHAPE)
    kept = {g.name: np.arange(g.size // 2, dtype=np.int64) for g in traced.graph.prunable}
    plain, repaired = shrink(model, traced, kept), shrink(model, traced, kept)
    Reconstruction(model, traced, [images(128)], num_images=128).apply(repaired, kept)
    x = images(128, seed=1)
    with torch.no_grad():
        wanted = model(x)
        assert (repaired(x) - wanted).square().mean() < 0.7 * (plain(x) - wanted).square().mean()


def test_nan_calibration_images_are_an_error() -> None:
    model = seeded(TinyVGG)
    with pytest.raises(DivergenceError, match="calibration"):
        Reconstruction(model, trace(model, SHAPE), [torch.full((4, *SHAPE), float("nan"))], num_images=4)


def test_compress_channels_keeps_the_best_units_and_leaves_the_input_alone() -> None:
    model = seeded(TinyInception)
    traced = trace(model, SHAPE)
    scores = unit_scores(model, traced, "l2")
    name = "three.0.0"
    small = compress_channels(model, Plan(channels={name: 3}), traced=traced, scores=scores)
    best = scores[name].topk(3).indices.sort().values
    torch.testing.assert_close(small.get_submodule(name).weight, model.get_submodule(name).weight[best])
    assert model.get_submodule(name).out_channels == 8


def test_a_plan_for_another_network_is_an_error() -> None:
    model = seeded(TinyVGG)
    traced = trace(model, SHAPE)
    with pytest.raises((ValueError, KeyError)):
        compress_channels(model, Plan(channels={"nope": 3}), traced=traced, scores=unit_scores(model, traced))
