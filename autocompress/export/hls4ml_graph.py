"""QONNX graphs in the form hls4ml reads, changed where its types would lose bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import ExportError
from autocompress.export.qonnx_file import PRODUCTS, QUANTISERS, constants

_MAX_BIAS_BITS = 32


@dataclass(frozen=True)
class FixedPoint:
    """Numbers ``2**exponent * q`` with integers ``q`` of some bits.

    Args:
        bits: width, with the sign.
        exponent: of the step between neighbouring numbers.
        signed: two's complement if true.
    """

    bits: int
    exponent: int
    signed: bool

    def hls(self, *, rounding: bool = False) -> str:
        """As hls4ml writes it; with ``rounding``, half to even and saturating, as quantisers do."""
        kind = "fixed" if self.signed else "ufixed"
        how = ",RND_CONV,SAT" if rounding else ""
        return f"{kind}<{self.bits},{self.bits + self.exponent}{how}>"


def hls4ml_graph(path: Path) -> tuple[Any, dict[str, str]]:
    """The graph in hls4ml's form, and layer name -> precision where hls4ml cannot infer an exact one."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation import general
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.quant_constant_folding import FoldTransposeIntoQuantInit

    try:
        model = ModelWrapper(str(path))
    except Exception as fault:  # onnx and protobuf have unrelated exception types
        raise ExportError(f"{path} is no ONNX file: {fault}. Write it with export_qonnx.") from fault
    precisions = _Rewriting(model).rewrite(path)
    pools = {node.name for node in model.graph.node if node.name in precisions}
    linear = [node.name for node in model.graph.node if node.op_type == "Gemm"]
    for step in (
        InferShapes(),
        ConvertToChannelsLastAndClean(make_input_channels_last=True),
        GemmToMatMul(),
        FoldTransposeIntoQuantInit(),
        general.RemoveUnusedTensors(),
        InferShapes(),
    ):
        model = model.transform(step)
    for index, node in enumerate(model.graph.node):
        if node.name in pools:
            node.op_type = "AveragePool"
        if not node.name:
            node.name = linear.pop(0) if node.op_type == "MatMul" else f"{node.op_type}_{index}"
    return model, precisions


