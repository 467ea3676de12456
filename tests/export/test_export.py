from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.core.errors import DataError, ExportError, RecipeError
from autocompress.export import (
    Latency,
    check_parity,
    count_int8,
    export_onnx,
    export_static_int8,
    latency,
    measure_latency,
)
from autocompress.export.session import open_session, run_session

SHAPE = (3, 32, 32)
Alter = Callable[[onnx.ModelProto], None]


def _conv(inputs: int, outputs: int, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), nn.ReLU()]


def _with_statistics(model: nn.Module) -> nn.Module:
    """The model with BatchNorm statistics and affine weights far from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
    return model


def _plain() -> nn.Module:
    return nn.Sequential(*_conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def _vgg_like() -> nn.Module:
    """Pools 32x32 to 4x4, then asks for 3x3: no factor of the input, as VGG does at this size."""
    body = [*_conv(3, 8), nn.MaxPool2d(4), *_conv(8, 16), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16 * 9, 10))


def _grouped() -> nn.Module:
    body = [*_conv(3, 8), *_conv(8, 8, groups=8), *_conv(8, 16, groups=2), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 10))


class _Linear(nn.Module):
    """The images' first pixels as logits, plus a bias."""

    def __init__(self, bias: list[float]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : len(self.bias)] + self.bias


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = _with_statistics(_plain())
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "plain.onnx", input_shape=SHAPE)


def _altered(source: Path, target: Path, alter: Alter) -> Path:
    proto = onnx.load(source)
    alter(proto)
    onnx.save(proto, target)
    return target


def _edit_weights(change: Callable[[np.ndarray], np.ndarray]) -> Alter:
    def alter(proto: onnx.ModelProto) -> None:
        tensor = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))

    return alter


@pytest.mark.parametrize("build", [_vgg_like, _grouped])
def test_exported_logits_equal_pytorch_at_any_batch_size(
    build: Callable[[], nn.Module], tmp_path: Path, images: Tensor
) -> None:
    model = _with_statistics(build())
    parity = check_parity(model, export_onnx(model, tmp_path / "m.onnx", input_shape=SHAPE), images)
    assert parity.max_rel_diff < 1e-5
    assert parity.top1_agreement == 1.0
    assert parity.num_images == len(images)


def test_batch_normalisation_is_folded_into_the_convolution(plain: tuple[nn.Module, Path]) -> None:
    operators = [node.op_type for node in onnx.load(plain[1]).graph.node]
    assert "Conv" in operators
    assert "BatchNormalization" not in operators


def test_file_holds_little_beside_the_weights_and_no_source_paths(plain: tuple[nn.Module, Path]) -> None:
    model, path = plain
    content = path.read_bytes()
    num_weight_bytes = 4 * sum(p.numel() for p in model.parameters())
    # Six nodes of a few hundred bytes at most; stack traces alone would take several times that.
    assert len(content) < num_weight_bytes + 6 * 400
    assert str(Path(torch.__file__).parent).encode() not in content
    assert Path(__file__).name.encode() not in content


def test_file_carries_the_opset_and_an_ir_version_no_newer_than_it_needs(
    plain: tuple[nn.Module, Path],
) -> None:
    proto = onnx.load(plain[1])
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    # ONNX's version table: opset 18 came with ONNX 1.13, whose IR version is 8.
    assert proto.ir_version == 8


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = _plain().train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "m.onnx", input_shape=SHAPE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_export_says_nothing_and_restores_the_loggers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    talker = logging.getLogger("torch.onnx")
    level = talker.level
    export_onnx(_plain(), tmp_path / "m.onnx", input_shape=SHAPE)
    assert capfd.readouterr() == ("", "")
    assert talker.level == level


@pytest.mark.parametrize("opset", [7, 17, 999])
def test_an_opset_the_exporter_cannot_write_is_refused_and_leaves_no_file(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"between 18 .* got {opset}; use opset=18"):
        export_onnx(_plain(), tmp_path / "m.onnx", input_shape=SHAPE, opset=opset)
    assert list(tmp_path.iterdir()) == []


class _Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


class _TwoOutputs(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean(dim=(2, 3)), images.amax(dim=(2, 3))


class _FixedBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(2, 3 * 32 * 32)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_Branches(), "Python branch"),
        (_TwoOutputs(), "returns 2"),
        (_FixedBatch(), "fixes its batch size to 2"),
    ],
)
def test_a_failed_export_names_the_remedy_and_keeps_the_old_file(
    model: nn.Module, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=words):
        export_onnx(model, path, input_shape=SHAPE)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_a_missing_folder_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Check the folder"):
        export_onnx(_plain(), tmp_path / "absent" / "m.onnx", input_shape=SHAPE)


def _fix_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 6


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (_edit_weights(lambda w: w * 1.02), "disagrees with PyTorch"),
        (_edit_weights(lambda w: np.full_like(w, np.nan)), "not finite"),
        (_fix_batch, "dynamic batch"),
    ],
)
def test_an_altered_file_is_found(
    alter: Alter, words: str, plain: tuple[nn.Module, Path], tmp_path: Path, images: Tensor
) -> None:
    model, path = plain
    with pytest.raises(ExportError, match=words):
        check_parity(model, _altered(path, tmp_path / "altered.onnx", alter), images)


