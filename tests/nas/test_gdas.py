"""What GDAS' gradient knows, in closed form, and what it finds with it on the specification's toy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nas_tables import random_table, search_table, table_space

from autocompress.core.errors import RecipeError
from autocompress.nas.supernet import GDAS, Adam, Supernet
from autocompress.nas.supernet.gdas import Gradient


def tempered(alpha: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """The softmax of the logits with Gumbel noise, as the paper's equation 6."""
    uniform = torch.rand(alpha.shape, generator=generator, dtype=torch.float64)
    scores = torch.log_softmax(alpha.double(), 0) - torch.log(-torch.log(uniform))
    return torch.softmax(scores / temperature, 0)


@pytest.mark.parametrize("gradient", ["path", "all"])
def test_the_gradient_holds_the_cost_of_the_drawn_operation_or_of_all(gradient: Gradient) -> None:
    costs = random_table((3, 4), 0)
    space, method = table_space(costs), GDAS(gradient=gradient)
    moved = search_table(space, method, num_steps=1, seed=5, alpha=Adam(1e-9, (0.5, 0.999)))
    generator = torch.Generator().manual_seed(5)
    for row, (name, start) in zip(costs, Supernet(space, seed=5).alphas.items(), strict=True):
        p = tempered(start.detach(), method.temperature(0.0), generator)
        known = torch.from_numpy(row).clone()
        if gradient == "path":  # the others count as if they cost nothing
            known[torch.arange(4) != p.argmax()] = 0
        expected = p * (known - (p * known).sum()) / method.temperature(0.0)
        found = moved.alphas[name].grad
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def toys_solved(gradient: Gradient, *, num_toys: int, lr: float = 3e-3) -> int:
    """How many additive toys of 6 decisions x 5 operations end at their best member after 2,000 steps.

    Toys do not touch each other in a sum, so one search over all their decisions is as many searches.
    """
    costs = np.concatenate([random_table((6, 5), seed) for seed in range(num_toys)])
    alpha = Adam(lr, (0.5, 0.999), 1e-3)
    supernet = search_table(table_space(costs), GDAS(gradient=gradient), num_steps=2000, seed=0, alpha=alpha)
    found = np.array([int(op[1:]) for op in supernet.derive().values()])
    return int((found == costs.argmin(1)).reshape(num_toys, 6).all(1).sum())


@pytest.mark.slow
def test_the_toy_is_solved_by_the_gradient_of_all_costs_and_less_often_by_that_of_one_path() -> None:
    # 2,000 steps, temperature 10 to 0.1, alpha lr 3e-3. The specification's toy (40 of 40) knows all costs.
    everything, path = (toys_solved(gradient, num_toys=20) for gradient in ("all", "path"))
    assert everything >= 19
    assert 10 <= path < everything


def test_an_unknown_gradient_is_refused() -> None:
    with pytest.raises(RecipeError, match="gradient must be one of path, all"):
        GDAS(gradient="some")  # type: ignore[arg-type]
