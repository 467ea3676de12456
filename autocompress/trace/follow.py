"""Following channels through one run of a network.

Every tensor carries, for each of its axes, the units of its channels. Layers and per-channel modules are
followed as a whole; whatever happens between them is seen operation by operation, as PyTorch dispatches it.
So nothing is guessed from names of modules, and an operation without a rule is named, not passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from autocompress.trace.axes import Axes
from autocompress.trace.layers import (
    LAYERS,
    PER_CHANNEL,
    every_module_called,
    is_computed,
    num_channels,
    spatial_axes,
    tensors_in,
)
from autocompress.trace.operations import Operation, opaque
from autocompress.trace.rules import arguments, name_of, rule_for
from autocompress.trace.units import Labels, Units


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a network run and writes down which units its channels are.

    Args:
        model: in evaluation mode.
        units: takes the statements.
        split_inside: see :class:`~autocompress.trace.axes.Context`.
    """

    def __init__(self, model: nn.Module, units: Units, *, split_inside: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.splits: list[str] = []
        self._model, self._units, self._split_inside = model, units, split_inside
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(tensor): name for name, tensor in tensors}
        self._axes: Any = WeakTensorKeyDictionary()
        self._modules: list[str] = []
        self._in_leaf = 0

    @property
    def place(self) -> str:
        """The module that runs, in words."""
        return self._where("").removeprefix(" ")

    def run(self, example: Tensor) -> None:
        """Follow one run of the network.

        Raises:
            Exception: whatever the network raises.
        """
        self._modules.clear()
        self._in_leaf = 0
        with torch.inference_mode(), every_module_called(), self._hooks(), self:
            output = self._model(example)
        for tensor in tensors_in(output):
            for axis in self._axes_of(tensor):
                self._units.lock(axis, "its channels are the network's output")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, then follow the channels of its operands through it."""
        kwargs = kwargs or {}
        if self._in_leaf or not any(self._is_followed(t) for t in tensors_in([args, kwargs])):
            return func(*args, **kwargs)
        rule = rule_for(func)
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        # Operations that change a tensor in place must be described as it was before.
        before = {id(t): self._axes_of(t) for t in tensors_in([args, kwargs])}
        out = func(*args, **kwargs)
        operation = Operation(
            self._units,
            self._where(name_of(func)),
            self._split_inside,
            self.splits,
            name=name_of(func),
            args=arguments(func, args, kwargs),
            out=out,
            axes_of=lambda tensor: before[id(tensor)],
            names=tuple(self._names[i] for i in before if i in self._names),
        )
        found = (rule or opaque)(operation)
        for tensor, axes in zip(tensors_in(out), found if isinstance(found, list) else [found], strict=True):
            self._axes[tensor] = axes
        return out

    def _is_followed(self, tensor: Tensor) -> bool:
        return id(tensor) in self._names or tensor in self._axes

    def _axes_of(self, tensor: Tensor) -> Axes:
        """The axes of a tensor; a parameter or buffer has units of its own until it meets channels."""
        if tensor not in self._axes:
            name = self._names.get(id(tensor))
            if name is None:
                return (None,) * tensor.dim()
            self._axes[tensor] = tuple(
                self._units.made_at((name, i), size) if size > 1 else None
                for i, size in enumerate(tensor.shape)
            )
        axes: Axes = self._axes[tensor]
        return axes

    def _where(self, operation: str) -> str:
        """The operation and the innermost module it ran in, as a reason begins."""
        name = self._modules[-1] if self._modules else ""
        kind = type(self._model.get_submodule(name)).__name__
        return (
            f"{operation} in {name!r} ({kind})" if name else f"{operation} in the network's forward ({kind})"
        )

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                for handle in self._hooked(name, module):
                    stack.callback(handle.remove)
            yield

    def _hooked(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        leaf = isinstance(module, (*LAYERS, *PER_CHANNEL))

        def enter(module: nn.Module, args: Any) -> None:
            self._modules.append(name)
            self._in_leaf += leaf

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._in_leaf -= leaf
            if leaf and not self._in_leaf:
                (source,) = tensors_in([args, kwargs])[:1]
                self._pass_leaf(name, module, source, output)
            self._modules.pop()

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def _pass_leaf(self, name: str, module: nn.Module, source: Tensor, output: Tensor) -> None:
        axes = list(self._axes_of(source))
        channel = len(axes) - 1 - spatial_axes(module, len(axes))
        layer = isinstance(module, LAYERS)
        label = f"{name!r} ({type(module).__name__})"
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            self._axes[output] = tuple(axes)
            return
        for i, axis in enumerate(axes):
            if i != channel:
                self._units.lock(axis, f"{label} takes these channels for positions")
                axes[i] = None
        size = num_channels(module, "in" if layer else "out")
        reason = f"{label} also reads channels that never go"
        self._units.read_at((name, "in" if layer else "out"), axes[channel], size, reason)
        if layer:
            axes[channel] = self._made_by(name, module, axes[channel])
            if is_computed(module):
                reason = f"the weight of {label} is computed from others; remove the parametrisation or mask"
                self._units.lock(axes[channel], reason)
                self._units.lock(self._units.places[name, "in"], reason)
        self._axes[output] = tuple(axes)

    def _made_by(self, name: str, module: nn.Module, inputs: Labels | None) -> Labels:
        """Units of a layer's output; all channels of one convolution group are one unit."""
        made = self._units.made_at((name, "out"), num_channels(module, "out"))
        count = int(getattr(module, "groups", 1))
        if count > 1:
            tied = made.reshape(count, -1)
            self._units.join(tied[:, :1], tied, "")
            reason = f"the groups of {name!r} read channels that never go"
            read = np.full(num_channels(module, "in"), -1) if inputs is None else inputs
            self._units.join(tied[:, :1], read.reshape(count, -1), reason)
        return made
