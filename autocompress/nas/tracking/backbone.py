"""The part of a tracker that is not searched: two stages of convolutions, trained once and frozen."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.nas.spaces.sketch import Signal, Sketch
from autocompress.nas.spaces.space import seeded
from autocompress.training import Data, TrainSettings, fit, weights_digest
from autocompress.zoo.chains import initialise

WIDTHS = (8, 16)
_TRAINING = TrainSettings(epochs=12, batch_size=64, lr=0.05, weight_decay=1e-3)


Features = tuple[Tensor, Tensor | None]
"""The finer and the coarser one, the latter only where it is read."""


class Backbone(nn.Module):
    """Two stages of two 3x3 convolutions; the second halves the size. No BatchNorm, nothing to update.

    Args:
        widths: channels of the two stages.

    Attributes:
        fine, coarse: the stages; a network that does not read the second goes without it.
    """

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.fine = nn.Sequential(*_convs(1, widths[0], 1))
        self.coarse: nn.Sequential | None = nn.Sequential(*_convs(widths[0], widths[1], 2))
        initialise(self)

    def forward(self, x: Tensor) -> Features:
        """Grey frames (N, 1, H, W) to features (N, widths[0], H, W) and (N, widths[1], H / 2, W / 2)."""
        fine = self.fine(x)
        return fine, None if self.coarse is None else self.coarse(fine)


class _Classifier(nn.Module):
    """A backbone with a linear layer on the middle of its features, where the sprite is."""

    def __init__(self, backbone: Backbone, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        coarse: Tensor = self.backbone(x)[1]
        border = coarse.shape[2] // 4
        middle = coarse[:, :, border : coarse.shape[2] - border, border : coarse.shape[3] - border]
        out: Tensor = self.classifier(torch.flatten(self.pool(middle), 1))
        return out


@dataclass(frozen=True, eq=False, repr=False)
class FrozenBackbone:
    """Weights that every network of a space begins with.

    Args:
        network: the trained stages; never changed.
        widths: channels of the two stages.
        accuracy: share of the search split's sprites classified rightly after training, in [0, 1].
    """

    network: Backbone
    widths: tuple[int, int]
    accuracy: float

    def __repr__(self) -> str:
        return f"FrozenBackbone({self.widths}, {weights_digest(self.network)[:16]})"

    def copy(self, *, coarse: bool = True) -> Backbone:
        """The stages again, their weights taking no gradient.

        Args:
            coarse: whether the second is needed.
        """
        network = copy.deepcopy(self.network).requires_grad_(False)
        network.coarse = network.coarse if coarse else None
        return network

    def sketch(self, sketch: Sketch, path: str, *, coarse: bool = True) -> list[Signal]:
        """The features of :meth:`copy`, as layers of a graph."""
        x, found = sketch.input, list[Signal]()
        for stage, width, stride in (("fine", self.widths[0], 1), ("coarse", self.widths[1], 2))[
            : 1 + coarse
        ]:
            x = sketch.conv(f"{path}.{stage}.0", x, width, kernel=3, stride=stride, bias=True)
            x = sketch.conv(f"{path}.{stage}.2", x, width, kernel=3, bias=True)
            found.append(x)
        return found


def train_backbone(
    centred: Data, *, seed: int, widths: tuple[int, int] = WIDTHS, settings: TrainSettings = _TRAINING
) -> FrozenBackbone:
    """Train the stages to tell the classes of sprites; deterministic.

    Args:
        centred: sprites at the middle of patches, (1, side, side), with their classes.
        seed: of the weights and of the order.
        widths: channels of the two stages.
        settings: of the training.

    Raises:
        DivergenceError: the loss is not finite.
    """

    def build() -> nn.Module:
        return _Classifier(Backbone(widths), widths[1], centred.num_classes)

    model = seeded(build, seed)
    reports = fit(model, centred, settings, seed=seed)
    network = model.backbone
    assert isinstance(network, Backbone)
    return FrozenBackbone(network.eval(), widths, reports[-1].search_accuracy if reports else 0.0)


def _convs(in_channels: int, width: int, stride: int) -> list[nn.Module]:
    first = nn.Conv2d(in_channels, width, 3, stride, 1)
    return [first, nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
