"""The gradients that architecture searches follow, against closed forms, enumeration and autograd."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from nas_tables import random_table, search_table, table_costs, table_space
from torch import Tensor, nn

from autocompress.core.errors import RecipeError
from autocompress.hardware_sim import MacsModel
from autocompress.nas.spaces import Layout, MBConvChain, Stage, operation_costs
from autocompress.nas.spaces.operations import Zeros
from autocompress.nas.supernet import DARTS, GDAS, Adam, CostTerm, ProxylessNAS, Supernet
from autocompress.nas.supernet.darts import mixed_product, unrolled_gradient
from autocompress.nas.supernet.gates import (
    BinaryPath,
    Mixture,
    OnePath,
    gumbel_softmax,
    sample_pair,
    straight_through,
)
from autocompress.nas.supernet.proxyless import reinforce_loss, rescaled_pair, running_mean

TINY = MBConvChain(Layout(4, 1, 4, (Stage(4, 2, 1), Stage(6, 1, 2)), 8), (1, 8, 8), 10, kernels=(3, 5))


def operations() -> list[nn.Module]:
    """Three convolutions without batch statistics, a pooling and nothing, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 3, k, padding=k // 2) for k in (1, 3, 5)]
    return [nn.Sequential(c, nn.Tanh()).double() for c in convs] + [nn.AvgPool2d(3, 1, 1), Zeros()]


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """An input, logits of five operations and the coefficients of a linear loss."""
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, torch.randn(5, dtype=torch.float64, generator=generator), target


@pytest.mark.parametrize("active", range(5))
def test_the_gradient_of_binary_gates_is_that_of_the_mixture_at_the_gates_values(active: int) -> None:
    x, logits, target = case()
    ops, alpha = operations(), logits.clone().requires_grad_(True)
    inputs = x.clone().requires_grad_(True)
    gate = BinaryPath(straight_through(torch.softmax(alpha, 0), active), active, tuple(range(5)))
    ((gate(ops, inputs) - target) ** 2).sum().backward()

    values = torch.eye(5, dtype=torch.float64)[active].requires_grad_(True)
    soft_inputs = x.clone().requires_grad_(True)
    ((Mixture(values)(ops, soft_inputs) - target) ** 2).sum().backward()
    p, g = torch.softmax(logits, 0), values.grad
    assert g is not None
    assert alpha.grad is not None
    expected = torch.stack([sum(g[j] * p[j] * (float(i == j) - p[i]) for j in range(5)) for i in range(5)])
    torch.testing.assert_close(alpha.grad, expected)
    torch.testing.assert_close(inputs.grad, soft_inputs.grad)
    assert torch.count_nonzero(alpha.grad) == 5  # also for the path that gives zeros


def test_candidates_alone_get_a_gradient() -> None:
    x, _, target = case()
    values = torch.eye(5, dtype=torch.float64)[2].requires_grad_(True)
    (BinaryPath(values, 2, (2, 4))(operations(), x) * target).sum().backward()
    assert values.grad is not None
    assert values.grad[[0, 1, 3]].tolist() == [0, 0, 0]
    assert values.grad[2] != 0


def test_a_step_of_the_architecture_gives_weights_no_gradient() -> None:
    x, _, target = case()
    ops = operations()
    values = torch.eye(5, dtype=torch.float64)[1].requires_grad_(True)
    (BinaryPath(values, 1, tuple(range(5)))(ops, x) * target).sum().backward()
    assert all(w.grad is None for op in ops for w in op.parameters())


