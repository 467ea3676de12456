"""Indicators of untrained networks against closed forms, and the pruning order they give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.core.errors import DataError, RecipeError
from autocompress.nas.spaces import Darts, Layout, MBConvChain, NASBench201, Stage
from autocompress.nas.te_nas import (
    TENAS,
    condition_number,
    keep_edges,
    num_linear_regions,
    prune_by_importance,
)


def test_the_condition_number_of_a_linear_model_is_that_of_its_data_squared() -> None:
    images = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(images)
    found = condition_number(nn.Linear(12, 3, bias=False).double(), images)
    # Three outputs summed: the kernel is three times X X^T, whose condition number does not change.
    assert found == pytest.approx(float((singular[0] / singular[-1]) ** 2), rel=1e-9)


def test_repeated_images_or_more_images_than_weights_have_no_finite_condition_number() -> None:
    model, images = nn.Linear(6, 2, bias=False), torch.randn(4, 6)
    assert math.isfinite(condition_number(model, images))
    assert condition_number(model, torch.cat([images, images[:1]])) == math.inf
    assert condition_number(nn.Linear(2, 1, bias=False), torch.randn(4, 2)) == math.inf
    with pytest.raises(DataError, match="at least 2"):
        condition_number(model, images[:1])


def lines(num: int, seed: int) -> nn.Module:
    """A hidden layer of ReLUs whose boundaries are lines in general position through [-2, 2]^2."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(2, num)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(num, 2, generator=generator))
        layer.weight /= layer.weight.norm(dim=1, keepdim=True)
        layer.bias.copy_(torch.rand(num, generator=generator) - 0.5)
    return nn.Sequential(layer, nn.ReLU())


@pytest.mark.parametrize(("num", "expected"), [(1, 2), (2, 4), (3, 7), (6, 22)])
def test_lines_in_general_position_cut_the_plane_into_the_known_number_of_regions(
    num: int, expected: int
) -> None:
    assert expected == 1 + num + num * (num - 1) // 2
    axis = torch.linspace(-40, 40, 1601)
    grid = torch.cartesian_prod(axis, axis)
    fine = torch.cartesian_prod(torch.linspace(-3, 3, 601), torch.linspace(-3, 3, 601))
    assert num_linear_regions(lines(num, seed=3), torch.cat([grid, fine])) == expected


def test_repeated_images_add_no_region() -> None:
    images = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    model = lines(6, seed=3)
    assert num_linear_regions(model, torch.cat([images, images])) == num_linear_regions(model, images)


# Indicators that are sums over the operations there. With kappa falling by k and regions by r, the ranks are:
# 13 - k (most first, k = 1..12 each once) and r (least first), so the sums of ranks of the first round are
#   e0: a 5+3=8   b 11+1=12  c 8+9=17   d 12+5=17   -> a goes
#   e1: a 9+2=11  b 4+8=12   c 10+4=14  d 7+12=19   -> a goes
#   e2: a 6+6=12  b 3+7=10   c 1+10=11  d 2+11=13   -> b goes
# of the second, ranked among the nine left:
#   e0: b 8+1=9   c 6+6=12   d 9+3=12               -> b goes
#   e1: b 3+5=8   c 7+2=9    d 5+9=14               -> b goes
#   e2: a 4+4=8   c 1+7=8    d 2+8=10               -> a goes, the first of equals
# and of the third, among six:
#   e0: c 4+3=7   d 6+2=8    -> c;   e1: c 5+1=6   d 3+6=9 -> c;   e2: c 1+4=5   d 2+5=7 -> c
KAPPA = {"e0": (8, 2, 5, 1), "e1": (4, 9, 3, 6), "e2": (7, 10, 12, 11)}
REGIONS = {"e0": (3, 1, 9, 5), "e1": (2, 8, 4, 12), "e2": (6, 7, 10, 11)}


