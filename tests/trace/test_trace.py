"""The laws of tracing: shrunk = masked, predicted = measured, and what cannot be pruned is locked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from networks import NETWORKS, TinyDenseNet, TinyInception, TinyPadded, TinyResNet, TinyVGG, seeded
from torch import Tensor, nn
from trace_laws import assert_laws_hold

from autocompress.core.errors import UnsupportedModelError
from autocompress.hardware_sim import MacsModel
from autocompress.trace import keep_first, measure, shrink, trace
from autocompress.zoo import build

SHAPE = (3, 16, 16)


@pytest.mark.parametrize("kind", [*NETWORKS, TinyPadded])
def test_random_plans_shrunk_equals_masked_and_predicted_equals_measured(kind: type[nn.Module]) -> None:
    assert_laws_hold(seeded(kind), SHAPE, num_plans=25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*NETWORKS, TinyPadded])
def test_two_hundred_random_plans_of_every_kind_of_coupling(kind: type[nn.Module]) -> None:
    assert_laws_hold(seeded(kind), SHAPE, num_plans=200)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet20", "resnet56", "mobilenet_v1", "mobilenet_v2"])
def test_two_hundred_random_plans_of_the_networks_for_small_images(name: str) -> None:
    model = build(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    assert_laws_hold(model.eval(), (3, 32, 32), num_plans=200)


def test_padded_shortcuts_tie_stages_together_and_lock_what_the_padding_adds() -> None:
    graph = trace(seeded(TinyPadded), SHAPE).graph
    group = graph.group("stem.0")
    assert (group.size, group.locked, group.producers) == (16, None, ("stem.0", "first.0", "second.0"))
    assert "never go" in str(graph.group("first.0").locked)


@pytest.mark.parametrize("kind", NETWORKS)
def test_everything_but_the_classes_is_prunable(kind: type[nn.Module]) -> None:
    graph = trace(seeded(kind), SHAPE).graph
    locked = [group for group in graph.groups if group.locked is not None]
    assert len(locked) == 1
    assert "output" in str(locked[0].locked)


def test_the_empty_choice_changes_nothing() -> None:
    model = seeded(TinyResNet)
    traced = trace(model, SHAPE)
    small = shrink(model, traced, {})
    assert {k: v.shape for k, v in small.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_residual_adds_tie_producers_into_one_group() -> None:
    graph = trace(seeded(TinyResNet), SHAPE).graph
    assert set(graph.group("stem.0").producers) == {"stem.0", "a.1"}
    assert {"b.1", "shortcut"} in [set(group.producers) for group in graph.groups]


def test_a_flattened_channel_counts_once_per_position() -> None:
    graph = trace(seeded(TinyVGG), SHAPE).graph
    layer = next(x for x in graph.layers if x.name == "head.1")
    assert layer.in_width.terms == (("features.2.0", 4),)


def test_concatenated_inputs_are_sums_of_groups() -> None:
    graph = trace(seeded(TinyDenseNet), SHAPE).graph
    last = next(x for x in graph.layers if x.name == "layers.2.2")
    assert last.in_width.terms == (("stem", 1), ("layers.0.2", 1), ("layers.1.2", 1))


def test_grouped_convolutions_lose_whole_groups() -> None:
    model = seeded(TinyInception)
    traced = trace(model, SHAPE)
    owners = [g for g in traced.graph.prunable if "grouped.0" in g.producers]
    kept = {g.name: np.arange(1, dtype=np.int64) for g in owners}
    small = shrink(model, traced, kept)
    conv = small.get_submodule("grouped.0")
    assert conv.groups * 4 == conv.in_channels == conv.out_channels < 32


class Shuffled(nn.Module):
    """Re-orders channels between two layers, which index arithmetic alone does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(torch.relu(self.second(torch.relu(self.first(x)).flip(1))))
        return self.head(x.mean((2, 3)))


def test_a_group_whose_channels_are_reordered_is_locked_and_the_rest_stays_prunable() -> None:
    graph = trace(Shuffled(), (3, 4, 4)).graph
    assert "flip" in str(graph.group("first").locked)
    assert {group.name for group in graph.prunable} == {"second", "third"}


class Normed(nn.Module):
    """LayerNorm mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def test_channels_under_layernorm_are_locked_with_the_layers_name() -> None:
    assert "'norm' (LayerNorm)" in str(trace(Normed(), (6,)).graph.group("first").locked)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.stem(x))).mean((2, 3)))


def test_a_module_called_twice_counts_its_macs_twice_and_its_weights_once() -> None:
    graph = trace(Twice(), (3, 9, 9)).graph
    assert [layer.name for layer in graph.layers] == ["stem", "again", "again@2", "head"]
    cost = MacsModel()(graph)
    assert cost["params"] == sum(p.numel() for p in Twice().parameters())
    assert cost["macs"] == 8 * 3 * 9 * 49 + 8 * 8 * 9 * (25 + 9) + 8 * 5


class Attention(nn.Module):
    """A matrix product that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return self.head((q @ q.transpose(1, 2) @ x).mean(1))


def test_arithmetic_outside_layers_is_listed() -> None:
    graph = trace(Attention(), (5, 4)).graph
    (note,) = graph.uncounted
    assert note.startswith(f"{2 * 5 * 5 * 4} MACs")


def test_a_wrong_image_size_is_refused_with_the_shape() -> None:
    with pytest.raises(UnsupportedModelError, match="1x9x9"):
        trace(seeded(TinyVGG), (1, 9, 9))


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing can be pruned"):
        trace(nn.ReLU(), (3, 4, 4))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "googlenet", "resnext50_32x4d", "mobilenet_v3_small"]
)
def test_torchvision_networks_at_half_width_cost_what_was_predicted(name: str) -> None:
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    traced = trace(model, (3, 64, 64))
    half = {group.name: max(1, group.size // 2) for group in traced.graph.prunable}
    predicted = MacsModel()(traced.graph.with_channels(half))
    measured = measure(shrink(model, traced, keep_first(traced, half)), (3, 64, 64))
    assert measured == {"macs": predicted["macs"], "params": predicted["params"]}
