"""QONNX files: qonnx reads and executes them with Brevitas' integers, and differences name the layer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from digit_networks import EXACT, MIXED, SHAPE, digit_images, digits_vgg, quantised, unseen
from networks import TinyDenseNet, TinyMobileNet, TinyPadded, TinyResNet, seeded
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn

from autocompress.core import Bits, Plan
from autocompress.core.errors import DataError, ExportError
from autocompress.export import check_qonnx_parity, export_qonnx
from autocompress.hardware_sim.macs import MacsModel
from autocompress.trace import trace
from autocompress.zoo import build

pytest.importorskip("qonnx", reason="the extra fpga is not installed")

PIXELS = (3, 32, 32)


@pytest.fixture(scope="module")
def exact() -> fx.GraphModule:
    return quantised(digits_vgg(), digit_images()[:256], MIXED, **EXACT)[0]


@pytest.fixture(scope="module")
def written(exact: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_qonnx(exact, tmp_path_factory.mktemp("qonnx") / "digits.onnx", input_shape=SHAPE)


@pytest.mark.parametrize("bits", [MIXED, (Bits(2, 2),), (Bits(1, 1),), (Bits(1, 3), Bits(5, 7))], ids=str)
def test_with_power_of_two_scales_qonnx_gives_brevitas_logits_exactly(
    bits: tuple[Bits, ...], tmp_path: Path
) -> None:
    net, _ = quantised(digits_vgg(), digit_images()[:256], bits, **EXACT)
    parity = check_qonnx_parity(net, export_qonnx(net, tmp_path / "m.onnx", input_shape=SHAPE), unseen(32))
    assert (parity.max_abs_diff, parity.num_tied) == (0, 0)
    assert (parity.num_equal, parity.top1_agreement) == (32, 1)
    assert parity.num_tensors == 13  # six layers, the input of each, and what the average pooling reads


@pytest.mark.parametrize(
    ("bits", "settings"),
    [
        (MIXED, {}),
        ((Bits(8, 8),), {"asymmetric": True}),
        ((Bits(4, 32),), {}),
        ((Bits(3, 3), Bits(32, 8)), {}),
    ],
    ids=["per channel", "zero points", "float activations", "float weights"],
)
def test_with_float_scales_only_the_order_of_sums_differs(
    bits: tuple[Bits, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    images = digit_images() - 0.3
    net, _ = quantised(digits_vgg(), images[:256], bits, **settings)
    path = export_qonnx(net, tmp_path / "m.onnx", input_shape=SHAPE)
    parity = check_qonnx_parity(net, path, images[-32:])
    # Float32 sums of some hundred terms; an image with a value on a boundary may lie further off.
    assert parity.num_equal >= 32 - parity.num_tied
    assert parity.num_tied <= 3
    assert parity.num_tied or parity.max_abs_diff < 1e-4


@pytest.mark.parametrize("model", [TinyResNet, TinyMobileNet, TinyPadded, TinyDenseNet])
def test_shortcuts_depthwise_layers_and_concatenations_agree(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    images = torch.randn(10, *PIXELS, generator=torch.Generator().manual_seed(0))
    net, _ = quantised(seeded(model), images[:8], MIXED, **EXACT)
    parity = check_qonnx_parity(net, export_qonnx(net, tmp_path / "m.onnx", input_shape=PIXELS), images[8:])
    assert (parity.max_abs_diff, parity.num_equal) == (0, 2)


class _Handwritten(nn.Module):
    """Brevitas layers as a user might nest them: QuantReLU, binary activations, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        import brevitas.nn as qnn
        from brevitas.quant import Int32Bias, SignedBinaryActPerTensorConst, Uint8ActPerTensorFixedPoint

        pixels = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFixedPoint, return_quant_tensor=True)
        relu = qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=4, return_quant_tensor=True)
        conv = qnn.QuantConv2d(1, 4, 3, weight_bit_width=4, bias=True, bias_quant=Int32Bias)
        self.stem = nn.Sequential(nn.Sequential(pixels, conv), relu)
        self.block = nn.ModuleDict({"conv": qnn.QuantConv2d(4, 4, 1, weight_bit_width=2)})
        self.relu = qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, return_quant_tensor=True)
        self.sign = qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst, return_quant_tensor=True)
        self.head = qnn.QuantLinear(4 * 36, 10, bias=False, weight_bit_width=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.block["conv"](self.stem(x)))
        x = self.relu(self.block["conv"](x))
        return self.head(self.sign(x.value - 0.5).flatten(1))