def test_operations_are_pruned_in_the_order_worked_out_by_hand() -> None:
    calls = []

    def indicators(left: dict[str, tuple[str, ...]]) -> tuple[float, float]:
        calls.append(left)
        pairs = [(name, "abcd".index(op)) for name, ops in left.items() for op in ops]
        return 100.0 + sum(KAPPA[n][i] for n, i in pairs), 10.0 + sum(REGIONS[n][i] for n, i in pairs)

    arch, removals = prune_by_importance({name: tuple("abcd") for name in KAPPA}, indicators)
    assert [(r.decision, r.operation, r.importance) for r in removals] == [
        *(("e0", "a", 8), ("e1", "a", 11), ("e2", "b", 10)),
        *(("e0", "b", 9), ("e1", "b", 8), ("e2", "a", 8)),
        *(("e0", "c", 7), ("e1", "c", 6), ("e2", "c", 5)),
    ]
    assert arch == dict.fromkeys(KAPPA, "d")
    assert len(calls) == 3 + 12 + 9 + 6  # each round: the whole, and once without each operation


def test_several_operations_per_round_never_empty_a_decision() -> None:
    arch, removals = prune_by_importance(
        {"e0": tuple("abcd"), "e1": ("a",)},
        lambda left: (float(len(left["e0"])), float("abcd".index(left["e0"][-1]))),
        num_pruned=3,
    )
    assert len(removals) == 3
    assert arch["e1"] == "a"
    with pytest.raises(RecipeError, match="num_pruned"):
        prune_by_importance({"e0": ("a",)}, lambda left: (1.0, 1.0), num_pruned=0)


def test_what_makes_the_condition_number_infinite_goes_first() -> None:
    arch, removals = prune_by_importance(
        {"e0": ("good", "bad")}, lambda left: (math.inf if "bad" in left["e0"] else 2.0, 1.0)
    )
    assert (arch["e0"], removals[0].operation) == ("good", "bad")


def test_te_nas_prunes_a_space_to_one_member_the_same_for_the_same_seed() -> None:
    space = NASBench201((1, 8, 8), 10, channels=2, cells_per_stage=1)
    generator = torch.Generator().manual_seed(0)
    search = TENAS(
        space,
        NASBench201((1, 4, 4), 10, channels=1, cells_per_stage=1),
        torch.randn(6, 1, 8, 8, generator=generator),
        torch.randn(64, 1, 4, 4, generator=generator),
        num_draws=1,
        num_pruned=3,
    )
    arch, removals = search(seed=0)
    space.check(arch)
    assert "none" not in arch.values()
    assert len(removals) == 6 * 3
    assert search(seed=0) == (arch, removals)


def test_spaces_with_other_decisions_are_refused() -> None:
    chain = MBConvChain(Layout(4, 1, 4, (Stage(4, 1, 1),), 8), (1, 8, 8), 10)
    with pytest.raises(RecipeError, match="same operations"):
        TENAS(NASBench201((1, 8, 8)), chain, torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_batch_statistics_are_used_and_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(4, 1, 6, 6)
    model(images)
    before = [np.array(p.detach()) for p in model.parameters()]
    assert math.isfinite(condition_number(model, images))
    num_linear_regions(model, images)
    assert all(np.array_equal(a, p.detach()) for a, p in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_every_node_keeps_the_edges_whose_loss_would_cost_most() -> None:
    # Taking edge i out lowers kappa by k and regions by r: importance = rank of k descending + rank of r.
    k, r = {"a": 3, "b": 1, "c": 2, "d": 4}, {"a": 1, "b": 4, "c": 3, "d": 2}

    def indicators(left: dict[str, tuple[str, ...]]) -> tuple[float, float]:
        present = [name for name, ops in left.items() if ops != ("none",)]
        return 10.0 + sum(k[n] for n in present), 10.0 + sum(r[n] for n in present)

    # Sums: a 2+1, b 4+4, c 3+3, d 1+2.
    kept = keep_edges(dict.fromkeys("abcd", "op"), [("a", "b", "c"), ("d",)], indicators, num_kept=2)
    assert kept == {"a": "none", "b": "op", "c": "op", "d": "op"}


@pytest.mark.slow
def test_te_nas_in_darts_space_leaves_two_edges_per_node() -> None:
    space = Darts((1, 4, 4), 2, channels=2, num_cells=3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 4, 4, generator=generator)
    search = TENAS(space, space, images, images, num_draws=1, num_pruned=7)
    arch, _ = search(seed=0)
    assert all(sum(arch[name] != "none" for name in node) == 2 for node in space.edges_into_nodes)