class _Rewriting:
    """Changes to a graph that hls4ml needs and that change no value."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.values = constants(model.graph)
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.faults: list[str] = []

    def rewrite(self, path: Path) -> dict[str, str]:
        """Layer name -> precision of its result.

        Raises:
            ExportError: what hls4ml cannot express exactly, all named.
        """
        precisions: dict[str, str] = {}
        for node in list(self.graph.node):
            if node.op_type in QUANTISERS:
                self._check_quantiser(node)
            elif node.op_type in PRODUCTS:
                self._check_layer(node)
            elif node.op_type == "Add" and any(name in self.values for name in node.input):
                self._quantise_bias(node, int(node.input[1] in self.values))
            elif node.op_type in ("GlobalAveragePool", "AveragePool"):
                self._pool(node, precisions)
        source = self.graph.input[0].name
        first = self._grid_behind(source)
        if first is None:
            self.faults.append("the images are not quantised; give the first layer activation bits")
        if self.faults:
            faults = "\n".join(self.faults)
            raise ExportError(f"{path} cannot become an exact hls4ml project:\n{faults}")
        assert first is not None
        return precisions | {source: first.hls(rounding=True)}

    def _check_quantiser(self, node: Any) -> None:
        scale = self.values[node.input[1]]
        if scale.max() != scale.min() or math.frexp(float(scale.max()))[0] != 0.5:
            self.faults.append(
                f"quantiser {node.name!r} needs one power of two as its scale; quantise with "
                "power_of_two=True and per_channel=False"
            )
        elif node.op_type == "Quant" and np.any(self.values[node.input[2]]):
            self.faults.append(f"quantiser {node.name!r} has a zero point; quantise with asymmetric=False")
        elif node.op_type == "BipolarQuant":
            self._widen_binary(node, scale)

    def _widen_binary(self, node: Any, scale: NDArray[Any]) -> None:
        """Binary weights as the outer two of three values, which hls4ml keeps as they are."""
        if node.input[0] not in self.values:
            self.faults.append(
                f"quantiser {node.name!r} makes binary activations with a sign; give it 2 bits, or build "
                "for FINN"
            )
            return
        signs = np.where(self.values[node.input[0]] >= 0, 1, -1) * scale
        self._become_quant(
            node, self._constant(f"{node.name}_signs", signs), FixedPoint(2, _exponent(scale), True)
        )

    def _constant(self, name: str, value: Any) -> str:
        self.model.set_initializer(name, np.asarray(value, dtype=np.float32))
        return name

    def _become_quant(self, node: Any, source: str, grid: FixedPoint) -> None:
        from onnx import helper

        scale, zero, bits = (
            self._constant(f"{node.name}_{part}", value)
            for part, value in (("scale", [2.0**grid.exponent]), ("zero", 0.0), ("bits", grid.bits))
        )
        quant = helper.make_node(
            "Quant",
            [source, scale, zero, bits],
            [node.output[0]],
            name=node.name,
            domain="qonnx.custom_op.general",
            signed=int(grid.signed),
            narrow=0,
            rounding_mode="ROUND",
        )
        node.CopyFrom(quant)

    def _check_layer(self, node: Any) -> None:
        if node.input[1] in self.values:
            self.faults.append(f"layer {node.name!r} has float weights; give it weight bits")
        if len(node.input) > 2:
            self._quantise_bias(node, 2)

    def _quantise_bias(self, node: Any, place: int) -> None:
        from onnx import NodeProto

        bias = self.values.get(node.input[place])
        grid = None if bias is None else narrowest(bias)
        if grid is None:
            self.faults.append(
                f"layer {node.name!r} has a bias that {_MAX_BIAS_BITS} bits cannot hold; give the layer "
                "weight and activation bits, so that its bias is rounded"
            )
            return
        quantiser = NodeProto(name=f"{node.name}_bias_quant", output=[f"{node.name}_bias_quant_out0"])
        self._become_quant(quantiser, node.input[place], grid)
        self.graph.node.insert(list(self.graph.node).index(node), quantiser)
        node.input[place] = quantiser.output[0]

    def _pool(self, node: Any, precisions: dict[str, str]) -> None:
        """Let it pass for max-pooling while qonnx moves axes: qonnx knows no average pooling."""
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        window = list(attributes.get("kernel_shape", self.model.get_tensor_shape(node.input[0])[2:]))
        grid, area = self._grid_of(node.input[0]), math.prod(window)
        if any(attributes.get("pads", ())) or grid is None or area & (area - 1):
            self.faults.append(
                f"average pooling {node.name!r} is exact only over quantised values, without padding, and "
                f"over a power of two of them, got a window of {window}; use max pooling or other images"
            )
            return
        halvings = area.bit_length() - 1
        precisions[node.name] = FixedPoint(grid.bits + halvings, grid.exponent - halvings, grid.signed).hls()
        strides = list(attributes.get("strides", window))
        pool = helper.make_node(
            "MaxPool",
            [*node.input],
            [*node.output],
            name=node.name,
            kernel_shape=window,
            strides=strides,
            pads=[0] * (2 * len(window)),
        )
        node.CopyFrom(pool)

    def _grid_of(self, tensor: str) -> FixedPoint | None:
        """The grid of a tensor that a quantiser made, through operators that only pick or move values."""
        node = self.makers.get(tensor)
        if node is None:
            return None
        if node.op_type == "Quant":
            return self._read(node)
        return self._grid_of(node.input[0]) if node.op_type in ("MaxPool", "Relu") else None

    def _grid_behind(self, tensor: str) -> FixedPoint | None:
        """The grid that the reader of a tensor rounds it to."""
        for node in self.graph.node:
            if tensor in node.input:
                if node.op_type == "Quant":
                    return self._read(node)
                return self._grid_behind(node.output[0]) if node.op_type == "Relu" else None
        return None

    def _read(self, node: Any) -> FixedPoint:
        signed = next(a.i for a in node.attribute if a.name == "signed")
        return FixedPoint(
            int(self.values[node.input[3]]), _exponent(self.values[node.input[1]]), bool(signed)
        )


def _exponent(scale: NDArray[Any]) -> int:
    """Of a power of two."""
    return math.frexp(float(scale.max()))[1] - 1


def narrowest(values: NDArray[Any]) -> FixedPoint | None:
    """The narrowest fixed-point type that holds some numbers exactly; None beyond 32 bits."""
    if not np.any(values):
        return FixedPoint(1, 0, True)
    ratios = [float(value).as_integer_ratio() for value in values.ravel() if value]
    exponent = min(-(denominator.bit_length() - 1) for _, denominator in ratios)
    integers = [
        numerator * 2 ** (-exponent - (denominator.bit_length() - 1)) for numerator, denominator in ratios
    ]
    if exponent == 0:  # whole numbers may share factors of two
        shared = min((number & -number).bit_length() - 1 for number in integers)
        exponent, integers = shared, [number >> shared for number in integers]
    bits = max((number if number >= 0 else ~number).bit_length() for number in integers) + 1
    return FixedPoint(bits, exponent, True) if bits <= _MAX_BIAS_BITS else None
