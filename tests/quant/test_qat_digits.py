"""What training for a plan of bits gives back, on handwritten digits; a binary network bit by bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import zoo
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize
from autocompress.quant.binary import popcount_dot, sign_thresholds
from autocompress.quant.qat import QatNetwork
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data

QAT = TrainSettings(epochs=6, batch_size=64, lr=0.02, weight_decay=1e-4, distill_weight=0.5)


@cache
def digits() -> Data:
    return load_data("digits")


@cache
def float_network(kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = binary_shaped() if kind == "binary" else zoo.build(kind, num_classes=10, in_channels=1)
    fit(model, digits(), TrainSettings(epochs=8, batch_size=64, lr=0.05, warmup_epochs=1), seed=seed)
    return model.eval()


def binary_shaped() -> nn.Module:
    """Two convolutions and a linear layer, with saturating activations, for signs."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.Hardtanh(),
        nn.Conv2d(32, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.Hardtanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4, 10),
    )


def calibration_images() -> tuple[Tensor, ...]:
    return digits().train.batch(torch.arange(256), None)[0].split(64)


def tables_of(model: nn.Module, **settings: object) -> QuantTables:
    skeleton = Skeleton(model)
    return QuantTables(skeleton, Calibration(skeleton, calibration_images(), QuantSettings(**settings)))


def two_bits(tables: QuantTables) -> Plan:
    """Two bits everywhere but for the image and the last layer, as is usual."""
    first, *_, last = tables.skeleton.layers
    bits = dict.fromkeys(tables.skeleton.layers, Bits(2, 2))
    return Plan(bits=bits | {first: Bits(8, 8), last: Bits(8, 8)})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_gives_back_most_of_what_two_bits_cost(seed: int) -> None:
    model, data = float_network("digits_vgg", seed), digits()
    tables = tables_of(model)
    plan = two_bits(tables)
    whole = evaluate(model, data.test).accuracy
    rounded = evaluate(tables.network(plan), data.test).accuracy
    student = QatNetwork(tables, plan, calibration_images())
    fit(student, data, QAT, seed=seed, teacher=tables.skeleton.graph_module)
    trained = evaluate(student.brevitas(), data.test).accuracy
    assert rounded < whole - 0.1
    assert trained > whole - 0.15 * (whole - rounded)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"power_of_two": True}, {"per_channel": False}])
def test_training_without_batchnorm_gives_back_most_of_what_three_bits_cost(
    settings: dict[str, bool],
) -> None:
    model, data = float_network("digits_vgg", 0), digits()
    tables = tables_of(model, **settings)
    plan = Plan(bits={name: Bits(3, 3) if b.weight == 2 else b for name, b in two_bits(tables).bits.items()})
    whole = evaluate(model, data.test).accuracy
    rounded = evaluate(tables.network(plan), data.test).accuracy
    student = QatNetwork(tables, plan, calibration_images())
    fit(student, data, replace(QAT, lr=0.005), seed=0, teacher=tables.skeleton.graph_module)
    trained = evaluate(student.brevitas(), data.test).accuracy
    assert trained > whole - 0.3 * (whole - rounded)


@pytest.mark.slow
def test_the_brevitas_network_can_be_trained_itself() -> None:
    model, data = float_network("digits_vgg", 0), digits()
    tables = tables_of(model)
    plan = Plan(bits={name: Bits(3, 3) if b.weight == 2 else b for name, b in two_bits(tables).bits.items()})
    network = quantize(tables, plan)
    rounded = evaluate(network, data.test).accuracy
    fit(network, data, replace(QAT, lr=0.001), seed=0, teacher=tables.skeleton.graph_module)
    trained = evaluate(network, data.test).accuracy
    assert trained > rounded
    thresholds = [p for name, p in network.named_parameters() if name.endswith("scaling_impl.value")]
    assert all(bool((threshold > 0).all()) for threshold in thresholds)


@pytest.mark.slow
def test_bfloat16_training_ends_with_a_network_that_is_as_good_in_float32() -> None:
    model, data = float_network("digits_vgg", 0), digits()
    tables = tables_of(model)
    found = {}
    for mixed in (False, True):
        student = QatNetwork(tables, two_bits(tables), calibration_images())
        settings = replace(QAT, mixed_precision=mixed)
        (*_, last) = fit(student, data, settings, seed=0, teacher=tables.skeleton.graph_module)
        found[mixed] = evaluate(student.brevitas(), data.search).accuracy
        assert abs(found[mixed] - last.search_accuracy) < 0.02
    assert found[True] > found[False] - 0.03


def binary_plan(tables: QuantTables) -> Plan:
    """Signs between the layers and in the weights; an 8-bit image and an 8-bit last layer."""
    first, second, last = tables.skeleton.layers
    return Plan(bits={first: Bits(8, 8), second: Bits(1, 1), last: Bits(8, 1)})


def whole_weights(layer: nn.Module) -> Tensor:
    weight = layer.quant_weight()
    return (weight.value / weight.scale).round().double()


def whole_biases(layer: nn.Module, input_scale: Tensor) -> Tensor:
    return (layer.bias / (input_scale * layer.quant_weight().scale.flatten())).round().double()


def integer_logits(network: nn.Module, images: Tensor) -> Tensor:
    """The binary network in whole numbers: accumulators, popcounts, comparisons; scaled at the very end."""
    first, second, last = (network.get_submodule(name) for name in ("0", "3", "8"))
    image = network.get_submodule("input_1_quant8")(images)
    scales = [network.get_submodule(name).act_quant.scale() for name in ("_2_quant1", "_5_quant1")]
    integers = (image.value / image.scale).round().double()
    sums = F.conv2d(integers, whole_weights(first)).long().movedim(1, -1).numpy()
    at_least = sign_thresholds(1.0, whole_biases(first, image.scale), 0.0, 1.0)
    signs = at_least.positive(sums)  # (N, 6, 6, 32)

    windows = np.lib.stride_tricks.sliding_window_view(signs, (3, 3), axis=(1, 2))  # (N, 4, 4, 32, 3, 3)
    rows = windows.reshape(*windows.shape[:3], -1)
    fan_in = rows.shape[-1]
    agreeing = (popcount_dot(whole_weights(second).flatten(1).numpy() > 0, rows) + fan_in) // 2
    at_least = sign_thresholds(1.0, whole_biases(second, scales[0]), 0.0, 1.0).on_popcounts(fan_in)
    signs = at_least.positive(agreeing)
    pooled = F.max_pool2d(torch.from_numpy(signs).movedim(-1, 1).float(), 2).flatten(1).double() * 2 - 1

    logits = pooled @ whole_weights(last).T + whole_biases(last, scales[1])
    return logits * scales[1] * last.quant_weight().scale.flatten()


@pytest.mark.slow
def test_a_binary_network_learns_the_digits_and_is_whole_numbers_bit_by_bit() -> None:
    """With powers of two as scales; others are rounded in float32, which decides exact ties by chance."""
    model, data = float_network("binary", 0), digits()
    tables = tables_of(model, power_of_two=True)
    student = QatNetwork(tables, binary_plan(tables), calibration_images())
    fit(student, data, replace(QAT, epochs=10), seed=0, teacher=tables.skeleton.graph_module)
    network = student.brevitas()
    assert evaluate(network, data.test).accuracy > 0.9
    images = data.test.batch(torch.arange(len(data.test)), None)[0]
    with torch.no_grad():
        assert torch.equal(integer_logits(network, images).float(), network(images))
