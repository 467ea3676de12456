"""What calibration images say about activations: their ranges, and the mean input of each layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autocompress.core.errors import DataError
from autocompress.quant.grids import Grid, asymmetric, symmetric
from autocompress.quant.ranges import RangeMethod, clip_thresholds
from autocompress.quant.skeleton import Skeleton

_KEPT = 1 << 16  # values per tensor that decide where it is clipped


@dataclass(frozen=True)
class QuantSettings:
    """How tensors are rounded; the plan says to how many bits.

    Args:
        weight_range, act_range: where weights and activations are clipped; see
            :func:`~autocompress.quant.ranges.clip_thresholds`.
        per_channel: one weight scale per output channel instead of one per layer.
        asymmetric: give activations that can be negative a zero point instead of a sign.
        power_of_two: scales are powers of two, as fixed-point tools such as hls4ml want them.
        bias_correction: shift each bias by the mean error that rounding the weights makes.
    """

    weight_range: RangeMethod = "mse"
    act_range: RangeMethod = "mse"
    per_channel: bool = True
    asymmetric: bool = False
    power_of_two: bool = False
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.asymmetric and self.power_of_two:
            raise ValueError("asymmetric activations and power_of_two scales exclude each other; choose one")


@dataclass(frozen=True)
class Activations:
    """What was seen of one tensor.

    Args:
        low, high: smallest and largest value.
        values: a sample of the values, shape (n,).
        channel_means: mean per channel (axis 1, or the last one of two-dimensional tensors), shape (C,).
    """

    low: float
    high: float
    values: Tensor
    channel_means: Tensor

    @property
    def signed(self) -> bool:
        """Whether any value was negative."""
        return self.low < 0


class Calibration:
    """Activation statistics of the unquantised network at every place that may be quantised.

    Args:
        skeleton: the network.
        batches: images, each (N, C, H, W); a few hundred in all.
        settings: how grids are chosen.

    Raises:
        DataError: no images, values that are not finite, or images that are all one constant.
    """

    def __init__(self, skeleton: Skeleton, batches: Iterable[Tensor], settings: QuantSettings) -> None:
        self.settings = settings
        watcher = _Watcher(skeleton)
        digest = hashlib.sha256()
        low, high = torch.inf, -torch.inf
        for images in batches:
            low, high = min(low, float(images.min())), max(high, float(images.max()))
            if not bool(torch.isfinite(images).all()):
                raise DataError("calibration images hold values that are not finite; remove or repair them")
            digest.update(images.cpu().contiguous().numpy().tobytes())
            watcher.watch(images)
        if low >= high:
            found = "there are none" if low > high else f"every value is {low:g}"
            raise DataError(f"calibration images must differ in their values, but {found}; give real images")
        self.digest = digest.hexdigest()[:16]
        self.activations = watcher.activations()
        self._grids: dict[tuple[str, int], Grid] = {}

    def grid(self, source: str, bits: int) -> Grid:
        """The grid of one tensor at some bits; the same object for the same question.

        Args:
            source: name of the node that makes the tensor.
            bits: from 1 up.
        """
        key = (source, bits)
        if key not in self._grids:
            self._grids[key] = self._grid(self.activations[source], bits)
        return self._grids[key]

    def _grid(self, seen: Activations, bits: int) -> Grid:
        settings, signed = self.settings, seen.signed
        method = settings.act_range
        if signed and settings.asymmetric and bits > 1:
            # Clipped on both sides by the share that the method clips a symmetric grid by.
            largest = max(-seen.low, seen.high)
            share = float(clip_thresholds(seen.values[None], bits, method, signed=True)) / largest
            low, high = (
                torch.tensor(max(-share * largest, seen.low)),
                torch.tensor(min(share * largest, seen.high)),
            )
            return asymmetric(low, high, bits)
        threshold = clip_thresholds(seen.values[None], bits, method, signed=signed)[0]
        return symmetric(threshold, bits, signed=signed, power_of_two=settings.power_of_two)


class _Watcher:
    """Runs batches through the float network and keeps what passes at its sources."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._wanted = set(skeleton.sources)
        self._interpreter = _Recorder(skeleton.graph_module, self._record)
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._values: dict[str, list[Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def watch(self, images: Tensor) -> None:
        with torch.inference_mode():
            self._interpreter.run(images)

    def _record(self, name: str, value: Any) -> None:
        if name not in self._wanted or not isinstance(value, Tensor):
            return
        value = value.float()
        low, high = float(value.min()), float(value.max())
        if not (low > -torch.inf and high < torch.inf):  # also false for NaN
            raise DataError(
                f"activations of {name!r} are not finite on the calibration images; the network has "
                "diverged, or the images are not scaled as in training"
            )
        self._low[name] = min(low, self._low.get(name, low))
        self._high[name] = max(high, self._high.get(name, high))
        flat = value.flatten()
        stride = max(1, len(flat) * 4 // _KEPT)
        # An odd stride does not fall into step with rows and channels.
        self._values.setdefault(name, []).append(flat[:: stride | 1].cpu().clone())
        axis = 1 if value.ndim > 2 else value.ndim - 1
        others = [a for a in range(value.ndim) if a != axis]
        self._sums[name] = self._sums.get(name, torch.zeros(())) + value.sum(dim=others).cpu()
        self._counts[name] = self._counts.get(name, 0) + value.numel() // value.shape[axis]

    def activations(self) -> dict[str, Activations]:
        result = {}
        for name, parts in self._values.items():
            values = torch.cat(parts)
            values = values[:: max(1, len(values) // _KEPT)]
            ends = torch.tensor([self._low[name], self._high[name]])
            result[name] = Activations(
                self._low[name],
                self._high[name],
                torch.cat([values, ends]),
                self._sums[name] / self._counts[name],
            )
        return result


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, record: Any) -> None:
        super().__init__(module)
        self._record = record

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._record(n.name, value)
        return value
