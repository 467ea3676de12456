"""Networks between a frozen backbone and a matching head: a cell of chosen operations, or convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.nas.spaces.cells import Edges
from autocompress.nas.spaces.operations import CELL_OPERATIONS, Operation, Place
from autocompress.nas.spaces.sketch import Signal, Sketch
from autocompress.nas.tracking.backbone import Features


@dataclass(frozen=True, slots=True)
class SeparableFirst:
    """Depthwise and pointwise convolution, BatchNorm, LeakyReLU, ``repeats`` times.

    DARTS' operations in the order of CHASE's released code, which activates after the convolutions.
    """

    kernel: int
    dilation: int
    repeats: int

    def module(self, place: Place) -> nn.Module:
        """See :class:`~autocompress.nas.spaces.Operation`."""
        width, layers = place.in_channels, list[nn.Module]()
        pad = self.dilation * (self.kernel // 2)
        for _ in range(self.repeats):
            depthwise = nn.Conv2d(width, width, self.kernel, 1, pad, self.dilation, groups=width, bias=False)
            layers += [
                depthwise,
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(),
            ]
        return nn.Sequential(*layers)

    def sketch(self, sketch: Sketch, place: Place, x: Signal) -> Signal:
        """See :class:`~autocompress.nas.spaces.Operation`."""
        for first in range(0, 4 * self.repeats, 4):
            path = f"{place.path}.{first}"
            x = sketch.conv(path, x, x.channels, kernel=self.kernel, depthwise=True)
            x = sketch.conv(f"{place.path}.{first + 1}", x, x.channels)
            x = sketch.norm(f"{place.path}.{first + 2}", x)
        return x


OPERATIONS: dict[str, Operation] = {
    **{n: CELL_OPERATIONS[n] for n in ("none", "skip_connect", "avg_pool_3x3", "max_pool_3x3")},
    "dil_conv_3x3": SeparableFirst(3, 2, 1),
    "dil_conv_5x5": SeparableFirst(5, 2, 1),
    "sep_conv_3x3": SeparableFirst(3, 1, 2),
    "sep_conv_5x5": SeparableFirst(5, 1, 2),
}
"""DARTS' names; the first leaves an edge out."""


class Adapters(nn.ModuleDict):
    """The backbone's two features, brought to one width and size: a 3x3 convolution of stride 2 and a 1x1.

    Args:
        widths: channels of the features.
        channels: of what they become.
        used: 0 for the finer one, 1 for the coarser one.
    """

    def __init__(self, widths: tuple[int, int], channels: int, used: tuple[int, ...]) -> None:
        convs = {"fine": nn.Conv2d(widths[0], channels, 3, 2, 1), "coarse": nn.Conv2d(widths[1], channels, 1)}
        super().__init__({name: conv for i, (name, conv) in enumerate(convs.items()) if i in used})

    def forward(self, features: Features) -> dict[int, Tensor]:
        """The adapted features by number."""
        named = enumerate(zip(("fine", "coarse"), features, strict=True))
        return {number: self[name](x) for number, (name, x) in named if name in self}


class CellNeck(nn.Module):
    """Adapters and a cell; gives the cell's nodes side by side."""

    def __init__(self, adapters: Adapters, edges: Edges) -> None:
        super().__init__()
        self.adapters, self.edges = adapters, edges

    def forward(self, features: Features) -> Tensor:
        """The backbone's features to (N, nodes * channels, h, w)."""
        nodes = self.edges(self.adapters(features))
        return nodes[0] if len(nodes) == 1 else torch.cat(nodes, 1)


class ConvNeck(nn.Module):
    """Adapters and, on each feature, 3x3 convolutions with BatchNorm and LeakyReLU; side by side at the end.

    Args:
        adapters: of both features.
        channels: the adapters'.
        width: of the convolutions.
        depth: how many on each feature.
    """

    def __init__(self, adapters: Adapters, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.adapters = adapters
        self.branches = nn.ModuleList()
        for _ in range(2):
            layers = list[nn.Module]()
            for index in range(depth):
                conv = nn.Conv2d(width if index else channels, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.LeakyReLU()]
            self.branches.append(nn.Sequential(*layers))

    def forward(self, features: Features) -> Tensor:
        """The backbone's features to (N, 2 * width, h, w)."""
        states = self.adapters(features)
        return torch.cat([branch(states[number]) for number, branch in enumerate(self.branches)], 1)


class FrameNetwork(nn.Module):
    """What runs once per frame: backbone, neck, and the 1x1 convolution that the matching head begins with.

    Channels lie last in memory: depthwise convolutions of few channels take half the time on CPUs so.

    Args:
        backbone: frozen.
        neck: what is searched.
        width: channels that the neck gives.
        embedding: channels that are correlated.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, width: int, embedding: int) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.embed = nn.Conv2d(width, embedding, 1, bias=False)
        for module in (*neck.modules(), self.embed):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Grey frames (N, 1, H, W) to features (N, embedding, H / 2, W / 2)."""
        out: Tensor = self.embed(self.neck(self.backbone(x)))
        return out

    @property
    def num_trained(self) -> int:
        """Parameters outside the frozen backbone."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