def saved_bytes(supernet: Supernet, images: Tensor) -> int:
    """Bytes of distinct tensors kept for the backward pass of one forward pass, weights apart."""
    weights = {w.untyped_storage().data_ptr() for w in supernet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = supernet(images)
    assert out.requires_grad
    return sum(kept.values())


def test_binary_gates_keep_the_activations_of_one_path_and_the_mixture_those_of_all() -> None:
    supernet = Supernet(TINY, seed=0)
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    probabilities = supernet.probabilities()
    supernet.use({name: OnePath(len(p) - 1) for name, p in probabilities.items()})
    one = saved_bytes(supernet, images)
    supernet.use(
        {
            name: BinaryPath(straight_through(p, len(p) - 1), len(p) - 1, tuple(range(len(p))))
            for name, p in probabilities.items()
        }
    )
    binary = saved_bytes(supernet, images)
    supernet.use_mixture()
    mixture = saved_bytes(supernet, images)
    assert binary <= 1.1 * one
    assert mixture >= 2 * one


def test_expected_cost_is_the_mean_over_all_members() -> None:
    model, supernet = MacsModel(), Supernet(TINY, seed=0)
    with torch.no_grad():
        for alpha in supernet.alphas.values():
            alpha.mul_(1000)
    p = supernet.probability_table()
    mean = 0.0
    for arch in TINY.members():
        chance = math.prod(p[name][TINY.decisions[name].index(op)] for name, op in arch.items())
        mean += chance * model(TINY.graph(arch))["macs"]
    term = CostTerm(operation_costs(TINY, model, "macs"), reference=1e5)
    assert float(term.expected(supernet.probabilities()).detach()) == pytest.approx(mean, rel=1e-6)


def test_the_gradient_of_expected_cost_is_p_times_the_distance_from_the_mean() -> None:
    costs = random_table((3, 4), 0)
    alphas = {f"d{i}": torch.randn(4, dtype=torch.float64, requires_grad=True) for i in range(3)}
    probabilities = {name: torch.softmax(alpha, 0) for name, alpha in alphas.items()}
    CostTerm(table_costs(costs, fixed=2.0), 1.0).expected(probabilities).backward()
    for i, (name, alpha) in enumerate(alphas.items()):
        p, f = probabilities[name].detach(), torch.from_numpy(costs[i])
        torch.testing.assert_close(alpha.grad, p * (f - (p * f).sum()))


def test_the_forms_of_the_loss_are_those_of_the_paper_and_an_excess_counts_above_the_limit_only() -> None:
    costs = table_costs(10 + random_table((2, 3), 1), fixed=5.0)
    p = {name: torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64) for name in costs.table}
    expected = 5.0 + sum(float(row @ np.array([0.2, 0.3, 0.5])) for row in costs.table.values())
    error = torch.tensor(0.7, dtype=torch.float64)
    linear = CostTerm(costs, 20.0, "add_linear", weight=0.1).loss(error, p)
    assert float(linear) == pytest.approx(0.7 + 0.1 * (expected - 20) / 20)
    above, below = (CostTerm(costs, limit, "add_excess", weight=0.1).loss(error, p) for limit in (20.0, 1e3))
    assert (float(above), float(below)) == (float(linear), 0.7)
    log = CostTerm(costs, 20.0, "mul_log", weight=0.3, scale=0.2).loss(error, p)
    assert float(log) == pytest.approx(0.2 * 0.7 * (math.log(expected) / math.log(20)) ** 0.3, rel=1e-6)


def test_the_logarithmic_loss_refuses_costs_below_one_unit() -> None:
    with pytest.raises(RecipeError, match="add_linear"):
        CostTerm(table_costs(random_table((2, 3), 1)), 0.5, "mul_log")
    with pytest.raises(RecipeError) as caught:
        CostTerm(table_costs(random_table((2, 3), 1)), -1.0, "add", weight=math.inf)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 3


def test_rescaling_a_pair_leaves_every_other_probability_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        before = torch.randn(7, dtype=torch.float64, generator=generator)
        pair = sample_pair(torch.softmax(before, 0), generator)
        after = before + torch.randn(7, dtype=torch.float64, generator=generator)
        p, q = torch.softmax(before, 0), torch.softmax(rescaled_pair(before, after, pair), 0)
        others = [i for i in range(7) if i not in pair]
        torch.testing.assert_close(q[others], p[others])
        a, b = pair  # and the two move against each other as the update said
        assert float(q[a].log() - q[b].log()) == pytest.approx(float(after[a] - after[b]))


