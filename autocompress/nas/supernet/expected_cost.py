"""The expected cost of a distribution over members, and how it enters the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from autocompress.core.errors import RecipeError
from autocompress.nas.spaces import OperationCosts

LossForm = Literal["add_linear", "add_excess", "mul_log"]


@dataclass(frozen=True)
class CostTerm:
    """A machine's cost as part of the loss.

    ``E[cost] = fixed + sum over decisions of sum_j p_j F_j`` with the costs F of the operations, so that
    ``dE/dalpha_i = p_i (F_i - E_decision)``. Cai, Zhu, Han, arXiv 1812.00332, section 3.3, the two forms
    of the released code, and one of ours:

    - ``add_linear``: ``loss + weight * (E - reference) / reference``; the code's weight is 0.1.
    - ``add_excess``: the same where E is above the reference, else the loss alone. For limits: a distribution
      within one is not pushed further down.
    - ``mul_log``: ``scale * loss * (log E / log reference) ** weight``; the code's scale and weight are 0.2
      and 0.3 for its phone. Needs costs well above 1 in their unit: the logarithm must be positive.

    Args:
        costs: of the space's operations on the machine.
        reference: the cost aimed at, in the metric's unit.
        form: see above.
        weight: see above.
        scale: of ``mul_log``.

    Raises:
        RecipeError: values out of range, all at once.
    """

    costs: OperationCosts
    reference: float
    form: LossForm = "add_linear"
    weight: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        if self.form not in get_args(LossForm):
            faults.append(f"form must be one of {', '.join(get_args(LossForm))}, got {self.form!r}")
        for name in ("reference", "scale"):
            if not 0 < getattr(self, name) < float("inf"):
                faults.append(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.weight < float("inf"):
            faults.append(f"weight must be >= 0 and finite, got {self.weight}")
        least = self.costs.fixed + sum(float(table.min()) for table in self.costs.table.values())
        if self.form == "mul_log" and (self.reference <= 1 or least <= 1):
            faults.append(
                f"mul_log needs costs above 1 {self.costs.metric}, got a reference of {self.reference:.4g} "
                f"and {least:.4g} for the cheapest member; use add_linear"
            )
        if faults:
            raise RecipeError(faults)

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(table) for name, table in self.costs.table.items()}

    def expected(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Expected cost in the metric's unit, a differentiable scalar.

        Args:
            probabilities: decision -> shape (operations,).
        """
        total = torch.tensor(self.costs.fixed, dtype=torch.float64)
        for name, p in probabilities.items():
            total = total + (p.double().cpu() * self._tables[name]).sum()
        return total

    def loss(self, error: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The loss with the cost's part."""
        expected = self.expected(probabilities).to(error)
        if self.form == "add_linear":
            return error + self.weight * (expected - self.reference) / self.reference
        if self.form == "add_excess":
            return error + self.weight * torch.relu(expected - self.reference) / self.reference
        reference = torch.log(torch.tensor(self.reference).to(error))
        return self.scale * error * (torch.log(expected) / reference) ** self.weight
