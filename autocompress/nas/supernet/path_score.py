"""Scores of members by the weights of a trained supernet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autocompress.core.errors import RecipeError
from autocompress.core.plan import Plan
from autocompress.nas.supernet.gates import OnePath
from autocompress.nas.supernet.network import Supernet
from autocompress.training import Samples
from autocompress.training.batches import spread


@dataclass(frozen=True, eq=False)
class PathScore:
    """The accuracy of a member's path through a supernet: a problem's ``evaluate`` without any training.

    A supernet that was trained once serves any number of targets and budgets: each costs a search over
    :func:`~autocompress.nas.spaces.arch_problem` alone.

    Args:
        supernet: trained.
        samples: what the accuracy is measured on; held back from the training of its weights.
        num_samples: how many of them, evenly spaced; all when absent.
        batch_size: samples per forward pass, by whose statistics BatchNorm normalises.

    Raises:
        RecipeError: a batch of fewer than 2 samples.
    """

    supernet: Supernet
    samples: Samples
    num_samples: int | None = None
    batch_size: int = 250

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise RecipeError(f"batch_size must be >= 2, got {self.batch_size}")

    def __call__(self, plan: Plan) -> float:
        """The share of right answers, in [0, 1].

        Raises:
            RecipeError: the plan's architecture is not a member.
        """
        supernet, num_right, num_seen = self.supernet, 0, 0
        supernet.space.check(plan.arch)
        decisions = supernet.space.decisions
        supernet.use({name: OnePath(decisions[name].index(op)) for name, op in plan.arch.items()})
        limit = min(self.num_samples or len(self.samples), len(self.samples))
        device = next(supernet.parameters()).device
        was_training = supernet.training
        supernet.eval()
        with torch.no_grad():
            for x, y in spread(self.samples, self.batch_size, limit=limit):
                num_right += int((supernet(x.to(device)).argmax(1).cpu() == y).sum())
                num_seen += len(y)
        supernet.train(was_training)
        return num_right / num_seen
