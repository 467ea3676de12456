"""The weight-sharing supernet: every path is its member to the last bit, and its training can be resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joint_problems import tiny_space
from torch import Tensor

from autocompress.core import Plan
from autocompress.core.errors import CheckpointError, DivergenceError, RecipeError
from autocompress.nas import ElasticSupernet, fit_elastic
from autocompress.training import (
    Data,
    EpochReport,
    TrainSettings,
    evaluate,
    load_data,
    recalibrate_batchnorm,
    subset,
)

JOINT = tiny_space()
SETTINGS = TrainSettings(epochs=2, batch_size=32, lr=0.05, distill_weight=1.0, distill_temperature=1.0)


class Untouchable:
    """A test split that training must not read."""

    def __len__(self) -> int:
        raise AssertionError("the test split was read")

    def __getitem__(self, index: int, /) -> Any:
        raise AssertionError("the test split was read")


def digits(num: int = 64) -> Data:
    data = load_data("digits", search_size=0.5, seed=0)
    train, search = (subset(split, np.arange(num)) for split in (data.train, data.search))
    return replace(data, train=train, search=search, test=Untouchable())


def images(seed: int, number: int = 16) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def supernet() -> ElasticSupernet:
    """With maps between kernels that are not the identity, and weights of some training."""
    found = ElasticSupernet(JOINT, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def plans(number: int) -> list[Plan]:
    rng = np.random.default_rng(0)
    return [JOINT.largest, JOINT.smallest, *(JOINT.random(rng) for _ in range(number))]


def test_fresh_weights_are_those_of_the_largest_member_and_maps_are_the_identity() -> None:
    own, largest = ElasticSupernet(JOINT, seed=3), JOINT.build(JOINT.largest, seed=3)
    tensors = own.network.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in largest.state_dict().items())
    assert {n for n in tensors.keys() - largest.state_dict().keys() if ".maps." not in n} == set()
    small = JOINT.build(Plan(JOINT.largest.arch | {"block01": "k3e4"}), seed=3)
    member = own.member(Plan(JOINT.largest.arch | {"block01": "k3e4"}))
    name = "features.block01.conv.3.weight"
    assert torch.equal(member.state_dict()[name], tensors[name][:, :, 1:-1, 1:-1])
    assert member.state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("training", [True, False])
def test_every_path_computes_what_its_member_does_to_the_last_bit(training: bool) -> None:
    whole = supernet()
    for plan in plans(4):
        whole.use(plan)
        member = whole.member(plan)
        for network in (whole, member):
            if not training:
                recalibrate_batchnorm(network, [images(1), images(2)])
            network.train(training)
        assert torch.equal(whole(images(3)), member(images(3)))


def test_a_member_has_the_plans_widths_and_weights_of_its_own() -> None:
    whole, plan = supernet(), JOINT.smallest
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    member = whole.member(plan)
    shapes = {name: tensor.shape for name, tensor in member.state_dict().items()}
    assert shapes == {n: t.shape for n, t in JOINT.build(plan, seed=0).state_dict().items()}
    assert not any("block01" in name for name in shapes)
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())


def test_a_narrow_path_teaches_its_first_channels_only() -> None:
    whole, plan = supernet().train(), JOINT.smallest
    whole.use(plan)
    whole(images(0)).square().sum().backward()
    gradients = {n: p.grad for n, p in whole.network.named_parameters()}
    expand, depthwise = (gradients[f"features.block03.conv.{i}.weight"] for i in (0, 3))
    assert expand is not None
    assert depthwise is not None
    assert bool(expand[:8].any())
    assert not bool(expand[8:].any())
    assert bool(depthwise[:8, :, 1:-1, 1:-1].any())
    assert not bool(depthwise[:8, :, 0].any())  # the rim of a 5x5 that a 3x3 leaves out
    assert gradients["features.block01.conv.0.weight"] is None  # skipped


def test_a_training_cut_short_and_repeated_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    straight, resumed = ElasticSupernet(JOINT, seed=0), ElasticSupernet(JOINT, seed=0)
    reports = fit_elastic(straight, digits(), SETTINGS, seed=5)

    def kill(report: EpochReport) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "elastic.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit_elastic(resumed, digits(), SETTINGS, seed=5, checkpoint=path, on_epoch=kill)
    again = ElasticSupernet(JOINT, seed=9)  # its weights come from the checkpoint
    found = fit_elastic(again, digits(), SETTINGS, seed=5, checkpoint=path)
    assert [replace(r, seconds=0) for r in found] == [replace(r, seconds=0) for r in reports]
    tensors = straight.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in again.state_dict().items())
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if ".maps." in name)
    with pytest.raises(CheckpointError, match="num_random: 2 there, 1 here"):
        fit_elastic(again, digits(), SETTINGS, seed=5, num_random=1, checkpoint=path)


def test_impossible_paths_and_settings_are_refused_and_divergence_is_named() -> None:
    whole = ElasticSupernet(JOINT, seed=0)
    with pytest.raises(RecipeError, match="block01"):
        whole.use(Plan())
    with pytest.raises(ValueError, match="from 1 to 32 channels, got 40"):
        whole.use(Plan(JOINT.largest.arch, {"features.block01.conv.0": 40}))
    with pytest.raises(ValueError, match="no block has the channels"):
        whole.member(Plan(JOINT.largest.arch, {"features.head.0": 8}))
    with pytest.raises(RecipeError, match="num_random"):
        fit_elastic(whole, digits(), SETTINGS, seed=0, num_random=-1)
    with pytest.raises(DivergenceError, match="epoch 0"):
        fit_elastic(whole, digits(), replace(SETTINGS, lr=1e30), seed=0)


@pytest.mark.slow
def test_after_training_members_that_were_never_trained_alone_know_the_digits() -> None:
    data = load_data("digits", search_size=0.3, seed=0)
    whole = ElasticSupernet(JOINT, seed=0)
    settings = TrainSettings(15, 64, 0.1, distill_weight=1.0, distill_temperature=1.0, clip_norm=5.0)
    reports = fit_elastic(whole, data, settings, seed=0)
    assert reports[-1].search_accuracy > 0.9
    for plan in plans(4):
        member = whole.member(plan)
        recalibrate_batchnorm(member, [data.train.batch(torch.arange(256), None)[0]])  # type: ignore[attr-defined]
        assert evaluate(member, data.search).accuracy > 0.8
