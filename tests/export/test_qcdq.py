"""Quantised ONNX files: they hold Brevitas' integers, run on integers, and errors name the layer."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import TinyDenseNet, TinyMobileNet, TinyPadded, TinyResNet, TinyVGG, seeded
from onnx import TensorProto, numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn

from autocompress import zoo
from autocompress.core import Bits, Plan
from autocompress.core.errors import DataError, ExportError
from autocompress.export import check_quantised_parity, count_int8, export_onnx, export_qcdq
from autocompress.export.qcdq_file import _packed
from autocompress.export.qdq_network import qdq_network
from autocompress.export.session import open_session, run_session
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton, quantize

SHAPE = (1, 8, 8)
PLANS = {
    "eight": dict.fromkeys(("stem.0", "first.0", "first.3", "down", "head"), Bits(8, 8)),
    # The pooled stem is read at 3 and 8 bits; weights of 1, 2, 4 and 5 bits.
    "mixed": {
        "stem.0": Bits(5, 8),
        "first.0": Bits(4, 3),
        "first.3": Bits(2, 5),
        "down": Bits(1, 6),
        "head": Bits(8, 4),
    },
}


class Digits(nn.Module):
    """ReLU6, a max-pooling that two operations read, a depthwise convolution, a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.MaxPool2d(2)
        self.first = nn.Sequential(
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)),
        )
        self.down = nn.Conv2d(16, 24, 1, stride=2)
        self.head = nn.Linear(24 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.first(x)
        return self.head(torch.relu(self.down(x)).flatten(1))


@pytest.fixture(scope="module")
def images() -> Tensor:
    pixels, _ = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().reshape(-1, *SHAPE) / 16 - 0.3


@pytest.fixture(scope="module")
def tables(images: Tensor) -> QuantTables:
    """A network that knows its digits."""
    labels = torch.from_numpy(load_digits(return_X_y=True)[1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Digits()
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(120):
            rows = torch.randint(0, 1500, (64,))
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert float((model.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean()) > 0.9
    skeleton = Skeleton(model)
    return QuantTables(skeleton, Calibration(skeleton, [images[:200]], QuantSettings()))


Written = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def written(tables: QuantTables, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The Brevitas network and the file of a plan."""
    folder = tmp_path_factory.mktemp("qcdq")

    @cache
    def write(name: str) -> tuple[Any, Path]:
        net = quantize(tables, Plan(bits=PLANS[name]))
        return net, export_qcdq(net, folder / f"{name}.onnx", input_shape=SHAPE)

    return write


@pytest.mark.parametrize("plan", PLANS)
def test_every_layer_makes_the_integers_of_brevitas(plan: str, written: Written, images: Tensor) -> None:
    net, path = written(plan)
    parity = check_quantised_parity(net, path, images[1500:])
    # Images, pooled stem, first.0, first.3, sum and down; mixed bits read the pooled stem at 3 and 8 bits.
    assert parity.num_tensors == (6 if plan == "eight" else 7)
    assert parity.rounded_otherwise < 1e-4
    for outcome in (parity.as_written, parity.as_run):
        assert outcome.num_images == 297
        assert outcome.top1_agreement > 0.99


@pytest.mark.parametrize("plan", PLANS)
def test_all_convolutions_run_on_integers(plan: str, written: Written) -> None:
    assert count_int8(written(plan)[1]) == (4, 4)


def test_a_float_file_has_no_integer_convolution(tables: QuantTables, tmp_path: Path) -> None:
    path = export_onnx(tables.skeleton.graph_module, tmp_path / "f.onnx", input_shape=SHAPE)
    assert count_int8(path) == (0, 4)


def test_integer_kernels_can_be_switched_off(written: Written, tmp_path: Path) -> None:
    open_session(written("eight")[1], integer_kernels=False, write_optimised=tmp_path / "o.onnx")
    assert "QLinearConv" not in [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]


def _weights(path: Path) -> dict[str, onnx.TensorProto]:
    """Weight tensors by layer."""
    graph = onnx.load(path).graph
    return {
        tensor.name.split(".weight")[0]: tensor
        for tensor in graph.initializer
        if ".weight" in tensor.name and "scale" not in tensor.name and "zero" not in tensor.name
    }


def test_weights_are_whole_numbers_in_as_many_bits_as_they_need(written: Written) -> None:
    net, path = written("mixed")
    stored = _weights(path)
    kinds = {"first.0": TensorProto.INT4, "first.3": TensorProto.INT4, "down": TensorProto.INT4}
    for layer in PLANS["mixed"]:
        assert stored[layer].data_type == kinds.get(layer, TensorProto.INT8)
        weight = net.get_submodule(layer).quant_weight()
        wanted = (weight.value / weight.scale).round().detach().numpy()
        assert np.array_equal(numpy_helper.to_array(stored[layer]).astype(np.float32), wanted)
    assert len(stored["first.0"].raw_data) == 16 * 16 * 9 // 2


@pytest.mark.parametrize(("kind", "bits"), [(TensorProto.INT2, 2), (TensorProto.INT4, 4)])
def test_packing_is_that_of_onnx(kind: int, bits: int) -> None:
    half = 1 << (bits - 1)
    values = np.random.default_rng(0).integers(-half, half, 13).astype(np.int8)
    tensor = onnx.helper.make_tensor("w", kind, values.shape, _packed(values, bits).tobytes(), raw=True)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)


def test_an_older_opset_stores_bytes_and_computes_the_same(
    written: Written, images: Tensor, tmp_path: Path
) -> None:
    net, path = written("mixed")
    older = export_qcdq(net, tmp_path / "18.onnx", input_shape=SHAPE, opset=18)
    assert {tensor.data_type for tensor in _weights(older).values()} == {TensorProto.INT8}
    pixels = images[:20].numpy()
    assert np.array_equal(run_session(open_session(older), pixels), run_session(open_session(path), pixels))
    # ONNX's version table: opset 18 came with IR version 8, opset 21 with 10.
    assert (onnx.load(older).ir_version, onnx.load(path).ir_version) == (8, 10)


def test_the_file_is_small_and_holds_no_paths(written: Written) -> None:
    path = written("eight")[1]
    content = path.read_bytes()
    num_weights = sum(tensor.dims and int(np.prod(tensor.dims)) for tensor in _weights(path).values())
    assert len(content) < num_weights + 16_000
    assert str(Path(torch.__file__).parent).encode() not in content
    assert Path(__file__).name.encode() not in content
    proto = onnx.load(path)
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


def test_learned_ranges_are_written_also_beyond_the_clamp_in_front(
    tables: QuantTables, images: Tensor, tmp_path: Path
) -> None:
    """After training a range may reach beyond ReLU6's 6, which then has to be clipped in the integers."""
    net = quantize(tables, Plan(bits=PLANS["eight"]))
    scales = {name: p for name, p in net.named_parameters() if "act_quant" in name}
    assert len(scales) == 6
    with torch.no_grad():
        for factor, scale in zip((0.7, 9.0, 9.0, 0.8, 1.3, 0.6), scales.values(), strict=True):
            scale.mul_(factor)
    path = export_qcdq(net, tmp_path / "m.onnx", input_shape=SHAPE)
    parity = check_quantised_parity(net, path, images[:100])
    assert parity.rounded_otherwise < 1e-4
    assert count_int8(path) == (4, 4)
    assert [node.op_type for node in onnx.load(path).graph.node].count("Clip") >= 1


def test_export_leaves_the_network_as_it_was(tables: QuantTables, tmp_path: Path) -> None:
    net = quantize(tables, Plan(bits=PLANS["mixed"])).train()
    before, code = copy.deepcopy(net.state_dict()), net.code
    qdq_network(net, SHAPE)
    assert net.training
    assert net.code == code
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def _edit_weight(layer: str) -> Callable[[onnx.ModelProto], None]:
    def alter(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.name == f"{layer}.weight":
                values = numpy_helper.to_array(tensor).copy()
                values[0] = -values[0]
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return alter


def _drop_clips(proto: onnx.ModelProto) -> None:
    for node in list(proto.graph.node):
        if node.op_type == "Clip" and "first_2" in node.output[0]:  # behind the layer first.0
            node.op_type = "Identity"
            del node.input[1:]


def _widen_scale(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if "x_quant8" in t.name and "scale" in t.name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))


def _both(*alterations: Callable[[onnx.ModelProto], None]) -> Callable[[onnx.ModelProto], None]:
    def alter(proto: onnx.ModelProto) -> None:
        for alteration in alterations:
            alteration(proto)

    return alter


@pytest.mark.parametrize(
    ("plan", "alter", "words"),
    [
        ("eight", _edit_weight("first.3"), "first at layer 'first.3'"),
        ("eight", _both(_edit_weight("down"), _edit_weight("first.0")), "first at layer 'first.0'"),
        ("eight", _edit_weight("head"), "first at layer 'head': logits differ"),
        ("eight", _widen_scale, "first at quantiser 'x_quant8'"),
        ("mixed", _drop_clips, "first at layer 'first.0'"),
    ],
)
def test_an_altered_file_is_found_and_the_first_layer_named(
    plan: str,
    alter: Callable[[onnx.ModelProto], None],
    words: str,
    *,
    written: Written,
    images: Tensor,
    tmp_path: Path,
) -> None:
    net, path = written(plan)
    proto = onnx.load(path)
    alter(proto)
    altered = tmp_path / "altered.onnx"
    altered.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=words):
        check_quantised_parity(net, altered, images[:20])


def test_the_file_of_another_plan_is_refused(written: Written, images: Tensor) -> None:
    with pytest.raises(ExportError, match="another network or plan"):
        check_quantised_parity(written("mixed")[0], written("eight")[1], images[:4])


def test_weights_alone_are_integers_between_float_tensors(
    tables: QuantTables, images: Tensor, tmp_path: Path
) -> None:
    net = quantize(tables, Plan(bits={layer: Bits(4, 32) for layer in PLANS["mixed"]}))
    path = export_qcdq(net, tmp_path / "m.onnx", input_shape=SHAPE)
    assert check_quantised_parity(net, path, images[:20]).num_tensors == 0
    assert {tensor.data_type for tensor in _weights(path).values()} == {TensorProto.INT4}
    assert count_int8(path) == (0, 4)


def test_images_that_are_not_finite_are_refused(written: Written, images: Tensor) -> None:
    with pytest.raises(DataError, match="finite"):
        check_quantised_parity(*written("eight"), images[:4] * float("nan"))


def test_what_bytes_cannot_hold_is_refused_with_all_names(tables: QuantTables, tmp_path: Path) -> None:
    bits = PLANS["eight"] | {"stem.0": Bits(8, 1), "first.3": Bits(9, 8), "head": Bits(8, 12)}
    with pytest.raises(ExportError) as caught:
        export_qcdq(quantize(tables, Plan(bits=bits)), tmp_path / "m.onnx", input_shape=SHAPE)
    faults = str(caught.value).splitlines()
    assert len(faults) == 3
    assert "'x_quant1' makes binary" in faults[0]
    assert "export as QONNX" in faults[0]
    assert "'first.3' has weights of 9 bits" in faults[1]
    assert "makes 12-bit" in faults[2]
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_quantisers_is_refused(tables: QuantTables, tmp_path: Path) -> None:
    for net in (tables.skeleton.graph_module, Digits()):
        with pytest.raises(ExportError, match="export_onnx"):
            export_qcdq(net, tmp_path / "m.onnx", input_shape=SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("opset", [13, 999])
def test_an_opset_that_cannot_be_written_is_refused(opset: int, written: Written, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"between 18 .* got {opset}"):
        export_qcdq(written("eight")[0], tmp_path / "m.onnx", input_shape=SHAPE, opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", [TinyVGG, TinyResNet, TinyMobileNet, TinyDenseNet, TinyPadded])
def test_random_plans_of_many_structures_are_exact_and_run_on_integers(
    kind: type[nn.Module], asymmetric: bool, tmp_path: Path
) -> None:
    batch = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton(seeded(kind))
    tables = QuantTables(skeleton, Calibration(skeleton, [batch], QuantSettings(asymmetric=asymmetric)))
    draw = random.Random(0)
    num_convolutions = sum(isinstance(layer, nn.Conv2d) for layer in skeleton.layers.values())
    for lowest in (8, 2):
        bits = {layer: Bits(draw.randint(lowest, 8), draw.randint(lowest, 8)) for layer in skeleton.layers}
        net = quantize(tables, Plan(bits=bits))
        path = export_qcdq(net, tmp_path / "m.onnx", input_shape=(3, 16, 16))
        parity = check_quantised_parity(net, path, batch, tolerance=0.5)  # random weights tell little apart
        assert parity.rounded_otherwise < 1e-3
        # The padded shortcut slices what the stem makes before it is rounded, so the stem writes floats.
        num_float = int(kind is TinyPadded)
        assert count_int8(path) == (num_convolutions - num_float, num_convolutions)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [Bits(8, 8), Bits(4, 4)])
def test_resnet20_agrees_on_real_images(bits: Bits, shared: Path, tmp_path: Path) -> None:
    scripts = shared / "data"
    environment = {**os.environ, "PYTHONPATH": str(scripts), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, scripts / "unpack.py", tmp_path], check=True, env=environment)
    pixels = np.load(tmp_path / "cifar10.npz")["x_test"][:150].transpose(0, 3, 1, 2)
    mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    batch = (torch.from_numpy(pixels).float() / 255 - mean[:, None, None]) / deviation[:, None, None]
    model = zoo.build("resnet20", num_classes=10)
    zoo.load_weights(model, scripts / "checkpoints" / "cifar10_resnet20_akamaster.pth")
    skeleton = Skeleton(model)
    tables = QuantTables(skeleton, Calibration(skeleton, [batch[:50]], QuantSettings()))
    net = quantize(tables, Plan(bits=dict.fromkeys(skeleton.layers, bits)))
    path = export_qcdq(net, tmp_path / "m.onnx", input_shape=(3, 32, 32))
    parity = check_quantised_parity(net, path, batch[50:], tolerance=0.05)
    assert parity.rounded_otherwise < 1e-5
    assert parity.as_run.top1_agreement == 1.0
    assert count_int8(path) == (19, 19)
