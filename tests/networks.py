"""Small networks that hold every kind of channel coupling; for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class TinyVGG(nn.Module):
    """A chain that ends in a flatten over 2x2 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 24), nn.MaxPool2d(4))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24 * 2 * 2, 20), nn.ReLU(), nn.Linear(20, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class TinyResNet(nn.Module):
    """Two residual blocks, one with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.a = nn.Sequential(conv_bn(16, 16), nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.b = nn.Sequential(conv_bn(16, 32, stride=2), nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32))
        self.shortcut = nn.Conv2d(16, 32, 1, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.a(x))
        x = torch.relu(self.shortcut(x) + self.b(x))
        return self.head(x.mean((2, 3)))


class TinyMobileNet(nn.Module):
    """Inverted residuals: expansion, depthwise, projection, with a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first = self._block(16, 16, 1)
        self.second = self._block(16, 24, 2)
        self.head = nn.Linear(24, 10)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        wide = 3 * inputs
        project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(conv_bn(inputs, wide, 1), conv_bn(wide, wide, 3, stride, groups=wide), project)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(self.second(x).mean((2, 3)))


class TinyDenseNet(nn.Module):
    """Every layer reads the concatenation of all before it; BatchNorm comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1)) for c in (16, 24, 32)
        )
        self.head = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classifier = nn.Linear(40 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.classifier(self.head(x))


class TinyInception(nn.Module):
    """Parallel branches, concatenated, added to a projection, then grouped and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.one = conv_bn(16, 8, 1)
        self.three = nn.Sequential(conv_bn(16, 8, 1), conv_bn(8, 16))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(16, 8, 1))
        self.side = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1, groups=8), nn.BatchNorm2d(32), nn.PReLU(32))
        self.up = nn.ConvTranspose2d(32, 12, 2, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.pool(x)], 1) + self.side(x)
        return self.head(torch.relu(self.up(self.grouped(x))).mean((2, 3)))


class TinyPadded(nn.Module):
    """A parameter-free shortcut: every second position, channels padded with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv_bn(3, 16), conv_bn(16, 32, stride=2), conv_bn(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.first(x) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return self.head((x + self.second(x)).mean((2, 3)).view(x.shape[0], -1))


NETWORKS = (TinyVGG, TinyResNet, TinyMobileNet, TinyDenseNet, TinyInception)


def seeded(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """An instance with generic weights and BatchNorm statistics, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


class _Scaled(nn.Module):
    """All channels are scaled by their common spread, so no width can change."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(1, 8, 3), nn.GroupNorm(1, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale(self.conv(x)).mean((2, 3)))


def scaled(*, num_classes: int) -> nn.Module:
    """Factory of an own network in which nothing can be pruned."""
    return _Scaled(num_classes)
