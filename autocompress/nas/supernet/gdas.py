"""GDAS: one sampled path, with the gradient of a tempered softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from autocompress.core.errors import RecipeError
from autocompress.nas.supernet.gates import BinaryPath, Gate, OnePath, SampledPath, gumbel_softmax
from autocompress.nas.supernet.network import Supernet
from autocompress.nas.supernet.step import Adam, Step, check_method, set_gradients

Gradient = Literal["path", "all"]

_ALPHA = Adam(3e-4, (0.5, 0.999), 1e-3)


@dataclass(frozen=True)
class GDAS:
    """Learns a distribution from one sampled member per step, at the cost of one path.

    Dong and Yang, arXiv 1910.04465, and its released code: one sample is shared by all cells of a kind, and
    steps of weights and of the architecture draw their own. Differs from the released code in that operations
    which do not run get no gradient of their own; there they get the sum of the output's gradient, which
    belongs to no operation.

    What the gradient knows decides what is found. Of 40 additive toys (6 decisions of 5 operations, 2,000
    steps, alpha lr 3e-3) a gradient with every operation's cost solves 39, one with the drawn operation's
    alone 30, one with the released code's constant for the others 20. ``gradient="all"`` is the first: in
    steps of the architecture the other operations run too, one at a time and not kept, as in ProxylessNAS.

    Args:
        hot, cold: temperatures at the start and at the end, linear in between.
        alpha: how logits are updated.
        every: weight steps per architecture step.
        gradient: whether the drawn operations alone get one (``path``, the paper), or ``all``.
        affine: whether BatchNorm scales and shifts inside operations.
        max_skips: see :class:`~autocompress.nas.supernet.DARTS`.
        skip_dropout: see :class:`~autocompress.nas.supernet.DARTS`.

    Raises:
        RecipeError: values out of range, all at once.
    """

    hot: float = 10.0
    cold: float = 0.1
    alpha: Adam = _ALPHA
    every: int = 1
    gradient: Gradient = "path"
    affine: bool = False
    max_skips: int | None = None
    skip_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_method("gdas", self.every, self.max_skips, self.skip_dropout)
        if not 0 < self.cold <= self.hot < float("inf"):
            raise RecipeError(f"gdas: temperatures must satisfy 0 < cold <= hot, got {self.cold}, {self.hot}")
        if self.gradient not in get_args(Gradient):
            raise RecipeError(
                f"gdas: gradient must be one of {', '.join(get_args(Gradient))}, got {self.gradient!r}"
            )

    def temperature(self, progress: float) -> float:
        """The temperature when that share of the search is done."""
        return self.hot + (self.cold - self.hot) * progress

    def weight_gates(self, supernet: Supernet, generator: torch.Generator, progress: float) -> None:
        """See :class:`~autocompress.nas.supernet.step.Method`."""
        with torch.no_grad():
            indices = {n: self._drawn(alpha, generator, progress)[1] for n, alpha in supernet.alphas.items()}
        supernet.use({name: OnePath(index) for name, index in indices.items()})

    def architecture_step(self, supernet: Supernet, step: Step) -> float:
        """See :class:`~autocompress.nas.supernet.step.Method`."""
        gates: dict[str, Gate] = {}
        for name, alpha in supernet.alphas.items():
            values, index = self._drawn(alpha, step.generator, step.progress)
            every = tuple(range(len(alpha)))
            gates[name] = (
                SampledPath(values, index) if self.gradient == "path" else BinaryPath(values, index, every)
            )
        supernet.use(gates)
        loss = step.total(step.loss(supernet(step.search[0]), step.search[1]), supernet.probabilities())
        gradients = torch.autograd.grad(loss, list(supernet.alphas.values()), allow_unused=True)
        set_gradients(supernet, list(gradients))
        step.alpha_optimizer.step()
        return float(loss.detach())

    def _drawn(
        self, alpha: torch.Tensor, generator: torch.Generator, progress: float
    ) -> tuple[torch.Tensor, int]:
        return gumbel_softmax(alpha, self.temperature(progress), generator)
