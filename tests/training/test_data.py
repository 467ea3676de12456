"""Splits, augmentation, readers and batches."""

from __future__ import annotations

import gzip
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from autocompress.core.errors import DataError, RecipeError
from autocompress.training import (
    Augment,
    Images,
    Samples,
    batches,
    from_datasets,
    load_data,
    training_images,
)
from autocompress.training.batches import spread
from autocompress.training.data import stratified


class _Listed(Dataset[tuple[Tensor, int]]):
    """Image i is filled with i; no attribute gives its labels away."""

    def __init__(self, kinds: list[int], shape: tuple[int, ...] = (1, 2, 2)) -> None:
        self.kinds, self.shape = kinds, shape

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full(self.shape, float(index)), self.kinds[index]


def _numbers(dataset: Samples) -> list[int]:
    return [int(dataset[i][0].flatten()[0]) for i in range(len(dataset))]


def _cifar_arrays(num: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, num, 32, 32, 3), dtype=np.uint8)
    y = np.arange(num) % 10
    return {"x_train": x[0], "y_train": y, "x_test": x[1], "y_test": y}


def test_digits_are_split_70_10_20_and_the_test_part_does_not_depend_on_the_seed() -> None:
    one, other = load_data("digits"), load_data("digits", seed=5)
    assert [len(s) for s in (one.train, one.search, one.test)] == [1258, 180, 359]
    assert torch.equal(one.test.pixels, other.test.pixels)
    assert not torch.equal(one.search.pixels, other.search.pixels)
    assert (one.input_shape, one.num_classes) == ((1, 8, 8), 10)
    # sklearn's digits hold integers from 0 to 16.
    scaled = torch.cat([s.pixels for s in (one.train, one.search, one.test)]) * 16
    assert torch.equal(scaled, scaled.round())
    assert (scaled.min(), scaled.max()) == (0, 16)


def test_the_search_split_and_the_training_split_share_no_sample_and_leave_none_out() -> None:
    kinds = [0, 1, 1, 1] * 25
    data = from_datasets(_Listed(kinds), _Listed([0, 1]), search_size=20, seed=3)
    train, search = _numbers(data.train), _numbers(data.search)
    assert sorted(train + search) == list(range(100))
    assert [kinds[i] for i in search].count(0) == 5
    assert _numbers(data.test) == [0, 1]


@pytest.mark.parametrize("size", [1, 7, 50, 99])
def test_stratified_gives_each_class_its_share_to_within_one(size: int) -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    chosen = stratified(labels, size, seed=1)
    assert len(set(chosen.tolist())) == len(chosen) == size
    for kind, count in ((0, 60), (1, 30), (2, 10)):
        assert abs((labels[chosen] == kind).sum() - size * count / 100) < 1


def test_train_size_keeps_a_stratified_part_of_what_remains() -> None:
    data = load_data("digits", search_size=0.2, train_size=100, seed=2)
    assert (len(data.search), len(data.train)) == (round(0.2 * (1797 - 359)), 100)
    counts = torch.bincount(data.train.labels, minlength=10)
    assert counts.min() >= 9
    assert counts.max() <= 11


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"search_size": 1.5}, r"in \(0, 1\), got 1.5"),
        ({"search_size": 0}, "1 to 1437 of 1438, got 0"),
        ({"search_size": 1438}, "1 to 1437 of 1438, got 1438"),
        ({"train_size": 10**6}, "what the search split leaves"),
        ({"train_size": 0}, "train_size must be 1 to"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"std": (0.0,)}, "std must be 1 finite positive"),
        ({"mean": (0.0, 0.0)}, "mean must be 1 finite"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_data("digits", **sizes)


def test_an_unknown_data_set_lists_close_names() -> None:
    with pytest.raises(RecipeError, match="did you mean 'cifar10'"):
        load_data("cifar")


def test_normalisation_is_per_channel_and_on_the_unit_scale() -> None:
    pixels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).reshape(1, 2, 1, 2)
    images = Images(pixels, torch.zeros(1, dtype=torch.int64), mean=(0.5, 0.0), std=(0.5, 2.0))
    x, y = images[0]
    assert torch.allclose(x, torch.tensor([[[-1.0, -0.6]], [[0.2, 0.5]]]))
    assert (y, type(y)) == (0, int)


