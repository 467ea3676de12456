from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import TinyResNet, TinyVGG, seeded
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn

from autocompress.core import Bits, Plan
from autocompress.core.errors import UnsupportedModelError
from autocompress.quant.kmeans import (
    CodebookTables,
    make_codebook,
    share_weights,
    trained_codebooks,
)
from autocompress.training import TrainSettings, fit, from_datasets


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: Tensor, bits: int) -> float:
    return float((make_codebook(weight, bits).values.double() - weight.double()).square().sum())


def least_error(values: NDArray[np.float64], num: int) -> float:
    """Optimal one-dimensional k-means by dynamic programming over the sorted values."""
    values = np.sort(values)
    size = len(values)

    def inertia(start: int) -> NDArray[np.float64]:
        part = values[start:]
        counts = np.arange(1, len(part) + 1)
        return np.cumsum(part**2) - np.cumsum(part) ** 2 / counts

    cost = np.full((size + 1, size + 1), np.inf)
    for start in range(size):
        cost[start, start + 1 :] = inertia(start)
    best = cost[0]
    for _ in range(num - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[size])


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_few_weights_are_clustered_with_the_least_possible_error(bits: int) -> None:
    for seed in range(5):
        weight = drawn(12, 8, seed=seed) ** 3
        optimum = least_error(weight.double().numpy().ravel(), 2**bits)
        assert squared_error(weight, bits) == pytest.approx(optimum, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("power", [1, 3])
def test_many_weights_come_within_a_thousandth_of_the_optimum(bits: int, power: int) -> None:
    weight = drawn(1500) ** power
    optimum = least_error(weight.double().numpy(), 2**bits)
    assert optimum * (1 - 1e-5) <= squared_error(weight, bits) <= optimum * 1.001


@pytest.mark.parametrize("bits", [1, 3, 6, 8])
def test_no_random_start_of_kmeans_does_better(bits: int) -> None:
    for weight in (drawn(6000), drawn(6000) ** 3, torch.cat([drawn(6000), torch.tensor([500.0])])):
        for seed in range(3):
            rival = KMeans(2**bits, n_init=1, random_state=seed).fit(weight.double().numpy()[:, None])
            assert squared_error(weight, bits) <= rival.inertia_ * 1.0001


@pytest.mark.parametrize("num", [1, 3, 8])
def test_nothing_is_lost_when_there_are_as_many_codes_as_distinct_weights(num: int) -> None:
    weight = drawn(num)[torch.arange(200) % num].reshape(10, 20)
    book = make_codebook(weight, 3)
    assert len(book.centroids) == num
    torch.testing.assert_close(book.values, weight, rtol=1e-6, atol=0)


def test_pruned_weights_stay_zero_and_zero_is_one_of_the_codes() -> None:
    weight = drawn(16, 8, 3, 3)
    weight[::2] = 0
    for bits in (1, 2, 4):
        book = make_codebook(weight, bits)
        assert torch.equal(book.values == 0, weight == 0)
        assert len(book.centroids) == 2**bits
        kept = weight[weight != 0].double().numpy()[:600]
        assert squared_error(weight[1::2].flatten()[:600], bits) >= least_error(kept, 2**bits) * (1 - 1e-5)


def test_a_chance_zero_does_not_cost_a_code() -> None:
    weight = torch.cat([torch.zeros(1), drawn(50)])
    optimum = least_error(weight.double().numpy(), 2)
    assert squared_error(weight, 1) == pytest.approx(optimum, rel=1e-5)


def test_all_zero_and_constant_layers_have_one_code() -> None:
    for value in (0.0, 0.25):
        book = make_codebook(torch.full((4, 4), value), 2)
        assert book.centroids.tolist() == [value]


def test_error_falls_with_every_bit() -> None:
    errors = [squared_error(drawn(5000), bits) for bits in range(1, 9)]
    assert all(after < before / 2 for before, after in pairwise(errors))


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_that_no_codebook_has_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 8 bits, got {bits}"):
        make_codebook(drawn(4), bits)


def test_diverged_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        make_codebook(torch.tensor([1.0, float("nan")]), 2)


def test_a_plan_changes_only_the_weights_it_names_and_not_the_model() -> None:
    model = seeded(TinyVGG)
    before = copy.deepcopy(model.state_dict())
    tables = CodebookTables(model)
    first, second, *others = tables.layers
    network = tables.network(Plan(bits={first: Bits(2, 32), second: Bits()}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {n for n, value in network.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"{first}.weight"}
    assert len(network.get_submodule(first).weight.unique()) == 4  # type: ignore[operator, union-attr]
    assert network.get_submodule(others[0]).weight is model.get_submodule(others[0]).weight


def test_the_empty_plan_is_the_network_itself() -> None:
    model, images = seeded(TinyResNet), drawn(2, 3, 16, 16)
    assert torch.equal(CodebookTables(model).network(Plan())(images), model(images))


def test_all_faults_of_a_plan_come_at_once() -> None:
    tables = CodebookTables(seeded(TinyVGG))
    first, second, *_ = tables.layers
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tables.network(Plan(bits={first: Bits(9, 32), second: Bits(4, 8), "nowhere": Bits(4, 32)}))
    for word in (f"{first!r} must have 1 to 8 or 32 bits", f"8 for {second!r}", "'nowhere'"):
        assert word in str(caught.value)


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer"):
        CodebookTables(nn.Sequential(nn.ReLU()))


def test_training_shared_values_equals_training_weights_and_averaging_clusters() -> None:
    """HAQ's released code steps every weight, then replaces it by the mean of its cluster."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn(*parameter.shape, seed=parameter.numel()))
    books = {name: make_codebook(model.get_submodule(name).weight, 2) for name in ("0", "2")}
    shared = share_weights(model, books).double()
    for name, book in books.items():
        model.get_submodule(name).weight.data = book.values.double()
    settings = {"lr": 0.3, "momentum": 0.9}
    plain = torch.optim.SGD(model.parameters(), **settings)
    tied = torch.optim.SGD(shared.parameters(), **settings)
    for step in range(4):
        x, y = drawn(8, 6, seed=step).double(), torch.arange(8) % 3
        for network, optimizer in ((model, plain), (shared, tied)):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        for name, book in books.items():
            weight = model.get_submodule(name).weight.data
            for code in range(len(book.centroids)):
                members = book.indices == code
                weight[members] = weight[members].mean()
    for name in books:
        torch.testing.assert_close(
            shared.get_submodule(name).weight, model.get_submodule(name).weight, rtol=1e-6, atol=1e-7
        )


class _Images:
    def __init__(self, num: int) -> None:
        self._x, self._y = drawn(num, 3, 16, 16), torch.arange(num) % 10

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._x[index], int(self._y[index])


def test_fit_moves_shared_values_keeps_zeros_and_resumes(tmp_path: Path) -> None:
    model = seeded(TinyVGG)
    with torch.no_grad():
        first = model.features[2][0].weight  # type: ignore[union-attr, index]
        first[::2] = 0
    tables = CodebookTables(model)
    plan = Plan(bits={name: Bits(3, 32) for name in tables.layers})
    books = tables.codebooks(plan)
    data = from_datasets(_Images(60), _Images(20), num_classes=10, search_size=20)
    settings = TrainSettings(epochs=2, batch_size=20, lr=0.05)

    straight = share_weights(model, books)
    fit(straight, data, settings, seed=0)
    trained = trained_codebooks(straight)
    assert set(trained) == set(books)
    for name, book in trained.items():
        assert torch.equal(book.indices, books[name].indices)
        assert not torch.equal(book.centroids, books[name].centroids)
        assert torch.equal(book.values, straight.get_submodule(name).weight)
    zeros = trained["features.2.0"].values == 0
    assert torch.equal(zeros, first == 0)

    def stop(report: object) -> None:
        raise KeyboardInterrupt

    cut = share_weights(model, books)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, data, settings, seed=0, checkpoint=tmp_path / "epochs", on_epoch=stop)
    resumed = share_weights(model, books)
    fit(resumed, data, settings, seed=0, checkpoint=tmp_path / "epochs")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_codebook_of_another_layer_is_refused() -> None:
    model = seeded(TinyVGG)
    names = list(CodebookTables(model).layers)
    with pytest.raises(ValueError, match="make it from this network"):
        share_weights(model, {names[0]: make_codebook(model.get_submodule(names[1]).weight, 2)})