def test_brevitas_networks_of_other_makers_agree(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _Handwritten()
        net(digit_images()[:64])  # fixes the scales of activations
    path = export_qonnx(net.eval(), tmp_path / "m.onnx", input_shape=SHAPE)
    assert check_qonnx_parity(net, path, unseen(8)).num_equal == 8
    names = {node.name for node in onnx.load(path).graph.node}
    assert names >= {"stem_0_1", "stem_1", "block_conv", "block_conv_1", "relu", "relu_1", "sign", "head"}


def test_one_unsigned_bit_holds_zero_and_one(tmp_path: Path) -> None:
    net, _ = quantised(digits_vgg(), digit_images()[:64], (Bits(1, 1),), **EXACT)
    graph = onnx.load(export_qonnx(net, tmp_path / "m.onnx", input_shape=SHAPE)).graph
    fixed = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ones = [n for n in graph.node if n.op_type == "Quant" and fixed[n.input[3]] == 1]
    assert len(ones) == 6  # what each layer reads is never negative
    assert all(a.i == 0 for n in ones for a in n.attribute if a.name == "signed")
    assert sum(n.op_type == "BipolarQuant" for n in graph.node) == 6  # the weights


def test_file_is_named_after_the_network_and_the_same_each_time(
    exact: fx.GraphModule, written: Path, tmp_path: Path
) -> None:
    again = export_qonnx(exact, tmp_path / "again.onnx", input_shape=SHAPE)
    assert again.read_bytes() == written.read_bytes()
    graph = onnx.load(written).graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["global_in", "global_out"]
    names = {node.name for node in graph.node}
    assert names >= {"x_quant8", "features_0", "features_0_weight_quant", "features_2_quant4", "classifier"}
    assert all(node.name.isidentifier() for node in graph.node)


def test_file_tells_nothing_of_the_machine_that_wrote_it(written: Path) -> None:
    content = written.read_bytes()
    for place in (Path(torch.__file__).parent, Path(__file__).parents[1], Path.home()):
        assert str(place).encode() not in content
    proto = onnx.load(written)
    parts = (proto, proto.graph, *proto.graph.node, *proto.graph.value_info)
    assert not any(part.doc_string or part.metadata_props for part in parts)


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (18, 8), (20, 9)])  # ONNX's version table
def test_old_and_new_operator_sets_are_executed(
    opset: int, ir_version: int, exact: fx.GraphModule, tmp_path: Path
) -> None:
    path = export_qonnx(exact, tmp_path / "m.onnx", input_shape=SHAPE, opset=opset)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == ir_version
    assert {o.domain: o.version for o in proto.opset_import} == {"": opset, "qonnx.custom_op.general": 2}
    assert check_qonnx_parity(exact, path, unseen(2)).max_abs_diff == 0


def test_shapes_and_data_types_are_those_qonnx_infers(written: Path) -> None:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes

    model = ModelWrapper(str(written))
    assert model.check_all_tensor_shapes_specified()
    again = ModelWrapper(str(written)).transform(InferShapes()).transform(InferDataTypes(True))
    wanted = {
        "x_quant8": 8,
        "features_2_quant4": 4,
        "features_0_weight_quant": 8,
        "features_3_weight_quant": 4,
    }
    for name, bits in wanted.items():
        for wrapped in (model, again):
            assert wrapped.get_tensor_datatype(f"{name}_out0").name == f"SCALEDINT<{bits}>"
    assert model.get_tensor_shape("features_7_out0") == [1, 32, 4, 4]