def test_every_augmented_image_is_a_crop_of_the_padded_image_or_its_mirror() -> None:
    pixels = torch.arange(1, 10, dtype=torch.float32).reshape(1, 1, 3, 3)
    images = Images(pixels, torch.zeros(1, dtype=torch.int64), augment=Augment(pad=1, flip=True))
    padded = torch.nn.functional.pad(pixels[0, 0], (1, 1, 1, 1))
    crops = [padded[r : r + 3, c : c + 3] for r in range(3) for c in range(3)]
    allowed = {tuple(v.flatten().tolist()) for crop in crops for v in (crop, crop.flip(1))}
    drawn, _ = images.batch(torch.zeros(2000, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert {tuple(x.flatten().tolist()) for x in drawn} == allowed


def test_images_in_order_are_never_augmented() -> None:
    pixels = torch.rand(6, 1, 4, 4)
    images = Images(pixels, torch.arange(6), augment=Augment())
    assert torch.equal(torch.cat([x for x, _ in batches(images, 4)]), pixels)


def test_order_and_augmentation_follow_from_seed_and_epoch_alone() -> None:
    images = Images(torch.rand(50, 1, 8, 8), torch.arange(50), augment=Augment(pad=2))

    def epoch(seed: int, epoch: int) -> Tensor:
        torch.rand(3)  # the global generator must not matter
        return torch.cat([x for x, _ in batches(images, 16, seed=seed, epoch=epoch)])

    assert torch.equal(epoch(1, 0), epoch(1, 0))
    assert not torch.equal(epoch(1, 0), epoch(1, 1))
    assert not torch.equal(epoch(1, 0), epoch(2, 0))
    labels = torch.cat([y for _, y in batches(images, 16, seed=1)])
    assert sorted(labels.tolist()) == list(range(50))


def test_a_last_training_batch_of_one_sample_is_left_out() -> None:
    images = Images(torch.rand(9, 1, 2, 2), torch.arange(9))
    assert [len(y) for _, y in batches(images, 4, seed=0)] == [4, 4]
    assert [len(y) for _, y in batches(images, 4)] == [4, 4, 1]


class _Noisy(_Listed):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(()) + random.random() + np.random.random()  # noqa: NPY002
        return torch.full(self.shape, float(noise)), self.kinds[index]


def test_random_transforms_of_own_data_sets_repeat_and_leave_the_global_generators_alone() -> None:
    dataset = _Noisy([0, 1] * 10)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    runs = [torch.cat([x for x, _ in batches(dataset, 8, seed=4, epoch=e)]) for e in (2, 2, 3)]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len(runs[0].unique()) == 20
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_spread_samples_all_classes_of_sorted_data() -> None:
    images = Images(torch.rand(100, 1, 1, 1), torch.arange(100) // 10)
    labels = torch.cat([y for _, y in spread(images, 7, limit=20)])
    assert torch.bincount(labels).tolist() == [2] * 10


class _Broken(_Listed):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 5:
            raise OSError("image file is truncated")
        return super().__getitem__(index)


def test_a_sample_that_cannot_be_read_is_named() -> None:
    with pytest.raises(
        DataError, match="sample 5 of _Broken cannot be read: OSError: image file is truncated"
    ):
        list(batches(_Broken([0] * 8), 4))


class _Returns(_Listed):
    def __init__(self, sample: object) -> None:
        super().__init__([0] * 20)
        self.sample = sample

    def __getitem__(self, index: int) -> object:
        return self.sample


_X = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (
            (np.zeros((2, 2)), 0),
            "float tensor of shape .C, H, W., got ndarray; add torchvision.transforms.ToTensor",
        ),
        ((torch.zeros(2, 2), 0), r"got torch.float32 \(2, 2\)"),
        ((torch.zeros(1, 2, 2, dtype=torch.uint8), 0), "got torch.uint8"),
        ((_X, 0.5), "must be an integer class index, got 0.5"),
        ((_X, torch.tensor([0, 1])), "one-hot"),
        (_X, "must be a pair"),
        ((_X, -1), r"must lie in \[0, 0\), got -1"),
    ],
)
def test_own_samples_of_the_wrong_kind_are_refused_with_the_remedy(sample: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        from_datasets(_Returns(sample), _Listed([0, 0]))


def test_own_data_sets_that_do_not_fit_together_are_refused() -> None:
    fine = _Listed([0, 1] * 10)
    with pytest.raises(DataError, match="the test split of 'own' is empty"):
        from_datasets(fine, _Listed([]))
    with pytest.raises(DataError, match="all images must have one shape"):
        from_datasets(fine, _Listed([0, 1], shape=(1, 3, 3)))
    with pytest.raises(DataError, match=r"must lie in \[0, 2\), got 0 to 9"):
        from_datasets(fine, Images(torch.zeros(10, 1, 2, 2), torch.arange(10)))


def test_a_users_factory_may_return_a_pair_or_a_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_data.py").write_text(
        "import torch\nfrom autocompress.training import Images, from_datasets\n"
        "def part(n): return Images(torch.rand(n, 1, 2, 2), torch.arange(n) % 2)\n"
        "def pair(root, seed): return part(20), part(6)\n"
        "def data(): return from_datasets(part(20), part(6), search_size=3)\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load_data("their_data:pair", search_size=5).search) == 5
    assert len(load_data("their_data:data").search) == 3
    with pytest.raises(RecipeError, match="search_size cannot be set"):
        load_data("their_data:data", search_size=5)
    with pytest.raises(DataError, match="must return a Data or a pair"):
        load_data("their_data:wrong")
    sys.modules.pop("their_data")


def _write_binary(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for split, names in (
        ("train", [f"data_batch_{i}.bin" for i in range(1, 6)]),
        ("test", ["test_batch.bin"]),
    ):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        records = np.concatenate(
            [y.astype(np.uint8)[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], axis=1
        )
        for name, part in zip(names, np.array_split(records, len(names)), strict=True):
            part.tofile(folder / name)


def test_both_layouts_of_cifar10_give_the_same_images(tmp_path: Path) -> None:
    arrays = _cifar_arrays()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "a" / "cifar10.npz", **arrays)
    _write_binary(tmp_path / "b" / "cifar-10-batches-bin", arrays)
    one, other = (load_data("cifar10", root=tmp_path / part) for part in ("a", "b"))
    for split in ("train", "search", "test"):
        assert torch.equal(getattr(one, split).pixels, getattr(other, split).pixels)
        assert torch.equal(getattr(one, split).labels, getattr(other, split).labels)
    assert (len(one.train), len(one.search)) == (36, 4)
    # The test split keeps the official order; red of the first image, normalised by ImageNet's figures.
    red = torch.from_numpy(arrays["x_test"][0, :, :, 0]) / 255
    assert torch.allclose(one.test[0][0][0], (red - 0.485) / 0.229)


def test_damaged_cifar_files_are_refused(tmp_path: Path) -> None:
    arrays = _cifar_arrays()
    path = tmp_path / "cifar10.npz"
    with pytest.raises(
        DataError, match=r"cifar10\.npz.*cifar-10-batches-bin.*cifar-10-batches-py.*download: true"
    ):
        load_data("cifar10", root=tmp_path)
    np.savez(path, **{**arrays, "y_train": arrays["y_train"] + 5})
    with pytest.raises(DataError, match=r"must lie in \[0, 10\), got 5 to 14"):
        load_data("cifar10", root=tmp_path)
    np.savez(
        path, **{**arrays, "x_test": arrays["x_test"].astype(np.float32), "y_train": arrays["y_train"][:-1]}
    )
    with pytest.raises(DataError, match=r"(?s)y_train must be 40 integers.*x_test must be uint8"):
        load_data("cifar10", root=tmp_path)
    np.savez(path, x_train=arrays["x_train"])
    with pytest.raises(DataError, match="must hold x_train, y_train, x_test, y_test"):
        load_data("cifar10", root=tmp_path)
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="is damaged"):
        load_data("cifar10", root=tmp_path)
    path.unlink()
    _write_binary(tmp_path / "cifar-10-batches-bin", arrays)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    cut = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"(?s)data_batch_2.bin is missing.*data_batch_4.bin must be whole records"
    ):
        load_data("cifar10", root=tmp_path)


def _idx(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def test_fashion_mnist_is_read_packed_or_not_and_refused_when_truncated(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    with pytest.raises(DataError, match=r"neither .*train-images-idx3-ubyte nor"):
        load_data("fashion_mnist", root=tmp_path)
    raw.mkdir(parents=True)
    x = np.random.default_rng(0).integers(0, 256, (20, 28, 28))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(x))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(np.arange(20) % 10)))
    data = load_data("fashion_mnist", root=tmp_path)
    assert torch.equal(data.test.pixels[:, 0], torch.from_numpy(x).to(torch.uint8))
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    for content in (_idx(x)[:-1], _idx(x)[:6], b"\0\0\r\3" + _idx(x)[4:], b""):
        (raw / "t10k-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte is truncated or not an IDX file"):
            load_data("fashion_mnist", root=tmp_path)


