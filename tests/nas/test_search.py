"""Searches by gradient on real images: deterministic, resumable to the bit, and blind to the test split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autocompress.core import Bits, Budget, Plan
from autocompress.core.errors import CheckpointError, DataError, DivergenceError, RecipeError
from autocompress.hardware_sim import MacsModel, load_target
from autocompress.nas.evolution import RegularizedEvolution
from autocompress.nas.spaces import (
    Darts,
    Layout,
    MBConvChain,
    NASBench201,
    Space,
    Stage,
    arch_problem,
    mbconv_chain,
    operation_costs,
)
from autocompress.nas.spaces.costs import arch_price
from autocompress.nas.supernet import (
    DARTS,
    GDAS,
    Adam,
    CostTerm,
    Method,
    PathScore,
    ProxylessNAS,
    SearchEpoch,
    SearchSettings,
    Supernet,
    SupernetSearch,
)
from autocompress.nas.supernet.gates import OnePath
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data, recalibrate_batchnorm, subset

TINY = MBConvChain(Layout(4, 1, 4, (Stage(4, 2, 1), Stage(6, 1, 2)), 8), (1, 8, 8), 10, kernels=(3, 5))
CELLS = NASBench201((1, 8, 8), 10, channels=4, cells_per_stage=1)
FAST = Adam(0.05, (0.0, 0.999))
METHODS: tuple[tuple[Space, Method], ...] = (
    (TINY, ProxylessNAS("full", alpha=FAST, every=2)),
    (TINY, ProxylessNAS("two", alpha=FAST, every=2)),
    (TINY, ProxylessNAS("reinforce", alpha=FAST, every=3, num_samples=2)),
    (CELLS, DARTS(1, alpha=FAST, skip_dropout=0.5)),
    (CELLS, DARTS(2, alpha=FAST)),
    (CELLS, GDAS(alpha=FAST)),
)


class Untouchable:
    """A test split that a search must not read."""

    def __len__(self) -> int:
        raise AssertionError("the test split was read")

    def __getitem__(self, index: int, /) -> Any:
        raise AssertionError("the test split was read")


def digits(num: int = 96) -> Data:
    """A few digits to train on and as many to search with."""
    data = load_data("digits", search_size=0.5, seed=0)
    train, search = (subset(split, np.arange(num)) for split in (data.train, data.search))
    return replace(data, train=train, search=search, test=Untouchable())


def identify(method: object) -> str:
    return f"{type(method).__name__}-{getattr(method, 'variant', getattr(method, 'order', ''))}"


def bits(supernet: Supernet) -> list[bytes]:
    tensors = [*supernet.state_dict().values(), *supernet.alphas.values()]
    return [t.detach().contiguous().numpy().tobytes() for t in tensors]


@pytest.mark.parametrize(("space", "method"), METHODS, ids=[identify(m) for _, m in METHODS])
def test_a_search_cut_short_and_repeated_ends_with_the_bits_of_one_that_was_not(
    space: Space, method: Method, tmp_path: Path
) -> None:
    search = SupernetSearch(method, SearchSettings(epochs=3, warmup_epochs=1, batch_size=32))
    straight = search(space, digits(), seed=3)

    def kill(report: SearchEpoch) -> None:
        if report.epoch == 1:
            raise KeyboardInterrupt

    path = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        search(space, digits(), seed=3, checkpoint=path, on_epoch=kill)
    resumed = search(space, digits(), seed=3, checkpoint=path)
    assert resumed.arch == straight.arch
    assert bits(resumed.supernet) == bits(straight.supernet)
    assert [replace(r, seconds=0) for r in resumed.reports] == [
        replace(r, seconds=0) for r in straight.reports
    ]
    start = Supernet(space, seed=3, affine=method.affine)
    assert any(not torch.equal(alpha, start.alphas[name]) for name, alpha in straight.supernet.alphas.items())
    space.check(straight.arch)


def test_warm_up_leaves_the_distribution_alone() -> None:
    found: list[SearchEpoch] = []
    search = SupernetSearch(
        ProxylessNAS(alpha=FAST, every=1), SearchSettings(2, warmup_epochs=1, batch_size=32)
    )
    result = search(TINY, digits(), seed=0, on_epoch=found.append)
    assert found[0].search_loss is None
    assert found[0].entropy == pytest.approx(1.0, abs=1e-4)
    assert found[1].search_loss is not None
    assert found[1].entropy < found[0].entropy
    assert result.reports == tuple(found)


def test_a_diverging_search_says_so_and_goes_on_from_its_checkpoint_at_a_lower_rate(tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    settings = SearchSettings(epochs=3, batch_size=32, clip_norm=None, lr=0.02)
    method = ProxylessNAS(alpha=FAST)
    with pytest.raises(KeyboardInterrupt):
        SupernetSearch(method, settings)(TINY, digits(), seed=0, checkpoint=path, on_epoch=interrupt)
    wild = replace(settings, lr=1e30, min_lr=1e30)
    with pytest.raises(DivergenceError, match=r"diverged.*epoch 1.*Lower lr"):
        SupernetSearch(method, wild)(TINY, digits(), seed=0, checkpoint=path)
    result = SupernetSearch(method, settings)(TINY, digits(), seed=0, checkpoint=path)
    assert [report.epoch for report in result.reports] == [0, 1, 2]
    assert bits(result.supernet) == bits(SupernetSearch(method, settings)(TINY, digits(), seed=0).supernet)


def interrupt(report: SearchEpoch) -> None:
    raise KeyboardInterrupt


def test_a_checkpoint_of_another_search_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    settings = SearchSettings(epochs=1, batch_size=32)
    SupernetSearch(ProxylessNAS(alpha=FAST), settings)(TINY, digits(), seed=0, checkpoint=path)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        SupernetSearch(ProxylessNAS(alpha=FAST), settings)(TINY, digits(), seed=1, checkpoint=path)
    with pytest.raises(CheckpointError, match="method"):
        SupernetSearch(ProxylessNAS("two", alpha=FAST), settings)(TINY, digits(), seed=0, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        SupernetSearch(ProxylessNAS(alpha=FAST), settings)(TINY, digits(), seed=0, checkpoint=path)


def test_data_that_does_not_fit_the_space_is_refused_before_any_work() -> None:
    search = SupernetSearch(GDAS(), SearchSettings(epochs=1))
    with pytest.raises(DataError, match=r"\(1, 8, 8\).*\(3, 32, 32\).*10 classes"):
        search(NASBench201((3, 32, 32), 7), digits(), seed=0)


def test_too_many_skip_connections_end_the_search_with_the_member_before() -> None:
    def report(epoch: int, num_skips: int) -> SearchEpoch:
        arch = {"cell.0_1": f"arch-{epoch}"}
        return SearchEpoch(epoch, 1.0, 0.5, 1.0, arch, 0.5, num_skips, None, 0.1, 0.0)

    search = SupernetSearch(DARTS(max_skips=3), SearchSettings(epochs=9))
    assert not search._collapsed((report(0, 4),))  # random logits at the start
    assert not search._collapsed((report(0, 4), report(1, 2)))
    assert search._collapsed((report(0, 4), report(1, 2), report(2, 3)))
    unguarded = SupernetSearch(DARTS(max_skips=None), SearchSettings(epochs=9))
    assert not unguarded._collapsed((report(0, 1), report(1, 6)))


@pytest.mark.parametrize(
    ("space", "affine"),
    [(TINY, True), (CELLS, False), (CELLS, True), (Darts((1, 8, 8), 10, channels=4, num_cells=3), False)],
    ids=["chain", "cells", "cells-affine", "darts"],
)
def test_a_member_with_the_supernets_weights_computes_what_the_supernet_does_on_that_path(
    space: Space, affine: bool
) -> None:
    supernet = Supernet(space, seed=0, affine=affine)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = np.random.default_rng(0)
    for _ in range(3):
        arch = space.random(generator)
        supernet.use({n: OnePath(space.decisions[n].index(op)) for n, op in arch.items()})
        member = supernet.member(arch).train()
        with torch.no_grad():
            torch.testing.assert_close(member(images), supernet(images), rtol=1e-4, atol=1e-4)
            recalibrate_batchnorm(member, [images])
            assert torch.isfinite(member.eval()(images)).all()


def test_settings_out_of_range_are_refused_all_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        SearchSettings(epochs=0, batch_size=1, lr=-1.0, clip_norm=0.0)
    assert len(caught.value.faults) >= 4


@pytest.mark.slow
def test_the_network_found_on_digits_is_at_least_as_good_as_ten_random_ones_of_no_more_latency() -> None:
    data = load_data("digits", search_size=0.5, seed=0)
    space, model = mbconv_chain(data.input_shape, data.num_classes), load_target("edge-tpu-like")
    costs = operation_costs(space, model, "latency_ms", bits=Bits(8, 8))
    generator = np.random.default_rng(0)
    drawn = [space.random(generator) for _ in range(200)]
    prices = [arch_price(costs, space, arch) for arch in drawn]
    cost = CostTerm(costs, float(np.median(prices)), weight=0.1)
    search = SupernetSearch(
        ProxylessNAS(alpha=FAST, every=1), SearchSettings(epochs=10, warmup_epochs=2, lr=0.05), cost
    )
    found = search(space, data, seed=0)
    limit = arch_price(costs, space, found.arch)
    cheaper = [arch for arch, price in zip(drawn, prices, strict=True) if price <= limit][:10]
    assert len(cheaper) == 10
    settings = TrainSettings(epochs=4, batch_size=64, lr=0.1)

    def retrained(arch: dict[str, str]) -> float:
        network = space.build(arch, seed=0)
        fit(network, data, settings, seed=0)
        return evaluate(network, data.test).accuracy

    assert retrained(found.arch) >= np.mean([retrained(arch) for arch in cheaper])


def test_paths_through_a_trained_supernet_score_members_for_any_target_without_training() -> None:
    data = digits(200)
    search = SupernetSearch(ProxylessNAS(alpha=FAST), SearchSettings(epochs=2, batch_size=32))
    supernet = search(TINY, data, seed=0).supernet
    score = PathScore(supernet, data.search, batch_size=100)
    before = bits(supernet)
    arch = TINY.random(np.random.default_rng(0))
    member = supernet.member(arch).train()  # batch statistics, as the supernet
    x, y = data.search.batch(torch.arange(100), None)
    with torch.no_grad():
        right = (member(x).argmax(1) == y).double().mean()
    assert PathScore(supernet, subset(data.search, np.arange(100)))(Plan(arch)) == pytest.approx(float(right))
    for target, metric in ((MacsModel(), "macs"), (load_target("titan-x-pascal"), "latency_ms")):
        problem = arch_problem(TINY, target, [Budget(metric, 0.7)], evaluate=score)
        best = RegularizedEvolution(population=5, sample=2)(problem, num_plans=10, seed=0).best
        assert problem.meets_budgets(best.cost)
    assert bits(supernet) == before
    with pytest.raises(RecipeError, match="batch_size"):
        PathScore(supernet, data.search, batch_size=1)
