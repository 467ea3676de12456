"""Residual networks for 32x32 images, with the layer names of the public CIFAR-10 checkpoints."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.zoo.chains import conv_bn, initialise

Shortcut = Literal["pad", "conv", "none"]


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels on both sides: the shortcut without parameters.

    He et al., arXiv 1512.03385, section 4.2, option A. Differs from the paper, which does not say where the
    zero channels go, in putting half of them before and half after, as the public checkpoints do.

    Args:
        pad: number of zero channels on each side.
    """

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + 2 * pad, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, with or without a shortcut around them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution.
        shortcut: what stands in for the input where the shapes differ; ``none`` adds nothing at all.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, stride=stride)
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels)
        self.adds = shortcut != "none"
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 and shortcut == "pad":
            self.downsample = PadShortcut((out_channels - in_channels) // 2)
        elif stride != 1 and shortcut == "conv":
            self.downsample = nn.Sequential(*conv_bn(in_channels, out_channels, kernel=1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x) if self.adds else out)


def _stage(in_channels: int, out_channels: int, *, num_blocks: int, shortcut: Shortcut) -> nn.Sequential:
    stride = out_channels // in_channels  # the size halves where the width doubles
    first = BasicBlock(in_channels, out_channels, stride=stride, shortcut=shortcut)
    rest = [
        BasicBlock(out_channels, out_channels, stride=1, shortcut=shortcut) for _ in range(num_blocks - 1)
    ]
    return nn.Sequential(first, *rest)


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels: depth 6 n + 2 with n blocks a stage.

    He et al., arXiv 1512.03385, section 4.2.

    Args:
        depth: number of weighted layers, 6 n + 2.
        shortcut: see :class:`BasicBlock`.
        num_classes: number of outputs.
        in_channels: channels of the images.
        head: name of the linear layer; the public checkpoints differ in it.
    """

    def __init__(
        self,
        depth: int,
        *,
        shortcut: Shortcut,
        num_classes: int,
        in_channels: int,
        head: Literal["linear", "fc"] = "linear",
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, 16)
        num_blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, num_blocks=num_blocks, shortcut=shortcut)
        self.layer2 = _stage(16, 32, num_blocks=num_blocks, shortcut=shortcut)
        self.layer3 = _stage(32, 64, num_blocks=num_blocks, shortcut=shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.add_module(head, nn.Linear(64, num_classes))
        self.head = head
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, num_classes) for images of shape (N, C, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = getattr(self, self.head)(torch.flatten(self.pool(x), 1))
        return out