def test_a_truncated_file_is_an_export_error(
    plain: tuple[nn.Module, Path], tmp_path: Path, images: Tensor
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(plain[1].read_bytes()[:500])
    with pytest.raises(ExportError, match="cannot read"):
        check_parity(plain[0], broken, images)


def test_a_network_with_nan_weights_is_not_blamed_on_the_file(
    plain: tuple[nn.Module, Path], images: Tensor
) -> None:
    broken = copy.deepcopy(plain[0])
    nn.init.constant_(broken[-1].weight, float("nan"))
    with pytest.raises(ExportError, match="PyTorch's logits are not finite"):
        check_parity(broken, plain[1], images)


@pytest.mark.parametrize(("margin", "tied"), [(0.5, True), (1.5, False)])
def test_top1_may_differ_only_where_pytorch_holds_the_two_best_equal(
    margin: float, tied: bool, tmp_path: Path
) -> None:
    """Both logits move by 0.9 tolerances towards each other, which swaps margins of up to 1.8."""
    tolerance = 1e-2
    # Logits span [-1, 0]: the range is 1 and a tolerance is 1e-2.
    model = _Linear([0.0, -margin * tolerance, -1.0])
    moved = _Linear([-0.9 * tolerance, (0.9 - margin) * tolerance, -1.0])
    path = export_onnx(moved, tmp_path / "m.onnx", input_shape=SHAPE)
    images = torch.zeros(4, *SHAPE)
    if tied:
        parity = check_parity(model, path, images, tolerance=tolerance)
        assert parity.top1_agreement == 0.0
        assert parity.max_rel_diff == pytest.approx(0.9 * tolerance, rel=1e-4)
    else:
        with pytest.raises(ExportError, match="4 of 4 images"):
            check_parity(model, path, images, tolerance=tolerance)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, *SHAPE), torch.zeros(*SHAPE), torch.full((2, *SHAPE), float("inf"))]
)
def test_images_that_could_not_show_a_difference_are_refused(
    images: Tensor, plain: tuple[nn.Module, Path]
) -> None:
    with pytest.raises(DataError, match="at least two finite images"):
        check_parity(*plain, images)


@pytest.mark.parametrize(("threads", "name"), [(1, "thread_time_ns"), (2, "perf_counter_ns")])
def test_files_take_turns_and_warm_up_runs_are_not_counted(
    plain: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, threads: int, name: str
) -> None:
    clock, order = [0], []

    def slower_each_time(session: object, image: np.ndarray) -> None:
        order.append(session)
        clock[0] += 1_000_000 * len(order)

    monkeypatch.setattr(latency, "run_session", slower_each_time)
    monkeypatch.setattr(latency.time, name, lambda: clock[0])
    measured = measure_latency({"a": plain[1], "b": plain[1]}, input_shape=SHAPE, runs=11, threads=threads)
    # Five warm-up turns are ten runs; then a takes 11, 13, ..., 31 ms and b 12, 14, ..., 32 ms.
    assert measured == {"a": Latency(21.0, 13.0, 29.0, 11), "b": Latency(22.0, 14.0, 30.0, 11)}
    assert order == [order[0], order[1]] * 16
    assert order[0] is not order[1]


def test_measured_percentiles_are_in_order(plain: tuple[nn.Module, Path]) -> None:
    measured = measure_latency({"only": plain[1]}, input_shape=SHAPE, runs=7)["only"]
    assert 0 < measured.p10_ms <= measured.median_ms <= measured.p90_ms


def test_latency_reports_all_faults_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        measure_latency({}, input_shape=SHAPE, runs=0, threads=0)
    assert len(caught.value.faults) == 3


def test_latency_of_another_image_size_is_an_export_error(plain: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ExportError, match="32"):
        measure_latency({"a": plain[1]}, input_shape=(3, 16, 16), runs=1)


def test_importing_the_package_loads_neither_onnx_nor_its_runtime() -> None:
    heavy = "{'onnx', 'onnxruntime', 'onnxscript'}"
    code = f"import sys, autocompress.export; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("build", [_vgg_like, _grouped])
def test_the_runtimes_own_8_bits_run_every_convolution_on_integers(
    build: Callable[[], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, shape = _with_statistics(build()).eval(), (3, 32, 32)
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    source = export_onnx(model, tmp_path / "float.onnx", input_shape=shape)
    caplog.clear()
    path = export_static_int8(source, tmp_path / "int8.onnx", images)
    assert not caplog.records
    on_integers, convolutions = count_int8(path)
    assert on_integers == convolutions == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    got = run_session(open_session(path), images.numpy())
    expected = run_session(open_session(source), images.numpy())
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    assert logging.root.manager.disable == logging.NOTSET


def test_a_file_that_cannot_be_quantised_is_an_export_error(tmp_path: Path, images: Tensor) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no file")
    with pytest.raises(ExportError, match="cannot quantise"):
        export_static_int8(tmp_path / "broken.onnx", tmp_path / "int8.onnx", images)
