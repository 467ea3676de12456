"""Weights on disk."""

from __future__ import annotations

import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress import zoo
from autocompress.core.errors import CheckpointError, RunDirectoryError


def _net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def _same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def _refused(path: Path, says: str) -> None:
    model, before = _net(1), _net(1)
    with pytest.raises(CheckpointError, match=says) as caught:
        zoo.load_weights(model, path)
    assert str(path) in str(caught.value)
    assert _same(model, before)


@pytest.mark.parametrize(
    ("name", "file", "layers"),
    [
        ("resnet20", "cifar10_resnet20_akamaster", 97),
        ("resnet56", "cifar10_resnet56_akamaster", 277),
        ("resnet20_b", "cifar10_resnet20B_distiller_dense", 107),
    ],
)
def test_public_checkpoints_load_name_by_name(shared: Path, name: str, file: str, layers: int) -> None:
    path = shared / "data" / "checkpoints" / f"{file}.pth"
    model = zoo.build(name, num_classes=10)
    zoo.load_weights(model, path)
    stored = torch.load(path, weights_only=True)
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert own.keys() == stored.keys()
    assert len(own) == layers
    assert all(torch.equal(own[k], stored[k]) for k in own)


def test_saved_weights_come_back(tmp_path: Path) -> None:
    zoo.save_weights(_net(0), tmp_path / "new" / "w.safetensors")
    model = _net(1)
    zoo.load_weights(model, tmp_path / "new" / "w.safetensors")
    assert _same(model, _net(0))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_tied_weights_come_back(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    one, other = tied(), tied()
    zoo.save_weights(one, tmp_path / "w.safetensors")
    zoo.load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other[0].weight, one[0].weight)
    assert other[1].weight is other[0].weight


@pytest.mark.parametrize("key", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("old_format", [False, True])
def test_usual_wrappings_are_taken_off(
    tmp_path: Path, key: str | None, prefix: str, old_format: bool
) -> None:
    state: dict[str, object] = {prefix + k: v for k, v in _net(0).state_dict().items()}
    content = {key: state, "epoch": 3} if key else state
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old_format)
    model = _net(1)
    zoo.load_weights(model, tmp_path / "w.pth")
    assert _same(model, _net(0))


def test_all_names_and_shapes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = _net(0).state_dict()
    del state["3.bias"]
    state["4.extra"] = torch.zeros(1)
    state["3.weight"] = torch.zeros(3, 5)
    state["0.bias"] = torch.zeros(4, dtype=torch.int8)
    save_file(state, tmp_path / "w.safetensors")
    for says in (
        "3.bias is missing",
        "4.extra is not in",
        r"shape \(3, 5\).* is \(3, 4\)",
        "0.bias is torch.int8",
    ):
        _refused(tmp_path / "w.safetensors", says)


def test_long_lists_of_faults_are_shortened(tmp_path: Path) -> None:
    save_file({f"x{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.safetensors")
    # 20 unknown and 8 missing, of which 8 are shown; the counter is optional.
    _refused(tmp_path / "w.safetensors", "and 20 more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = {k: v.double() if v.is_floating_point() else v for k, v in _net(0).state_dict().items()}
    state["3.weight"][1, 2] = value  # 1e300 is not finite once it is a float32
    torch.save(state, tmp_path / "w.pth")
    _refused(tmp_path / "w.pth", r"3\.weight has values that are not finite")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(_net(0).state_dict(), path)
    else:
        zoo.save_weights(_net(0), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    _refused(path, "truncated|damaged")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    _refused(tmp_path / "none.pth", "no checkpoint at")


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, old_format: bool) -> None:
    torch.save(
        {"x": _Attack(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=not old_format
    )
    _refused(tmp_path / "w.pth", "could run code")
    (tmp_path / "p.pth").write_bytes(pickle.dumps(_Attack(tmp_path / "ran"), protocol=2))
    _refused(tmp_path / "p.pth", "could run code")
    assert not (tmp_path / "ran").exists()


def test_values_that_are_not_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"a": [1, 2], "b": torch.zeros(1)}, tmp_path / "w.pth")
    _refused(tmp_path / "w.pth", "'a' is list, not a tensor")
    torch.save(torch.zeros(2), tmp_path / "t.pth")
    _refused(tmp_path / "t.pth", "must hold a state_dict")


def test_a_small_file_that_claims_a_huge_tensor_is_refused_by_its_shape(tmp_path: Path) -> None:
    state: dict[str, Tensor] = dict(_net(0).state_dict())
    state["3.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(state, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 10_000
    _refused(tmp_path / "w.pth", r"3\.weight has shape \(1000000, 1000000\)")


def test_compressed_members_are_refused_before_they_expand(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(2**20))
    _refused(tmp_path / "w.pth", "compressed member")


def test_a_file_far_larger_than_the_network_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "w.pth").open("wb") as file:
        file.truncate(65 * 2**20)  # sparse: takes no space
    _refused(tmp_path / "w.pth", "more than the")


def test_a_disk_that_fills_up_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    zoo.save_weights(_net(0), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(RunDirectoryError, match="Free some space"):
            zoo.save_weights(_net(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    model = _net(1)
    zoo.load_weights(model, path)
    assert _same(model, _net(0))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
