"""Where a template is in a search patch: correlation of features, and how good the answers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.core.errors import DataError, RecipeError
from autocompress.nas.spaces import Space
from autocompress.nas.tracking.sequences import STRIDE, MatchingData, Pairs
from autocompress.training import Data, batches
from autocompress.training.evaluate import kept_modes

_SHARPNESS = 20.0
_EPS = 1e-6


def correlation(template: Tensor, search: Tensor) -> Tensor:
    """Cosine of the angle between a template and every window of a search patch's features.

    1 where a window is a positive multiple of the template, smaller everywhere else (Cauchy and Schwarz). A
    window or a template of zeros gives 0.

    Args:
        template: (N, C, t, t).
        search: (N, C, h, w).

    Returns:
        (N, h - t + 1, w - t + 1), in [-1, 1].
    """
    size = template.shape[-1]
    height = search.shape[2] - size + 1
    windows = F.unfold(search, size)
    kernel = template.flatten(1)
    products = torch.bmm(kernel.unsqueeze(1), windows).squeeze(1)
    lengths = windows.norm(dim=1) * kernel.norm(dim=1, keepdim=True)
    cosines: Tensor = products / lengths.clamp(min=_EPS)
    return cosines.reshape(len(search), height, -1)


@dataclass(frozen=True, slots=True)
class Matching:
    """The task: at which position of the correlation map does the target begin?

    The network sees one frame at a time and gives a feature map of half the size; the template is the middle
    of the first frame's. Template and patch run as one batch, so that BatchNorm treats them alike. Its
    answer is the softmax over the map's positions, row by row, and its loss their cross-entropy, as in
    Bertinetto et al., arXiv 1606.09549, with one right position in place of a disc of them.

    Args:
        template: height and width of the target in the feature map.
        sharpness: factor on the cosines: the largest difference of logits is twice that.

    Raises:
        RecipeError: values out of range, all at once.
    """

    template: int
    sharpness: float = _SHARPNESS

    def __post_init__(self) -> None:
        faults = [] if self.template >= 1 else [f"template must be >= 1, got {self.template}"]
        if not 0 < self.sharpness < float("inf"):
            faults.append(f"sharpness must be > 0 and finite, got {self.sharpness}")
        if faults:
            raise RecipeError(faults)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """Pairs (N, 2, H, W) to logits (N, positions); see :class:`~autocompress.nas.supernet.Task`."""
        maps: Tensor = network(x.reshape(-1, 1, *x.shape[2:]))
        first, second = maps[0::2], maps[1::2]
        start = (first.shape[-1] - self.template) // 2
        middle = slice(start, start + self.template)
        return self.sharpness * correlation(first[:, :, middle, middle], second).flatten(1)

    def faults(self, space: Space, data: Data) -> list[str]:
        """See :class:`~autocompress.nas.supernet.Task`."""
        frame, side = (1, *data.input_shape[1:]), data.input_shape[-1] // STRIDE
        faults = []
        if data.input_shape[0] != 2:
            faults.append(f"samples of {data.name!r} must be pairs (2, side, side), got {data.input_shape}")
        if frame != space.input_shape:
            faults.append(f"frames of {data.name!r} are {frame}, the space is for {space.input_shape}")
        if data.num_classes != (side - self.template + 1) ** 2:
            faults.append(
                f"a template of {self.template} has {max(0, side - self.template + 1) ** 2} positions in "
                f"{side}x{side} features, {data.name!r} has {data.num_classes}"
            )
        return faults


def matching_of(data: MatchingData) -> Matching:
    """The task for some sequences."""
    return Matching(data.sprite_side // STRIDE)


class Tracker(nn.Module):
    """A network with its correlation: a classifier of positions, to train and to evaluate as such.

    Args:
        network: maps frames (N, 1, H, W) to features of half the size.
        matching: the task.
    """

    def __init__(self, network: nn.Module, matching: Matching) -> None:
        super().__init__()
        self.network, self.matching = network, matching

    def forward(self, x: Tensor) -> Tensor:
        """Pairs (N, 2, H, W) to logits (N, positions)."""
        return self.matching.logits(self.network, x)


@dataclass(frozen=True, slots=True)
class Localisation:
    """How well targets are found.

    Args:
        within_one: share of frames whose peak is at most one position off along both axes, in [0, 1].
        exact: share of frames whose peak is at the position, in [0, 1].
        mean_iou: mean overlap of the found and the true box, in [0, 1].
        centre_error: mean distance of their centres in pixels.
    """

    within_one: float
    exact: float
    mean_iou: float
    centre_error: float


def localise(tracker: Tracker, pairs: Pairs, *, sprite_side: int, batch_size: int = 500) -> Localisation:
    """Find every target of a split, in evaluation mode.

    A position stands for ``STRIDE`` pixels; the box is put at their middle.

    Args:
        tracker: left as it was.
        pairs: the split.
        sprite_side: height and width of the target in pixels.
        batch_size: pairs per forward pass.

    Raises:
        DataError: the split is empty.
    """
    if len(pairs.images) == 0:
        raise DataError("cannot track through an empty split")
    found = list[Tensor]()
    with kept_modes(tracker), torch.inference_mode():
        tracker.eval()
        for x, _ in batches(pairs.images, batch_size):
            found.append(tracker(x).argmax(1))
    return score(torch.cat(found), pairs, sprite_side=sprite_side)


def score(found: Tensor, pairs: Pairs, *, sprite_side: int) -> Localisation:
    """Figures of some answers.

    Args:
        found: (N,), the number of the peak's position of every pair.
        pairs: the split.
        sprite_side: height and width of the target in pixels.
    """
    width = (pairs.images.pixels.shape[-1] - sprite_side) // STRIDE + 1
    corner = torch.stack([found // width, found % width], 1)
    positions = (corner - pairs.offsets // STRIDE).abs().amax(1)
    error = (STRIDE * corner + (STRIDE - 1) / 2 - pairs.offsets).abs().double()
    common = (sprite_side - error).clamp(min=0).prod(1)
    return Localisation(
        within_one=float((positions <= 1).double().mean()),
        exact=float((positions == 0).double().mean()),
        mean_iou=float((common / (2 * sprite_side**2 - common)).mean()),
        centre_error=float(error.square().sum(1).sqrt().mean()),
    )
