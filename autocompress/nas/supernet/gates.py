"""What a decision does in one pass through a supernet: which operations run, and how they count.

A gate is a tensor of one number per operation, and a rule for what is computed from it. All gradients reach
the architecture parameters through the gate's values by ordinary differentiation:

- :class:`OnePath` runs one operation and has no gradient.
- :class:`Mixture` runs all and adds them up by their values.
- :class:`SampledPath` runs one and multiplies it by its value, 1 (GDAS).
- :class:`BinaryPath` runs one, keeps only that one for the backward pass, and there runs the others, one at
  a time, for the gradient of their values (ProxylessNAS). Memory of one path, gradient of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Operations = Sequence[nn.Module]


class Gate(Protocol):
    """Applies the operations of one place."""

    def __call__(self, operations: Operations, x: Tensor) -> Tensor:
        """(N, C, H, W) to the place's output."""
        ...


@dataclass(frozen=True, eq=False)
class OnePath:
    """Runs the operation of that number."""

    index: int

    def __call__(self, operations: Operations, x: Tensor) -> Tensor:
        """See :class:`Gate`."""
        out: Tensor = operations[self.index](x)
        return out


@dataclass(frozen=True, eq=False)
class Mixture:
    """The sum of operations, each times its value.

    Args:
        values: shape (operations,).
        live: numbers of the operations that run; all when absent.
    """

    values: Tensor
    live: tuple[int, ...] | None = None

    def __call__(self, operations: Operations, x: Tensor) -> Tensor:
        """See :class:`Gate`."""
        live = range(len(operations)) if self.live is None else self.live
        total: Tensor | None = None
        for index in live:
            term = self.values[index] * operations[index](x)
            total = term if total is None else total + term
        assert total is not None
        return total


@dataclass(frozen=True, eq=False)
class SampledPath:
    """The operation of one number, times its value.

    Args:
        values: shape (operations,), 1 at ``index`` and 0 elsewhere.
        index: of the operation that runs.
    """

    values: Tensor
    index: int

    def __call__(self, operations: Operations, x: Tensor) -> Tensor:
        """See :class:`Gate`."""
        out: Tensor = self.values[self.index] * operations[self.index](x)
        return out


@dataclass(frozen=True, eq=False)
class BinaryPath:
    """One operation runs; every candidate's value gets the gradient it would have in the sum of all.

    The weights of the operations get no gradient: it is a step of the architecture.

    Args:
        values: shape (operations,), 1 at ``index`` and 0 elsewhere.
        index: of the operation that runs.
        candidates: numbers of the operations whose values get a gradient.
    """

    values: Tensor
    index: int
    candidates: tuple[int, ...]

    def __call__(self, operations: Operations, x: Tensor) -> Tensor:
        """See :class:`Gate`."""
        out: Tensor = _OnePathOfMany.apply(x, self.values, self, operations)
        return out


class _OnePathOfMany(torch.autograd.Function):
    """``o_index(x)`` forward; backward ``d/d values[k] = <grad, o_k(x)>`` for every candidate.

    Cai, Zhu, Han, ProxylessNAS, arXiv 1812.00332, section 3.2, equation 4, and the released code's
    ``full_v2``. Differs from the released code where the path is the one without an operation: its zeros are
    an operation like the others, so the gradient is never missing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gate: BinaryPath, operations: Operations) -> Tensor:
        ctx.gate, ctx.operations = gate, operations
        ctx.num_values, ctx.values_device = len(values), values.device
        with torch.enable_grad():
            inner = x.detach().requires_grad_(True)
            out: Tensor = operations[gate.index](inner)
        ctx.inner, ctx.out = inner, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        grad = grads[0]
        at_values = grad.new_zeros(ctx.num_values)
        at_values[ctx.gate.index] = (ctx.out.detach() * grad).sum()
        (at_x,) = torch.autograd.grad(ctx.out, ctx.inner, grad, allow_unused=True)
        ctx.out = None
        with torch.no_grad():
            for index in ctx.gate.candidates:
                if index != ctx.gate.index:
                    at_values[index] = (ctx.operations[index](ctx.inner) * grad).sum()
        return at_x, at_values.to(ctx.values_device), None, None


def straight_through(probabilities: Tensor, index: int) -> Tensor:
    """One-hot in value, the probabilities' gradient: ``onehot - p.detach() + p``.

    Args:
        probabilities: shape (operations,).
        index: of the 1.
    """
    hot = F.one_hot(torch.tensor(index, device=probabilities.device), len(probabilities))
    return hot.to(probabilities.dtype) - probabilities.detach() + probabilities


def sample(probabilities: Tensor, generator: torch.Generator) -> int:
    """An index drawn by its probability."""
    return int(torch.multinomial(probabilities.detach().cpu(), 1, generator=generator))


def sample_pair(probabilities: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """Two different indices drawn without replacement, the lower first."""
    drawn = torch.multinomial(probabilities.detach().cpu(), 2, generator=generator)
    first, second = sorted(int(i) for i in drawn)
    return first, second


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, int]:
    """GDAS' sample: one-hot values with the gradient of the tempered softmax, and the index of the 1.

    Dong and Yang, arXiv 1910.04465, equations 4 to 6. The index is distributed by ``softmax(logits)`` at any
    temperature. Drawn again in the rare case that a value is not finite.

    Args:
        logits: shape (operations,).
        temperature: > 0.
        generator: on the CPU.
    """
    while True:
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform)).to(logits)
        soft = torch.softmax((torch.log_softmax(logits, 0) + noise) / temperature, 0)
        if bool(torch.isfinite(noise).all() and torch.isfinite(soft).all()):
            index = int(soft.argmax())
            return straight_through(soft, index), index
