"""A network whose weights are shared by every kernel, depth and width of a joint space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.core import Plan
from autocompress.nas.joint import JointSpace
from autocompress.nas.spaces import Place
from autocompress.nas.spaces.mbconv import SKIP
from autocompress.nas.spaces.operations import inverted_residual
from autocompress.nas.spaces.space import seeded

_DEPTHWISE, _PROJECT = "3", "6"  # names of a block's layers, as in MBConv


@dataclass(frozen=True, slots=True)
class Path:
    """What a block does in the present pass.

    Args:
        kernel: of its depthwise convolution; None to skip the block.
        hidden: its first channels that are used.
    """

    kernel: int | None
    hidden: int


class ElasticNorm(nn.BatchNorm2d):
    """BatchNorm of the first channels of as many as its input has.

    In evaluation it needs running statistics of the present path: recalibrate them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), C at most ``num_features``, to the same shape."""
        n, momentum = x.shape[1], self.momentum
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average, as nn.BatchNorm2d has it
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean[:n], self.running_var[:n]
        weight, bias = self.weight[:n], self.bias[:n]
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum or 0.0, self.eps)


class ElasticBlock(nn.Sequential):
    """An inverted residual of any kernel and hidden width up to the largest, or nothing.

    Narrower blocks use the first channels (Yu et al., arXiv 1812.08928). Smaller kernels are the centre of
    the next larger one through a linear map that all channels share (Cai et al., arXiv 1908.09791, section
    3.3); the maps start as the identity.

    Args:
        place: where it runs.
        kernels: odd, ascending.
        hidden: the largest width.
        paths: decision -> path of the present pass; shared by all blocks.
    """

    def __init__(self, place: Place, kernels: tuple[int, ...], hidden: int, paths: dict[str, Path]) -> None:
        layers = inverted_residual(place, kernels[-1], hidden)
        super().__init__(*(_elastic(layer) for layer in layers))
        self.place, self._kernels, self._paths = place, kernels, paths
        # Differences to the identity, so that weight decay pulls towards plain crops.
        self.maps = nn.ParameterDict({str(k): nn.Parameter(torch.zeros(k * k, k * k)) for k in kernels[:-1]})

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / stride, W / stride); zeros where the block is skipped."""
        path = self._paths[self.place.decision]
        if path.kernel is None:
            return torch.zeros_like(x)
        for name, layer in self._modules.items():
            if isinstance(layer, nn.Conv2d):
                weight = self.weight_of(name, path)
                depthwise = name == _DEPTHWISE
                stride, groups = (layer.stride, path.hidden) if depthwise else (1, 1)
                x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
            elif layer is not self.maps and layer is not None:
                x = layer(x)
        return x

    def weight_of(self, name: str, path: Path) -> Tensor:
        """The weights that one of its convolutions has on a path, differentiable."""
        weight = self.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if name == _PROJECT:
            return weight[:, : path.hidden]
        weight = weight[: path.hidden]
        if name == _DEPTHWISE:
            for larger, kernel in pairwise(reversed(self._kernels)):
                if kernel < (path.kernel or 0):
                    break
                edge = (larger - kernel) // 2
                centre = weight[:, :, edge : edge + kernel, edge : edge + kernel].flatten(1)
                weight = (centre + centre @ self.maps[str(kernel)]).reshape(-1, 1, kernel, kernel)
        return weight


class ElasticSupernet(nn.Module):
    """Every architecture and width of a joint space in the weights of its largest member.

    Its tensors have the names and shapes of the largest member's, beside the maps between kernels; on the
    path of the largest member it computes what that member does, to the last bit. :meth:`use` chooses the
    path. Its BatchNorm keeps running statistics of no particular path: recalibrate them for the one at hand
    (:func:`~autocompress.training.recalibrate_batchnorm`), as for a member.

    Cai et al., "Once-for-All", arXiv 1908.09791, for the weights; how they are trained is
    :func:`~autocompress.nas.fit_elastic`'s affair.

    Args:
        joint: the space.
        seed: of the weights.
    """

    def __init__(self, joint: JointSpace, *, seed: int) -> None:
        super().__init__()
        self.joint = joint
        self._paths: dict[str, Path] = {}
        widths = {block.name: block.widths[-1] for block in joint.blocks}

        def make(place: Place) -> nn.Module:
            return ElasticBlock(place, joint.space.kernels, widths[place.decision], self._paths)

        self.network = seeded(lambda: joint.space.assemble(make), seed)
        self.use(joint.largest)

    def use(self, plan: Plan) -> None:
        """Take the path of a plan's architecture and channels from now on; its bits do not matter.

        Raises:
            RecipeError: the plan's architecture is not a member.
            ValueError: the plan names channels that no block of its member has, or a number out of range.
        """
        self._paths.update(self.paths_of(plan))

    def paths_of(self, plan: Plan) -> dict[str, Path]:
        """Decision -> path; raises as :meth:`use`."""
        self.joint.space.check(plan.arch)
        channels = dict(self.joint.effective(plan).channels)
        found = {}
        for block in self.joint.blocks:
            hidden, choice = channels.pop(block.group, block.widths[-1]), plan.arch[block.name]
            if not 1 <= hidden <= block.widths[-1]:
                raise ValueError(
                    f"group {block.group!r} keeps from 1 to {block.widths[-1]} channels, got {hidden}"
                )
            found[block.name] = Path(None if choice == SKIP else self._kernel(choice), hidden)
        if channels:
            raise ValueError(f"no block has the channels {sorted(channels)}")
        return found

    def _kernel(self, choice: str) -> int:
        return int(getattr(self.joint.space.operations[choice], "kernel"))  # noqa: B009

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, C, H, W) on the present path."""
        out: Tensor = self.network(x)
        return out

    def member(self, plan: Plan) -> nn.Module:
        """The plain network of a plan's architecture and channels, with this supernet's weights.

        As :meth:`JointSpace.build`, but trained. Its BatchNorm statistics are the supernet's: recalibrate
        them before evaluating; then its outputs are those of the supernet's path with its statistics
        recalibrated on the same images.

        Raises:
            RecipeError, ValueError: as :meth:`use`.
        """
        sources = self._tensors(self.paths_of(plan))
        network = self.joint.build(Plan(plan.arch, plan.channels), seed=0)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                source = sources[name]
                tensor.copy_(source[tuple(slice(size) for size in tensor.shape)])
        return network

    def _tensors(self, paths: Mapping[str, Path]) -> dict[str, Tensor]:
        """The network's tensors, with the depthwise weights of some paths."""
        found = dict(self.network.state_dict())
        for module in self.network.modules():
            if isinstance(module, ElasticBlock) and paths[module.place.decision].kernel is not None:
                weight = module.weight_of(_DEPTHWISE, paths[module.place.decision])
                found[f"{module.place.path}.{_DEPTHWISE}.weight"] = weight
        return found


def _elastic(layer: nn.Module) -> nn.Module:
    return ElasticNorm(layer.num_features) if isinstance(layer, nn.BatchNorm2d) else layer