def test_biases_are_constants_and_unsigned_quantisers_stand_behind_a_relu(written: Path) -> None:
    graph = onnx.load(written).graph
    fixed = {tensor.name for tensor in graph.initializer}
    makers = {output: node.op_type for node in graph.node for output in node.output}
    assert all(node.input[2] in fixed for node in graph.node if node.op_type in ("Conv", "Gemm"))
    acts = [n for n in graph.node if n.op_type == "Quant" and n.input[0] not in fixed]
    assert acts
    assert all(makers[node.input[0]] == "Relu" for node in acts)


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    net, _ = quantised(digits_vgg(), digit_images()[:64], (Bits(4, 4),))
    before = copy.deepcopy(net.train().state_dict())
    path = export_qonnx(net, tmp_path / "m.onnx", input_shape=SHAPE)
    check_qonnx_parity(net, path, unseen(2))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


Alter = Callable[[onnx.GraphProto], None]


def _replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Alter:
    def alter(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))

    return alter


def _floor(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.name == "features_5_quant6")
    next(a for a in node.attribute if a.name == "rounding_mode").s = b"FLOOR"


def _bumped(weight: np.ndarray) -> np.ndarray:
    weight = weight.copy()
    weight.ravel()[weight.size // 2] += 2 * np.abs(weight).max()
    return weight


@pytest.mark.parametrize(
    ("alter", "layer"),
    [
        (_replaced("features_7_weight_quant_param0", _bumped), "features.7"),
        (_replaced("features_10_param0", lambda bias: bias + 0.5), "features.10"),
        (_replaced("classifier_param0", lambda bias: bias[::-1].copy()), "classifier"),
        (_replaced("features_2_quant4_param0", lambda scale: scale * 2), "features_2_quant4"),
        (_floor, "features_5_quant6"),
    ],
    ids=["weight", "bias", "last bias", "scale", "rounding"],
)
def test_a_difference_names_the_first_layer_that_differs(
    alter: Alter, layer: str, exact: fx.GraphModule, written: Path, tmp_path: Path
) -> None:
    proto = onnx.load(written)
    alter(proto.graph)
    onnx.save(proto, tmp_path / "altered.onnx")
    with pytest.raises(ExportError, match=f"first at '{layer}'"):
        check_qonnx_parity(exact, tmp_path / "altered.onnx", unseen(8))


def test_rounding_halves_upward_is_no_accident_of_float_sums(
    exact: fx.GraphModule, written: Path, tmp_path: Path
) -> None:
    """With exact sums many values lie on boundaries, so another rule for halves shows."""
    proto = onnx.load(written)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "rounding_mode":
                attribute.s = b"HALF_UP"
    onnx.save(proto, tmp_path / "altered.onnx")
    with pytest.raises(ExportError, match="first at"):
        check_qonnx_parity(exact, tmp_path / "altered.onnx", unseen(32))


def test_a_difference_behind_the_last_layer_is_found(
    exact: fx.GraphModule, written: Path, tmp_path: Path
) -> None:
    proto = onnx.load(written)
    last = proto.graph.node[-1]
    last.output[0] = "scores"
    proto.graph.initializer.append(numpy_helper.from_array(np.array(2.0, np.float32), "two"))
    proto.graph.node.append(helper.make_node("Mul", ["scores", "two"], ["global_out"], name="doubled"))
    onnx.save(proto, tmp_path / "altered.onnx")
    with pytest.raises(ExportError, match="although every layer agrees"):
        check_qonnx_parity(exact, tmp_path / "altered.onnx", unseen(2))


def test_a_file_of_another_network_says_what_it_lacks(exact: fx.GraphModule, tmp_path: Path) -> None:
    net, _ = quantised(digits_vgg(), digit_images()[:64], (Bits(4, 8),), **EXACT)
    path = export_qonnx(net, tmp_path / "m.onnx", input_shape=SHAPE)
    with pytest.raises(ExportError, match="it has no 'features_2_quant4'"):
        check_qonnx_parity(exact, path, unseen(2))


def test_what_is_no_file_and_what_are_no_images_is_refused(
    exact: fx.GraphModule, written: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="Write it with export_qonnx"):
        check_qonnx_parity(exact, broken, unseen(2))
    images = unseen(2).clone()
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="finite"):
        check_qonnx_parity(exact, written, images)