def test_steps_of_two_paths_change_two_probabilities_per_decision() -> None:
    space = table_space(random_table((4, 6), 0))
    start, moved = (
        Supernet(space, seed=0),
        search_table(space, ProxylessNAS("two"), num_steps=1, seed=0, alpha=Adam(0.3, (0.5, 0.9))),
    )
    for name, p in start.probability_table().items():
        changed = np.abs(moved.probability_table()[name] - p) > 1e-6
        assert changed.sum() == 2


@pytest.mark.parametrize("xi", [0.0, 0.1, 0.3, 0.5])
def test_the_bilevel_toy_ends_where_its_order_says(xi: float) -> None:
    # Liu et al., figure 2: search loss a*w - 2a + 1, training loss w^2 - 2aw + a^2, start (a, w) = (2, -2).
    # A stationary point of the one-step gradient has w = a and w - 2 + 2*xi*a = 0.
    a, w = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    a.requires_grad_(True), w.requires_grad_(True)

    def train() -> Tensor:
        return w**2 - 2 * a * w + a**2

    def search() -> Tensor:
        return a * w - 2 * a + 1

    for _ in range(3000):
        (by_a,) = unrolled_gradient(train, search, [w], [a], lr=xi)
        (by_w,) = torch.autograd.grad(train(), [w])
        with torch.no_grad():
            a -= 0.02 * by_a
            w -= 0.1 * by_w
    assert float(a) == pytest.approx(2 / (1 + 2 * xi), abs=1e-3)
    assert float(w) == pytest.approx(float(a), abs=1e-3)


def network() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Weights of two layers, logits of three mixed activations, and data."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 8), (8, 3))
    weights = [0.5 * torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    alpha = torch.randn(3, dtype=torch.float64, generator=generator)
    x, y = (torch.randn(16, n, dtype=torch.float64, generator=generator) for n in (5, 3))
    return [w.requires_grad_(True) for w in weights], [alpha.requires_grad_(True)], x, y


def mixed_loss(weights: list[Tensor], alphas: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    p, hidden = torch.softmax(alphas[0], 0), x @ weights[0]
    hidden = p[0] * torch.tanh(hidden) + p[1] * torch.sin(hidden) + p[2] * hidden
    return ((hidden @ weights[1] - y) ** 2).mean()


def test_the_mixed_second_derivative_equals_autograds() -> None:
    weights, alphas, x, y = network()
    direction = [torch.randn_like(w) for w in weights]
    first = torch.autograd.grad(mixed_loss(weights, alphas, x, y), weights, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
    (exact,) = torch.autograd.grad(along, alphas)
    before = [w.detach().clone() for w in weights]
    (ours,) = mixed_product(lambda: mixed_loss(weights, alphas, x, y), weights, alphas, direction)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_the_unrolled_gradient_is_the_derivative_through_the_step() -> None:
    weights, alphas, x, y = network()
    other = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lr, decay, velocity = 0.1, 0.01, [0.3 * torch.randn_like(w) for w in weights]
    found = unrolled_gradient(
        lambda: mixed_loss(weights, alphas, x, y),
        lambda: mixed_loss(weights, alphas, other, y),
        weights,
        alphas,
        lr=lr,
        velocity=velocity,
        weight_decay=decay,
    )
    first = torch.autograd.grad(mixed_loss(weights, alphas, x, y), weights, create_graph=True)
    stepped = [w - lr * (v + g + decay * w) for w, v, g in zip(weights, velocity, first, strict=True)]
    (exact,) = torch.autograd.grad(mixed_loss(stepped, alphas, other, y), alphas)
    torch.testing.assert_close(found[0], exact, rtol=1e-3, atol=1e-6)


def test_gumbel_samples_are_distributed_by_the_softmax_at_any_temperature() -> None:
    logits = torch.tensor([0.3, -0.4, 0.8])
    generator = torch.Generator().manual_seed(0)
    expected = torch.softmax(logits, 0).numpy()
    for temperature in (10.0, 0.1):
        drawn = [gumbel_softmax(logits, temperature, generator)[1] for _ in range(20_000)]
        frequencies = np.bincount(drawn, minlength=3) / len(drawn)
        # Three standard deviations of a frequency over 20,000 draws are at most 0.0106.
        np.testing.assert_allclose(frequencies, expected, atol=0.0106)


@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1])
def test_the_straight_through_gradient_is_that_of_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    values, index = gumbel_softmax(logits, temperature, torch.Generator().manual_seed(4))
    assert values.detach().tolist() == pytest.approx([float(i == index) for i in range(3)])
    (values * costs).sum().backward()
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform))
    p = torch.softmax((torch.log_softmax(logits.detach(), 0) + noise) / temperature, 0)
    by_scores = p * (costs - (p * costs).sum()) / temperature
    # Through the log-softmax: less its mean under softmax(logits), which is 0 since by_scores sums to 0.
    torch.testing.assert_close(logits.grad, by_scores)


