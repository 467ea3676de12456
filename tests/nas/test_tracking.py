"""CHASE: the geometry of its task in closed form, members that targets price, searches that stop in time."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.core.errors import CheckpointError, DataError, RecipeError
from autocompress.hardware_sim import MacsModel, load_target
from autocompress.nas.spaces import operation_costs
from autocompress.nas.spaces.costs import arch_price
from autocompress.nas.supernet import (
    DARTS,
    GDAS,
    Adam,
    HoldOut,
    Method,
    SearchEpoch,
    SearchSettings,
    SupernetSearch,
)
from autocompress.nas.supernet.epoch import EpochRun
from autocompress.nas.tracking import (
    FrozenBackbone,
    MatchingData,
    SequenceSettings,
    Tracker,
    TrackingCell,
    correlation,
    digit_sprites,
    fashion_sprites,
    localise,
    matching_of,
    moving_sprites,
    train_backbone,
)
from autocompress.nas.tracking.matching import score
from autocompress.nas.tracking.scenery import divide, photo_tiles
from autocompress.trace import measure, shrink, trace
from autocompress.training import TrainSettings, fit, weights_digest

FEW = SequenceSettings((4, 4, 2, 2), num_frames=2)
CLEAR = replace(FEW, num_frames=16, num_distractors=0, noise=0.0, fading=0.0, backdrop=0.0)
FAST = Adam(0.1, (0.0, 0.999))
SHORT = SearchSettings(epochs=3, warmup_epochs=1, batch_size=8)


@pytest.fixture(scope="module")
def few() -> MatchingData:
    return moving_sprites(digit_sprites(), FEW, seed=0)


@pytest.fixture(scope="module")
def clear() -> MatchingData:
    return moving_sprites(digit_sprites(), CLEAR, seed=0)


@pytest.fixture(scope="module")
def backbone(few: MatchingData) -> FrozenBackbone:
    return train_backbone(few.centred, seed=0, widths=(2, 3), settings=TrainSettings(epochs=0))


@pytest.fixture(scope="module")
def space(backbone: FrozenBackbone) -> TrackingCell:
    return TrackingCell(backbone, (1, 20, 20), channels=3, embedding=4)


def only(space: TrackingCell, **edges: str) -> dict[str, str]:
    """A member with these edges alone, such as ``e0_2="skip_connect"``."""
    return dict.fromkeys(space.decisions, "none") | {f"cell.{k[1:]}": op for k, op in edges.items()}


# The task


def test_splits_share_no_digit_and_no_background(few: MatchingData) -> None:
    for a, b in itertools.combinations(few.splits.values(), 2):
        assert not a.sprites & b.sprites
        assert not a.tiles & b.tiles
    assert all(split.sprites and split.tiles for split in few.splits.values())


def test_parts_are_a_partition_in_which_every_class_keeps_its_share() -> None:
    labels = np.repeat(np.arange(4), (40, 80, 20, 60))
    parts = divide(labels, (0.5, 0.25, 0.25), seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    for part, share in zip(parts, (0.5, 0.25, 0.25), strict=True):
        assert np.bincount(labels[part]).tolist() == [int(share * n) for n in (40, 80, 20, 60)]


def test_backgrounds_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Photos:
        images = (np.repeat(np.arange(3500.0).reshape(50, 70)[:, :, None], 3, axis=2),)

    monkeypatch.setattr("sklearn.datasets.load_sample_images", Photos)
    tiles = photo_tiles(20)
    assert tiles.shape == (6, 20, 20)
    assert len(np.unique(tiles)) == tiles.size
    with pytest.raises(DataError, match="60x60"):
        photo_tiles(60)


def test_pairs_follow_from_the_seed_alone(few: MatchingData) -> None:
    np.random.seed(5)  # noqa: NPY002
    again, other = (moving_sprites(digit_sprites(), FEW, seed=s) for s in (0, 1))
    for name, split in few.splits.items():
        assert torch.equal(split.images.pixels, again.splits[name].images.pixels)
        assert not torch.equal(split.images.pixels, other.splits[name].images.pixels)


def test_the_target_is_where_the_offset_says_and_the_template_at_the_centre(clear: MatchingData) -> None:
    digits = {image.tobytes() for image in np.round(255 * digit_sprites().images).astype(np.uint8)}
    for split in clear.splits.values():
        for pixels, (row, column) in zip(split.images.pixels.numpy(), split.offsets.tolist(), strict=True):
            target = pixels[1, row : row + 8, column : column + 8]
            assert target.tobytes() in digits
            assert pixels[1].sum() == target.sum()
            assert np.array_equal(pixels[0, 6:14, 6:14], target)


def test_a_label_is_the_position_in_which_the_target_begins(few: MatchingData) -> None:
    for split in few.splits.values():
        rows, columns = (split.offsets // 2).T
        assert split.images.labels.tolist() == (7 * rows + columns).tolist()
        assert int(split.offsets.min()) >= 0
        assert int(split.offsets.max()) <= 12
    assert few.data.num_classes == 49


def test_an_exact_template_has_cosine_one_at_the_true_shift_and_less_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    search = torch.randn(25, 3, 8, 9, generator=generator, dtype=torch.float64)
    shifts = list(itertools.product(range(5), range(5)))
    template = torch.stack([s[:, i : i + 4, j : j + 4] for s, (i, j) in zip(search, shifts, strict=True)])
    found = correlation(3.7 * template, search)  # brightness does not matter
    assert found.shape == (25, 5, 6)
    for cosines, (i, j) in zip(found, shifts, strict=True):
        assert float(cosines[i, j]) == pytest.approx(1.0)
        assert divmod(int(cosines.argmax()), 6) == (i, j)
        assert float(cosines.flatten().sort().values[-2]) < 0.99
    assert torch.equal(correlation(0 * template, search), torch.zeros(25, 5, 6, dtype=torch.float64))


def test_averages_of_pixels_find_every_target_that_moved_by_whole_positions(clear: MatchingData) -> None:
    tracker = Tracker(nn.AvgPool2d(2), matching_of(clear))
    for split in clear.splits.values():
        even = (split.offsets % 2 == 0).all(1).numpy()
        images = split.images.take(np.flatnonzero(even))
        part = replace(split, images=images, offsets=split.offsets[torch.from_numpy(even)])
        assert len(images) >= 2
        found = localise(tracker, part, sprite_side=8)
        assert (found.exact, found.within_one) == (1.0, 1.0)
        assert found.centre_error == pytest.approx(0.5**0.5)  # the box is at the middle of two pixels
        assert found.mean_iou == pytest.approx(7.5**2 / (2 * 64 - 7.5**2))


def test_scores_count_positions_and_pixels(clear: MatchingData) -> None:
    split = clear.splits["test"]
    one = replace(split, images=split.images.take(np.array([0])), offsets=torch.tensor([[5, 6]]))
    right = 7 * 2 + 3
    expected = {right: (1, 1, 0.5, 0.5), right + 8: (1, 0, 1.5, 2.5), right + 2: (0, 0, 0.5, 4.5)}
    for found, (within, exact, down, along) in expected.items():
        figures = score(torch.tensor([found]), one, sprite_side=8)
        assert (figures.within_one, figures.exact) == (within, exact)
        assert figures.centre_error == pytest.approx((down**2 + along**2) ** 0.5)
        common = (8 - down) * (8 - along)
        assert figures.mean_iou == pytest.approx(common / (128 - common))


def test_fashion_sprites_are_means_of_four_pixels(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 251
    for prefix in ("train", "t10k"):
        header = struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 2) + b"\x00\x01")
    found = fashion_sprites(tmp_path)
    assert found.images[1, 3, 5] == pytest.approx(images[1, 6:8, 10:12].mean() / 255)
    assert (found.side, found.labels.tolist()) == (14, [0, 1])
    with pytest.raises(DataError, match="FashionMNIST"):
        fashion_sprites(tmp_path / "elsewhere")


def test_settings_out_of_range_are_refused_all_at_once(backbone: FrozenBackbone) -> None:
    with pytest.raises(RecipeError) as caught:
        SequenceSettings((1, 0, 1, 1), reach=3, noise=1.0, backdrop=2.0)
    assert len(caught.value.faults) == 4
    with pytest.raises(RecipeError) as caught:
        TrackingCell(backbone, (3, 20, 20), channels=0)
    assert len(caught.value.faults) == 2
    with pytest.raises(RecipeError, match="patience"):
        HoldOut([0, 1], patience=0)
    with pytest.raises(DataError, match="at least 2"):
        HoldOut([0])


# The space


def members(space: TrackingCell) -> list[dict[str, str]]:
    """The largest, none at all, one input alone, a dead edge, and some at random."""
    generator = np.random.default_rng(0)
    dead = only(space, e0_2="sep_conv_3x3", e1_3="max_pool_3x3")
    return [
        {name: ops[-1] for name, ops in space.decisions.items()},
        only(space),
        only(space, e0_2="skip_connect", e0_3="dil_conv_5x5", e2_3="avg_pool_3x3"),
        dead,
        *(space.random(generator) for _ in range(2)),
    ]


def test_every_member_has_the_graph_that_tracing_finds_so_that_targets_price_it(space: TrackingCell) -> None:
    for arch in members(space):
        network = space.build(arch, seed=0).eval()
        traced = trace(network, space.input_shape)
        assert space.graph(arch) == traced.graph
        assert not traced.graph.uncounted
        for target in ("jetson-tx2", "titan-x-pascal"):
            assert load_target(target)(space.graph(arch))["latency_ms"] > 0
        kept = {g.name: np.arange((g.size + 1) // 2) for g in traced.graph.prunable}
        predicted = MacsModel()(space.graph(arch).with_channels({n: len(k) for n, k in kept.items()}))
        small = measure(shrink(network, traced, kept), space.input_shape)
        assert small == {m: predicted[m] for m in ("macs", "params")}


def test_the_table_of_operations_prices_every_member_without_dead_edges(space: TrackingCell) -> None:
    costs, model = operation_costs(space, MacsModel(), "macs"), MacsModel()
    for arch in (members(space)[0], *members(space)[-2:]):
        assert arch_price(costs, space, arch) == pytest.approx(model(space.graph(arch))["macs"])


def test_counting_none_leaves_edges_out_where_it_is_likeliest(space: TrackingCell) -> None:
    ops = space.decisions["cell.0_2"]
    tables = {name: np.full(len(ops), 0.1) for name in space.decisions}
    tables["cell.0_2"][[0, 7]] = 0.9, 0.5
    tables["cell.1_3"][3] = tables["cell.2_3"][0] = 0.6
    tables["cell.0_3"][6] = 0.5
    counted, as_darts = space.derive(tables), replace(space, derives_none=False).derive(tables)
    assert counted["cell.0_2"] == "none"
    assert as_darts["cell.0_2"] == ops[7]
    assert [counted[f"cell.{i}_3"] for i in range(3)] == ["none", ops[3], "none"]
    assert [as_darts[f"cell.{i}_3"] for i in range(3)] == [ops[6], ops[3], "none"]


def test_operations_normalise_and_activate_after_their_convolutions(space: TrackingCell) -> None:
    network = space.build(only(space, e0_2="sep_conv_5x5", e1_2="dil_conv_3x3"), seed=0)
    kinds = [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    for edge, repeats in (("0_2", 2), ("1_2", 1)):
        operation = network.get_submodule(f"neck.edges.operations.{edge}")
        assert [type(layer) for layer in operation] == kinds * repeats


@pytest.mark.parametrize("depth", [1, 2])
def test_a_hand_made_module_is_the_narrowest_with_so_many_weights(space: TrackingCell, depth: int) -> None:
    def weights(width: int) -> int:
        adapters = (9 * 2 + 1) * 3 + (3 + 1) * 3
        branch = 9 * 3 * width + 2 * width + (depth - 1) * (9 * width**2 + 2 * width)
        return adapters + 2 * branch + 2 * width * 4

    for width in (2, 5):
        network = space.hand_made(depth, seed=0, at_least=weights(width - 1) + 1)
        assert network.num_trained == weights(width)
    assert trace(network.eval(), space.input_shape).graph.layers[-1].out_channels == 4


# The search


def chase(order: int = 1) -> DARTS:
    return DARTS(order, FAST, affine=True, max_skips=None, skip_dropout=0.6)


def search_of(data: MatchingData, method: Method, settings: SearchSettings = SHORT) -> SupernetSearch:
    return SupernetSearch(method, settings, task=matching_of(data))


def without_time(reports: tuple[SearchEpoch, ...]) -> list[SearchEpoch]:
    return [replace(report, seconds=0) for report in reports]


@pytest.mark.parametrize(
    ("losses", "kept", "over"),
    [
        ([None, None], 1, False),
        ([None, 2.0], 1, False),
        ([None, 2.0, 1.0], 2, False),
        ([None, 2.0, 1.0, 1.0], 3, False),
        ([None, 2.0, 1.0, 1.5], 2, True),
        ([3.0, 4.0], 0, True),
    ],
)
def test_the_hold_out_keeps_the_epoch_before_its_loss_rises(
    losses: list[float | None], kept: int, over: bool
) -> None:
    rule = HoldOut([0, 1])
    assert (rule.best(losses), rule.is_over(losses)) == (kept, over)


def test_a_patient_hold_out_waits_for_a_new_low() -> None:
    rule = HoldOut([0, 1], patience=2)
    assert not rule.is_over([2.0, 1.0, 1.5])
    assert rule.is_over([2.0, 1.0, 1.5, 1.2])
    assert rule.best([2.0, 1.0, 1.5, 1.2]) == 1


def test_the_search_ends_when_the_hold_out_rises_and_gives_the_member_before(
    few: MatchingData, space: TrackingCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, rates = iter((0.9, 0.7, 0.8, 0.1)), list[float]()
    drop = EpochRun._drop_skips
    monkeypatch.setattr(EpochRun, "_holdout_loss", lambda self, epoch: next(script))
    monkeypatch.setattr(EpochRun, "_drop_skips", lambda self, rate: (rates.append(rate), drop(self, rate))[1])
    search = search_of(few, chase(), replace(SHORT, epochs=6))
    result = search(space, few.data, seed=0, holdout=HoldOut(few.splits["holdout"].images))
    assert [report.holdout_loss for report in result.reports] == [None, 0.9, 0.7, 0.8]
    assert (result.epoch, result.stopped_early) == (2, True)
    assert result.arch == result.reports[2].arch
    assert rates == pytest.approx([0.6 * (1 - epoch / 6) for epoch in range(4)])


@pytest.mark.parametrize("method", [chase(1), chase(2), GDAS(alpha=FAST)], ids=["first", "second", "gdas"])
def test_a_search_cut_short_and_repeated_equals_one_that_was_not(
    few: MatchingData, space: TrackingCell, method: Method, tmp_path: Path
) -> None:
    search, holdout = search_of(few, method), HoldOut(few.splits["holdout"].images, patience=9)
    straight = search(space, few.data, seed=1, holdout=holdout)

    def kill(report: SearchEpoch) -> None:
        if report.epoch == 1:
            raise KeyboardInterrupt

    path = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        search(space, few.data, seed=1, holdout=holdout, checkpoint=path, on_epoch=kill)
    resumed = search(space, few.data, seed=1, holdout=holdout, checkpoint=path)
    assert resumed.arch == straight.arch == straight.reports[straight.epoch].arch
    assert without_time(resumed.reports) == without_time(straight.reports)
    assert weights_digest(resumed.supernet) == weights_digest(straight.supernet)
    for name, alpha in straight.supernet.alphas.items():
        assert torch.equal(alpha, resumed.supernet.alphas[name])
    losses = [report.holdout_loss for report in straight.reports]
    assert losses[0] is None
    assert straight.epoch <= len(losses) - 1
    assert losses[straight.epoch] == min(loss for loss in losses if loss is not None)
    with pytest.raises(CheckpointError, match="holdout"):
        search(space, few.data, seed=1, holdout=HoldOut(holdout.samples), checkpoint=path)


def test_neither_search_nor_training_moves_the_backbone(few: MatchingData, space: TrackingCell) -> None:
    before = weights_digest(space.backbone.network)
    result = search_of(few, chase(2), replace(SHORT, epochs=2))(space, few.data, seed=0)
    network = space.build(result.arch, seed=0)
    start = weights_digest(network)
    fit(Tracker(network, matching_of(few)), few.data, TrainSettings(epochs=1, batch_size=8), seed=0)
    assert weights_digest(network) != start
    for part in (space.backbone.network, network.backbone, result.supernet.network.backbone):
        assert weights_digest(part) == before


def test_data_that_does_not_fit_the_space_is_refused_before_any_work(few: MatchingData) -> None:
    wide = TrackingCell(train_backbone(few.centred, seed=0, settings=TrainSettings(epochs=0)), (1, 24, 24))
    frames = replace(few.data, input_shape=(1, 20, 20), num_classes=10)
    with pytest.raises(DataError) as caught:
        search_of(few, chase())(wide, frames, seed=0)
    for fault in (r"must be pairs", "(1, 24, 24)", "49 positions", "has 10"):
        assert fault in str(caught.value)