@pytest.mark.parametrize("opset", [10, 21])
def test_opsets_that_are_too_old_or_too_new_are_refused(
    opset: int, exact: fx.GraphModule, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"opset must be from 11 to 20 for QONNX, got {opset}"):
        export_qonnx(exact, tmp_path / "m.onnx", input_shape=SHAPE, opset=opset)


def test_networks_that_cannot_be_written_are_refused_and_the_old_file_stays(
    exact: fx.GraphModule, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an earlier file")
    with pytest.raises(
        ExportError, match="no tensor of this one is quantised; give layers fewer than 32 bits"
    ):
        export_qonnx(digits_vgg(), path, input_shape=SHAPE)
    with pytest.raises(ExportError, match=r"cannot export GraphModule for images \(3, 8, 8\)"):
        export_qonnx(exact, path, input_shape=(3, 8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"an earlier file"


def test_without_qonnx_the_error_says_how_to_install_it(
    exact: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qonnx", None)
    with pytest.raises(ExportError, match=r"pip install 'autocompress\[fpga\]'"):
        export_qonnx(exact, tmp_path / "m.onnx", input_shape=SHAPE)


def _inference_cost(path: Path, *, discount_sparsity: bool = False) -> dict[str, float]:
    from qonnx.util.inference_cost import inference_cost

    made: dict[str, float] = inference_cost(str(path), discount_sparsity=discount_sparsity)["total_cost"]
    return made


def _ours(model: nn.Module, plan: Plan, shape: tuple[int, int, int]) -> tuple[float, float, float]:
    graph = plan.apply(trace(model, shape).graph)
    cost = MacsModel()(graph)
    return cost["macs"], cost["bitops"], sum(layer.num_weights * layer.bits.weight for layer in graph.layers)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("digits_vgg", SHAPE), pytest.param("resnet20", PIXELS, marks=pytest.mark.slow)],
)
def test_qonnx_inference_cost_counts_our_macs_bit_operations_and_weight_bits(
    name: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    model = seeded(lambda: build(name, num_classes=10, in_channels=shape[0]))
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    net, plan = quantised(model, images, MIXED, weight_range="max", act_range="max")
    theirs = _inference_cost(export_qonnx(net, tmp_path / "m.onnx", input_shape=shape))
    figures = theirs["total_macs"], theirs["total_bops"], theirs["total_mem_w_bits"]
    assert figures == _ours(model, plan, shape)


def test_qonnx_inference_cost_differs_by_default_in_not_counting_zero_weights(
    exact: fx.GraphModule, written: Path
) -> None:
    """As docs/how-to/hand-off-to-fpga.md says: its default discounts weights that are 0."""
    full, discounted = _inference_cost(written), _inference_cost(written, discount_sparsity=True)
    zeros = sum(
        int((m.quant_weight().value == 0).sum())
        for m in exact.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    assert zeros > 0
    assert full["total_mem_w_elems"] - discounted["total_mem_w_elems"] == pytest.approx(zeros)


def test_qonnx_inference_cost_counts_binary_weights_with_a_scale_as_floats(tmp_path: Path) -> None:
    """As docs/how-to/hand-off-to-fpga.md says: a BipolarQuant is one bit to it only at scale 1."""
    net, plan = quantised(digits_vgg(), digit_images()[:64], (Bits(1, 4),))
    theirs = _inference_cost(export_qonnx(net, tmp_path / "m.onnx", input_shape=SHAPE))
    _, _, bits = _ours(digits_vgg(), plan, SHAPE)
    assert theirs["total_mem_w_bits"] == 32 * bits
