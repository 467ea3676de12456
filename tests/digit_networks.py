"""Networks that know scikit-learn's digits, and their quantised forms; for tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

from autocompress.core import Bits, Plan
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize
from autocompress.zoo import build

SHAPE = (1, 8, 8)
NUM_TRAINED = 1400  # images the networks saw; the others are for comparisons

EXACT: Mapping[str, Any] = {"power_of_two": True, "per_channel": False}
"""Settings whose arithmetic is exact in fixed point."""

MIXED = (Bits(8, 8), Bits(4, 4), Bits(3, 6), Bits(2, 5))


@cache
def digit_images() -> Tensor:
    """All digits, shape (1797, 1, 8, 8), from 0 to 1."""
    return torch.from_numpy(load_digits().images).float()[:, None] / 16


def unseen(number: int) -> Tensor:
    """Digits no network was trained on."""
    return digit_images()[NUM_TRAINED : NUM_TRAINED + number]


def tiny() -> nn.Module:
    """Convolutions, both poolings and a linear layer, small enough for a C++ compiler."""
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 10))


def fitted(model: nn.Module, steps: int) -> nn.Module:
    """The model after some steps on the digits, in evaluation mode."""
    labels = torch.from_numpy(load_digits().target)
    optimiser = torch.optim.Adam(model.train().parameters(), 0.01)
    for _ in range(steps):
        rows = torch.randint(0, NUM_TRAINED, (64,))
        loss = nn.functional.cross_entropy(model(digit_images()[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@cache
def digits_vgg() -> nn.Module:
    """The zoo's digits network, trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fitted(build("digits_vgg", num_classes=10, in_channels=1), steps=80)


def quantised(
    model: nn.Module, images: Tensor, bits: tuple[Bits, ...], **settings: Any
) -> tuple[fx.GraphModule, Plan]:
    """The Brevitas network and the plan that gives the layers some bits in turn."""
    skeleton = Skeleton(model)
    tables = QuantTables(skeleton, Calibration(skeleton, [images], QuantSettings(**settings)))
    plan = Plan(bits={layer: bits[i % len(bits)] for i, layer in enumerate(skeleton.layers)})
    return quantize(tables, plan).eval(), plan
