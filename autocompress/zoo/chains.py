"""Networks without long shortcuts (VGG, MobileNetV1) and MobileNetV2, in forms for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def initialise(model: nn.Module) -> None:
    """He initialisation of every convolution, from the global generator (He et al. 2015, section 2.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Classifier(nn.Module):
    """Features, global average pooling and one linear layer.

    Args:
        features: maps (N, C, H, W) to (N, width, h, w).
        width: number of channels the features end with.
        num_classes: number of outputs.
    """

    def __init__(self, features: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, num_classes) for images of shape (N, C, H, W)."""
        out: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return out


def conv_bn(
    in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the spatial size at stride 1, without bias, and its BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def vgg(config: Sequence[int | str], *, num_classes: int, in_channels: int) -> nn.Module:
    """A VGG with BatchNorm and a single linear layer.

    Simonyan and Zisserman, arXiv 1409.1556, table 1. Differs from the paper in BatchNorm after every
    convolution and in one linear layer in place of three, as is usual for 32x32 images.

    Args:
        config: output channels of each 3x3 convolution, and ``"M"`` for 2x2 max pooling.
        num_classes: number of outputs.
        in_channels: channels of the images.
    """
    layers: list[nn.Module] = []
    width = in_channels
    for item in config:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [*conv_bn(width, item), nn.ReLU(inplace=True)]
            width = item
    return Classifier(nn.Sequential(*layers), width, num_classes)


def cnv(*, num_classes: int, in_channels: int) -> nn.Module:
    """CNV, the VGG-like network of FINN's examples, for 32x32 images.

    Six 3x3 convolutions without padding and three linear layers; no global pooling, which streaming pipelines
    on FPGAs do not have.

    Umuroglu et al., FINN, arXiv 1612.07119, section 4.1. Differs from the paper in full-precision layers with
    ReLU: bits come from a plan.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
    """
    layers: list[nn.Module] = []
    width = in_channels
    for index, out in enumerate((64, 64, 128, 128, 256, 256)):
        layers += [nn.Conv2d(width, out, 3, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if index in (1, 3) else []
        width = out
    head: list[nn.Module] = [nn.Flatten()]
    for out in (512, 512):
        head += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        width = out
    head.append(nn.Linear(width, num_classes))
    model = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), classifier=nn.Sequential(*head)))
    initialise(model)
    return model


def mobilenet_v1(
    blocks: Sequence[tuple[int, int]], *, stem: int, num_classes: int, in_channels: int
) -> nn.Module:
    """A MobileNet of depthwise separable convolutions.

    Howard et al., arXiv 1704.04861, table 1. Differs from the paper in the stem's stride of 1 in place
    of 2, for small images.

    Args:
        blocks: (output channels, stride) of each depthwise separable block.
        stem: channels of the first convolution.
        num_classes: number of outputs.
        in_channels: channels of the images.
    """
    layers: list[nn.Module] = [*conv_bn(in_channels, stem), nn.ReLU(inplace=True)]
    width = stem
    for out, stride in blocks:
        layers += [*conv_bn(width, width, stride=stride, groups=width), nn.ReLU(inplace=True)]
        layers += [*conv_bn(width, out, kernel=1), nn.ReLU(inplace=True)]
        width = out
    return Classifier(nn.Sequential(*layers), width, num_classes)


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; the input is added when the shapes agree.

    Sandler et al., arXiv 1801.04381, table 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expand: int) -> None:
        super().__init__()
        hidden = in_channels * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [*conv_bn(in_channels, hidden, kernel=1), nn.ReLU6(inplace=True)]
        layers += [*conv_bn(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6(inplace=True)]
        layers += conv_bn(hidden, out_channels, kernel=1)
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


# expansion, output channels, number of blocks, stride of the first block: Sandler et al., table 2, with the
# strides of the stem (2) and of the second stage (2) set to 1 for 32x32 images.
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(*, num_classes: int, in_channels: int) -> nn.Module:
    """MobileNetV2 for 32x32 images.

    Sandler et al., arXiv 1801.04381, table 2. Differs from the paper in two strides set to 1 and in no
    dropout before the linear layer.

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
    """
    width, last = 32, 1280
    layers: list[nn.Module] = [*conv_bn(in_channels, width), nn.ReLU6(inplace=True)]
    for expand, out, num_blocks, first_stride in _V2_STAGES:
        for index in range(num_blocks):
            stride = first_stride if index == 0 else 1
            layers.append(InvertedResidual(width, out, stride=stride, expand=expand))
            width = out
    layers += [*conv_bn(width, last, kernel=1), nn.ReLU6(inplace=True)]
    return Classifier(nn.Sequential(*layers), last, num_classes)