def test_the_temperature_falls_in_a_straight_line() -> None:
    gdas = GDAS()
    assert [gdas.temperature(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([10.0, 5.05, 0.1])


def test_the_expectation_of_reinforces_gradient_is_the_gradient_of_the_expected_reward() -> None:
    rewards = random_table((3, 4), 0)
    alphas = {f"d{i}": torch.randn(4, dtype=torch.float64, requires_grad=True) for i in range(3)}
    table = torch.from_numpy(rewards)
    p = {name: torch.softmax(a, 0) for name, a in alphas.items()}
    sum((p[f"d{i}"] * table[i]).sum() for i in range(3)).backward()
    mean = {name: torch.zeros(4, dtype=torch.float64) for name in alphas}
    for indices in itertools.product(range(4), repeat=3):
        drawn = {f"d{i}": index for i, index in enumerate(indices)}
        chance = math.prod(float(p[name][index]) for name, index in drawn.items())
        reward = sum(rewards[i, index] for i, index in enumerate(indices))
        loss = reinforce_loss(alphas, [drawn], [reward - 1.7])  # any baseline
        for name, gradient in zip(alphas, torch.autograd.grad(loss, list(alphas.values())), strict=True):
            mean[name] -= chance * gradient
    for name, alpha in alphas.items():
        torch.testing.assert_close(mean[name], alpha.grad)


def test_the_baseline_remembers_ninety_nine_parts_of_a_hundred() -> None:
    assert running_mean(None, 0.4, 0.99) == 0.4
    assert running_mean(0.5, 0.7, 0.99) == pytest.approx(0.502)


def exact_optima(variant: str, seeds: range, weights: tuple[float, ...]) -> list[bool]:
    """Whether each search ends at the best of all 117,649 members."""
    found = []
    for seed in seeds:
        errors, latencies = random_table((6, 7), seed), random_table((6, 7), 1000 + seed)
        weight = weights[seed % len(weights)]
        cost = CostTerm(table_costs(latencies), 1.0, weight=weight)
        method, alpha = ProxylessNAS(variant), Adam(0.05, (0.0, 0.999))  # type: ignore[arg-type]
        supernet = search_table(table_space(errors), method, num_steps=500, seed=seed, alpha=alpha, cost=cost)
        best = (errors + weight * latencies).argmin(1)
        found.append([int(op[1:]) for op in supernet.derive().values()] == best.tolist())
    return found


@pytest.mark.parametrize("variant", ["full", "two"])
def test_proxyless_finds_the_best_of_117649_networks(variant: str) -> None:
    assert all(exact_optima(variant, range(1, 3), (0.0, 1.0, 3.0)))


@pytest.mark.slow
def test_proxyless_finds_the_best_of_117649_networks_in_50_of_50_runs() -> None:
    assert sum(exact_optima("full", range(50), (0.0, 0.3, 1.0, 3.0))) == 50


def test_two_cost_tables_specialise_to_two_networks() -> None:
    # Operations are kernel 3, 5, 7 at expansion 3, then at expansion 6; larger is more accurate.
    kernel, expand = np.tile([0.0, 1.0, 2.0], 2), np.repeat([0.0, 1.0], 3)
    space = table_space(np.tile(-0.5 * kernel - 0.8 * expand, (4, 1)))
    found = []
    for latency in (0.6 * kernel + 0.1 * expand, 0.1 * kernel + 1.5 * expand):
        cost = CostTerm(table_costs(np.tile(latency, (4, 1))), 1.0, weight=1.0)
        method, alpha = ProxylessNAS("full"), Adam(0.05, (0.0, 0.999))
        supernet = search_table(space, method, num_steps=150, seed=0, alpha=alpha, cost=cost)
        found.append(set(supernet.derive().values()))
    assert found == [{"o3"}, {"o2"}]  # 3x3 and wide where kernels cost; 7x7 and narrow where width costs


@pytest.mark.slow
def test_reinforce_ends_among_the_best_hundredth() -> None:
    for seed in range(3):
        errors = random_table((6, 7), seed)
        space = table_space(errors)
        supernet = search_table(
            space,
            TableReinforce("reinforce", every=1),
            num_steps=600,
            seed=seed,
            alpha=Adam(0.05, (0.0, 0.999)),
        )
        totals = np.array([sum(row) for row in itertools.product(*errors)])
        assert (totals < space.value(supernet.derive())).mean() <= 0.01


class TableReinforce(ProxylessNAS):
    """Its reward is the table's, not an accuracy."""

    def reward(self, logits: Tensor, y: Tensor, indices: dict[str, int], step: object) -> float:
        return -float(logits.mean())


@pytest.mark.slow
def test_gdas_schedule_finds_all_six_edges_of_an_additive_table() -> None:
    # The sampler and its temperature on a loss that is linear in the gates, as in the specification's toy.
    for seed in range(10):
        costs = torch.from_numpy(random_table((6, 5), seed)).float()
        alpha = (1e-3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))).requires_grad_(True)
        optimizer = torch.optim.Adam([alpha], lr=3e-3, betas=(0.5, 0.999), weight_decay=1e-3)
        generator, gdas = torch.Generator().manual_seed(seed), GDAS()
        for step in range(2000):
            values = [gumbel_softmax(row, gdas.temperature(step / 2000), generator)[0] for row in alpha]
            optimizer.zero_grad()
            (torch.stack(values) * costs).sum().backward()
            optimizer.step()
        assert alpha.argmax(1).tolist() == costs.argmin(1).tolist()


def test_darts_of_both_orders_finds_an_additive_tables_best() -> None:
    errors = random_table((6, 5), 3)
    for order in (1, 2):
        supernet = search_table(
            table_space(errors), DARTS(order), num_steps=200, seed=0, alpha=Adam(0.05, (0.5, 0.999))
        )
        assert [int(op[1:]) for op in supernet.derive().values()] == errors.argmin(1).tolist()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        ProxylessNAS("three", num_samples=1, baseline_decay=1.0)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 3
    with pytest.raises(RecipeError, match="order"):
        DARTS(3)
    with pytest.raises(RecipeError, match="cold"):
        GDAS(hot=0.1, cold=1.0)
    with pytest.raises(RecipeError, match="skip_dropout"):
        DARTS(skip_dropout=1.0)
    with pytest.raises(RecipeError) as caught:
        Adam(0.0, (0.5, 1.0), -1.0)
    assert len(caught.value.faults) == 3
