"""Packed weights: few bits on disk, the same numbers when read, and nothing believed that does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from digit_networks import MIXED, SHAPE, digit_images, digits_vgg, quantised, unseen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.core import Bits, Plan
from autocompress.core.errors import CheckpointError, ExportError
from autocompress.export import (
    CodebookWeight,
    GridWeight,
    describe_bits,
    packed_weights,
    read_packed,
    write_bit_json,
    write_packed,
)
from autocompress.quant.kmeans import CodebookTables

HEADER = 300  # bytes a tensor may take in the file's header


def _codebook(shape: tuple[int, ...], size: int, seed: int) -> CodebookWeight:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, size, shape, generator=generator)
    return CodebookWeight(indices, torch.randn(size, generator=generator))


def _grid(shape: tuple[int, ...], bits: int, seed: int) -> GridWeight:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, shape, generator=generator)
    if bits == 1:
        integers = integers * 2 + 1
    scale = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.1
    return GridWeight(integers, scale, bits)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(1, 256),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_weights_come_back_to_the_last_bit(
    tmp_path: Path, shape: list[int], size: int, bits: int, seed: int
) -> None:
    weights = {"a": _codebook(tuple(shape), size, seed), "b.c": _grid(tuple(shape), bits, seed)}
    rest = {"a.bias": torch.randn(3), "steps": torch.tensor(7), "none": torch.zeros(0)}
    state = read_packed(write_packed(tmp_path / "w.packed", weights, rest))
    assert state.keys() == {"a.weight", "b.c.weight", *rest}
    for name, wanted in {
        "a.weight": weights["a"].values,
        "b.c.weight": weights["b.c"].values,
        **rest,
    }.items():
        assert state[name].dtype == wanted.dtype
        assert torch.equal(state[name], wanted)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_a_size_only_plan_takes_its_bits_on_disk(bits: int, tmp_path: Path) -> None:
    model = digits_vgg()
    plan = Plan(bits={name: Bits(bits, 32) for name in CodebookTables(model).layers})
    books = {
        name: CodebookWeight(book.indices, book.centroids)
        for name, book in CodebookTables(model).codebooks(plan).items()
    }
    path = write_packed(tmp_path / "w.packed", books, model.state_dict())
    rest = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in books}
    packed = sum(math.ceil(book.indices.numel() * bits / 8) for book in books.values())
    tables = sum(4 * len(book.codebook) for book in books.values())
    others = sum(t.numel() * t.element_size() for t in rest.values())
    num_tensors = 2 * len(books) + len(rest)
    assert path.stat().st_size <= packed + tables + others + HEADER * num_tensors
    model_state = read_packed(path)
    assert all(torch.equal(model_state[f"{name}.weight"], book.values) for name, book in books.items())


def test_a_plan_of_4_bits_takes_half_the_file_of_one_of_8(tmp_path: Path) -> None:
    weights = {b: {"conv": _grid((256, 128, 3, 3), b, 0)} for b in (2, 4, 8)}
    size = {b: write_packed(tmp_path / f"{b}", w, {}).stat().st_size for b, w in weights.items()}
    assert size[4] / size[8] == pytest.approx(0.5, rel=0.01)
    assert size[2] / size[8] == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("bits", [MIXED, (Bits(1, 2), Bits(32, 8), Bits(12, 8), Bits(4, 32))], ids=str)
def test_a_brevitas_network_gives_the_same_logits_from_its_packed_file(
    bits: tuple[Bits, ...], tmp_path: Path
) -> None:
    net, plan = quantised(digits_vgg(), digit_images()[:64], bits)
    weights = packed_weights(net)
    assert weights.keys() == {name for name, b in plan.bits.items() if b.weight <= 8}
    state = read_packed(write_packed(tmp_path / "w.packed", weights, net.state_dict()))
    with torch.no_grad():
        wanted = net(unseen(8))
        assert state.keys() == net.state_dict().keys()
        net.load_state_dict(state)
        assert torch.equal(net(unseen(8)), wanted)


def test_codes_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    weights = {
        "a": CodebookWeight(torch.tensor([0, 4]), torch.zeros(4)),
        "b": GridWeight(torch.tensor([8]), torch.ones(1), 4),
        "c": GridWeight(torch.tensor([0]), torch.ones(1), 1),
        "d": GridWeight(torch.tensor([0]), torch.ones(1), 9),
        "e": CodebookWeight(torch.tensor([0]), torch.tensor([torch.nan])),
        "f": CodebookWeight(torch.tensor([0]), torch.zeros(257)),
    }
    with pytest.raises(ExportError) as caught:
        write_packed(tmp_path / "w.packed", weights, {})
    faults = str(caught.value).splitlines()
    assert [fault.split("'")[1] for fault in faults] == list("abcdef")
    assert "indices must be from 0 to 3, got 0 to 4" in faults[0]
    assert "integers must be from -8 to 7, got 8 to 8" in faults[1]
    assert not list(tmp_path.iterdir())


def _written(folder: Path) -> Path:
    weights = {"a": _codebook((4, 5), 6, 0), "b": _grid((4, 5), 3, 0)}
    return write_packed(folder / "w.packed", weights, {"a.bias": torch.ones(4)})


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    path = _written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated"):
        read_packed(path)


def test_any_flipped_bit_of_the_numbers_is_found(tmp_path: Path) -> None:
    path = _written(tmp_path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            read_packed(path)


def _forged(path: Path, tensors: dict[str, Tensor], layers: object) -> Path:
    """A file whose checksum is right and whose content is not."""
    from autocompress.export import packed_file

    description = json.dumps(layers)
    metadata = {
        "format": packed_file._FORMAT,
        "layers": description,
        "sha256": packed_file._digest(tensors, description),
    }
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    return path


_CODES = {"a.weight.codes": torch.zeros(3, dtype=torch.uint8)}
_BOOK = {"a.weight.codebook": torch.zeros(4)}
_PLAN = {"a": {"bits": 2, "shape": [3, 4]}}


@pytest.mark.parametrize(
    ("tensors", "layers"),
    [
        ({**_CODES, **_BOOK}, {"a": {"bits": 2, "shape": [10**6, 10**6]}}),
        ({**_CODES, **_BOOK}, {"a": {"bits": 2, "shape": [-3, -4]}}),
        ({**_CODES, **_BOOK}, {"a": {"bits": 0, "shape": [3, 4]}}),
        ({**_CODES, **_BOOK}, {"a": {"bits": 9, "shape": [3, 4]}}),
        ({**_CODES, **_BOOK}, {"a": {"shape": [3, 4]}}),
        ({**_CODES, **_BOOK}, [1, 2]),
        (_BOOK, _PLAN),
        (_CODES, _PLAN),
        ({**_CODES, **_BOOK, "a.weight.scale": torch.ones(1)}, _PLAN),
        ({**_CODES, "a.weight.codebook": torch.zeros(4, dtype=torch.float64)}, _PLAN),
        (
            {"a.weight.codes": torch.full((3,), 255, dtype=torch.uint8), "a.weight.codebook": torch.zeros(3)},
            _PLAN,
        ),
        ({**_CODES, "a.weight.scale": torch.ones(5)}, _PLAN),
        ({**_CODES, "a.weight.scale": torch.ones(2, 3, 4)}, _PLAN),
    ],
)
def test_contradictions_are_refused_even_with_a_right_checksum(
    tensors: dict[str, Tensor], layers: object, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError):
        read_packed(_forged(tmp_path / "w.packed", tensors, layers))


def test_other_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="no file of packed weights"):
        read_packed(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_packed(tmp_path / "absent")


def test_json_describes_the_grids_that_the_network_rounds_to(tmp_path: Path) -> None:
    net, plan = quantised(digits_vgg(), digit_images()[:64], MIXED)
    content = json.loads(write_bit_json(net, tmp_path / "bits.json", input_shape=SHAPE).read_text())
    assert content == describe_bits(net, input_shape=SHAPE)
    assert list(content["layers"]) == list(plan.bits)
    for name, bits in plan.bits.items():
        grids = content["layers"][name]
        assert (grids["weight"]["bits"], grids["input"]["bits"], grids["bias"]["bits"]) == (
            bits.weight,
            bits.act,
            32,
        )
        weight = net.get_submodule(name).quant_weight()
        scale = torch.tensor(grids["weight"]["scale"])
        assert torch.equal(scale, weight.scale.flatten())  # float32 survives the text
        integers = weight.value / weight.scale
        assert (
            grids["weight"]["low"]
            <= integers.round().min()
            <= integers.round().max()
            <= grids["weight"]["high"]
        )
        assert torch.equal(
            torch.tensor(grids["bias"]["scale"]), scale * torch.tensor(grids["input"]["scale"])
        )
    first = content["quantisers"]["x_quant8"]
    assert (first["low"], first["high"], first["signed"], first["zero_point"]) == (0, 255, False, [0])
    assert first["range"] == [0.0, pytest.approx(255 * first["scale"][0])]


def test_json_says_what_is_binary_shifted_or_float(tmp_path: Path) -> None:
    images = digit_images() - 0.3
    net, _ = quantised(digits_vgg(), images[:64], (Bits(1, 8), Bits(4, 32)), asymmetric=True)
    content = describe_bits(net, input_shape=SHAPE)
    first, second, *_ = content["layers"].values()
    assert (first["weight"]["low"], first["weight"]["high"], first["weight"]["signed"]) == (-1, 1, True)
    pixels = first["input"]
    zero, scale = pixels["zero_point"][0], pixels["scale"][0]
    assert 0 < zero < 255
    assert pixels["range"] == [pytest.approx(-zero * scale), pytest.approx((255 - zero) * scale)]
    assert second["input"] is None
    assert second["bias"] is None
    with pytest.raises(ExportError, match="no tensor of this network is quantised"):
        describe_bits(digits_vgg(), input_shape=SHAPE)
