"""A network that holds every member of a space, and the parameters that choose among them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autocompress.core.errors import UnsupportedModelError
from autocompress.nas.spaces import Arch, Place, Space
from autocompress.nas.spaces.space import seeded
from autocompress.nas.supernet.gates import Gate, Mixture
from autocompress.nas.supernet.task import CLASSIFICATION, Task

_ALPHA_STD = 1e-3


class MixedOperation(nn.Module):
    """All operations of a decision at one place; the decision's gate says what happens.

    Args:
        decision: name of the decision.
        operations: one module each, in the decision's order.
        gates: decision -> gate of the present pass; shared by all places.
    """

    def __init__(self, decision: str, operations: list[nn.Module], gates: dict[str, Gate]) -> None:
        super().__init__()
        self.decision = decision
        self.operations = nn.ModuleList(operations)
        self._gates = gates

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the place's output."""
        return self._gates[self.decision](list(self.operations), x)


class SkipDropout(nn.Module):
    """Drops a skip connection for whole samples, so that it cannot win by being easy to train.

    Chen et al., Progressive DARTS, arXiv 1904.12760, section 3.2 (dropout behind the skip connections of the
    supernet, at a decaying rate).

    Args:
        operation: the skip connection.

    Attributes:
        rate: share of the samples for which it is dropped while training.
    """

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the operation's output, zero for dropped samples and scaled up for the others."""
        out: Tensor = self.operation(x)
        if not self.training or self.rate == 0:
            return out
        kept = torch.rand(len(out), 1, 1, 1, device=out.device) >= self.rate
        return out * kept / (1 - self.rate)


class Supernet(nn.Module):
    """Every member of a space in one network, with a distribution over the operations of each decision.

    BatchNorm always normalises by the statistics of the batch, in training as in evaluation: running averages
    over different paths fit none of them.

    Args:
        space: what is searched.
        seed: of the weights and of the architecture parameters, which start as N(0, 1e-6).
        affine: whether BatchNorm scales and shifts inside operations; DARTS and GDAS search without.
        task: how the network's output becomes logits.

    Attributes:
        alphas: decision -> logits of its operations, shape (operations,), on the CPU; not among
            ``parameters()``, so that no optimiser of the weights moves them.
        reward_mean: running mean of rewards, for methods that learn from them.
    """

    def __init__(self, space: Space, *, seed: int, affine: bool = True, task: Task = CLASSIFICATION) -> None:
        super().__init__()
        self.space, self.task = space, task
        self._gates: dict[str, Gate] = {}
        self.network = seeded(lambda: space.assemble(self._mixed), seed)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        if not affine:
            for mixed in self.mixed_operations:
                _drop_scales(mixed)
        generator = torch.Generator().manual_seed(seed)
        self.alphas: dict[str, Tensor] = {
            name: (_ALPHA_STD * torch.randn(len(ops), generator=generator)).requires_grad_(True)
            for name, ops in space.decisions.items()
        }
        self.reward_mean: float | None = None
        self.use_mixture()

    def _mixed(self, place: Place) -> nn.Module:
        choices = self.space.decisions[place.decision]
        operations = [self.space.operation(choice, place) for choice in choices]
        operations = [
            SkipDropout(op) if name == "skip_connect" else op
            for name, op in zip(choices, operations, strict=True)
        ]
        return MixedOperation(place.decision, operations, self._gates)

    @property
    def mixed_operations(self) -> list[MixedOperation]:
        """The mixed operations, in the order of execution."""
        return [module for module in self.network.modules() if isinstance(module, MixedOperation)]

    def forward(self, x: Tensor) -> Tensor:
        """The task's logits (N, answers) for its samples (N, C, H, W) under the present gates."""
        return self.task.logits(self.network, x)

    def probabilities(self) -> dict[str, Tensor]:
        """Decision -> softmax of its logits, differentiable."""
        return {name: torch.softmax(alpha, 0) for name, alpha in self.alphas.items()}

    def probability_table(self) -> dict[str, NDArray[np.float64]]:
        """Decision -> probability of each operation, as plain numbers."""
        return {name: p.detach().double().numpy() for name, p in self.probabilities().items()}

    def use(self, gates: Mapping[str, Gate]) -> None:
        """Set what every decision named does from now on."""
        self._gates.update(gates)

    def use_mixture(self) -> None:
        """Let every decision add up its operations by their probabilities, with gradients."""
        self.use({name: Mixture(p) for name, p in self.probabilities().items()})

    def derive(self) -> dict[str, str]:
        """The member that the present distribution stands for."""
        return self.space.derive(self.probability_table())

    def member(self, arch: Arch) -> nn.Module:
        """A member's plain network with this supernet's weights.

        Its BatchNorm has fresh running statistics: recalibrate them before evaluating.

        Args:
            arch: one operation per decision.

        Raises:
            RecipeError: not a member.
        """
        network = self.space.build(arch, seed=0)
        own = self.network.state_dict()
        paths = {place.path: place.decision for place in self.space.places}
        wanted = network.state_dict()
        for name, tensor in wanted.items():
            path = next((p for p in paths if name.startswith(f"{p}.")), None)
            source = name
            if path is not None:
                choice = arch[paths[path]]
                index = self.space.decisions[paths[path]].index(choice)
                inner = "operation." if choice == "skip_connect" else ""
                source = f"{path}.operations.{index}.{inner}{name.removeprefix(f'{path}.')}"
            if source not in own:
                continue  # running statistics, and scales of operations that were searched without
            if own[source].shape != tensor.shape:
                raise UnsupportedModelError(
                    f"layer {name!r} has another size in this member than in the supernet, because nodes of "
                    "its cells are left out; train the member from scratch"
                )
            tensor.copy_(own[source])
        return network


def _drop_scales(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.affine = False
            child.weight = child.bias = None  # type: ignore[assignment]
