"""Proof that a plan of channels does what the graph says: shrunk equals masked, on random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.core.graph import ChannelGroup
from autocompress.trace.layers import PER_CHANNEL, tensors_in
from autocompress.trace.surgery import Kept, mask_in_place, shrink

if TYPE_CHECKING:
    from autocompress.trace.tracer import Trace

TOLERANCE = 1e-8
"""Largest difference in double precision, as a share of the largest output."""


class Check:
    """Compares the shrunk with the masked network, without some units of some groups.

    Args:
        model: a copy of the network that may be spoilt; it is converted to double precision and its weights
            are overwritten, as trained or zero-initialised weights would hide faults.
        traced: its trace.
    """

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self._model, self._traced = model.double(), traced
        self._parts = _parts(traced.graph.prunable)
        shape = traced.graph.input_shape
        self._example = torch.randn(2, *shape, generator=_generator(), dtype=torch.float64)

    def holds(self) -> bool:
        """Whether all groups can be pruned together."""
        return self._fault(self._parts) is None

    def faults(self) -> dict[str, str]:
        """Groups that cannot be pruned after all, and why; what remains holds when taken together."""
        faults: dict[str, str] = {}
        self._accept([], list(self._parts), faults)
        return faults

    def _accept(self, accepted: list[str], names: list[str], faults: dict[str, str]) -> list[str]:
        """The accepted groups with those of ``names`` that hold together with them; halves what does not."""
        if not names:
            return accepted
        fault = self._fault({name: self._parts[name] for name in (*accepted, *names)})
        if fault is None:
            return [*accepted, *names]
        if len(names) == 1:
            faults[names[0]] = fault
            return accepted
        middle = len(names) // 2
        return self._accept(self._accept(accepted, names[:middle], faults), names[middle:], faults)

    def _fault(self, kept: Kept) -> str | None:
        """None when shrunk = masked for this choice, else what went wrong."""
        _randomise(self._model)
        with torch.no_grad():
            try:
                small = tensors_in(shrink(self._model, self._traced, kept)(self._example))
            except Exception as fault:
                return f"the network does not run without some of these channels ({_short(fault)})"
            mask_in_place(self._model, self._traced, kept)
            reference = tensors_in(self._model(self._example))
        for a, b in zip(small, reference, strict=True):
            if a.shape != b.shape:
                return "its channels are part of the network's output"
            if not torch.isfinite(b).all():
                return "the check gave values that are not finite"
            if (a - b).abs().max() > TOLERANCE * max(1.0, float(b.abs().max())):
                return "its channels are re-ordered or mixed by an operation between its layers"
        return None


def _short(fault: Exception) -> str:
    return str(fault).splitlines()[0][:160] if str(fault) else type(fault).__name__


def _parts(groups: Sequence[ChannelGroup]) -> dict[str, np.typing.NDArray[np.int64]]:
    """Some units of every prunable group that has at least two.

    Groups of one size keep different numbers of units as long as there are any: code that takes the width of
    one for that of another must not get away with it.
    """
    rng = np.random.default_rng(0)
    counts: dict[int, Iterator[int]] = {}
    parts = {}
    for group in groups:
        if group.size > 1:
            left = counts.setdefault(group.size, cycle(rng.permutation(np.arange(1, group.size)).tolist()))
            parts[group.name] = np.sort(rng.choice(group.size, next(left), replace=False))
    return parts


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _randomise(model: nn.Module) -> None:
    """Overwrite all weights with generic ones, the same every time."""
    generator = _generator()

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.is_floating_point()):
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(normal(parameter) * ((1.6 / fan_in) ** 0.5 if parameter.dim() > 1 else 0.3))
        for module in model.modules():
            if isinstance(module, PER_CHANNEL) and not isinstance(module, nn.PReLU):
                for name in ("weight", "running_var"):
                    value = getattr(module, name, None)
                    if value is not None:
                        value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5)