def _image_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, num in (("train", 6), ("val", 2)):
        for kind in ("cat", "dog"):
            (root / part / kind).mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / kind / f"{i}.png")
    return root


def test_an_image_folder_is_split_and_cropped_to_224(tmp_path: Path) -> None:
    data = load_data("imagefolder", root=_image_folder(tmp_path), search_size=4)
    assert [len(s) for s in (data.train, data.search, data.test)] == [8, 4, 4]
    assert (data.num_classes, data.input_shape) == (2, (3, 224, 224))
    x, y = next(batches(data.search, 4))
    assert x.shape == (4, 3, 224, 224)
    assert sorted(y.tolist()) == [0, 0, 1, 1]
    assert torch.equal(x, next(batches(data.search, 4))[0])  # not augmented
    assert not set(data.train.indices) & set(data.search.indices)


def test_broken_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold train and val"):
        load_data("imagefolder", root=tmp_path)
    root = _image_folder(tmp_path)
    with pytest.raises(DataError, match=r"must have 1000 class folders.* has 2; use imagefolder"):
        load_data("imagenet", root=root)
    (root / "train" / "dog" / "0.png").write_text("not an image")
    data = load_data("imagefolder", root=root)
    with pytest.raises(DataError, match=r"cannot be read: UnidentifiedImageError.*0\.png"):
        list(batches(data.train, 4, seed=0)) + list(batches(data.search, 4))
    (root / "val" / "cow").mkdir()
    with pytest.raises(DataError, match="every class folder needs an image"):
        load_data("imagefolder", root=root)
    Image.new("RGB", (4, 4)).save(root / "val" / "cow" / "0.png")
    with pytest.raises(DataError, match="same class folders; only in one: cow"):
        load_data("imagefolder", root=root)


def test_training_images_are_those_of_the_first_epoch_augmented() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (50, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.zeros(50).long(), mean=(0.0,), std=(1.0,), augment=Augment(pad=2))
    drawn = training_images(images, 20, batch_size=16, seed=3)
    expected = [x for x, _ in batches(images, 16, seed=3)]
    assert [len(x) for x in drawn] == [16, 16]
    assert all(torch.equal(x, y) for x, y in zip(drawn, expected, strict=False))
    # Crops of padded images have borders of zeros, which no image itself has.
    assert bool((torch.cat(drawn) == 0).any())
    assert sum(len(x) for x in training_images(images, 1000, batch_size=16, seed=3)) == 50
