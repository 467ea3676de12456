"""Quantised network to an ONNX file that ONNX Runtime executes with integer kernels."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from autocompress.core.errors import ExportError
from autocompress.export.onnx_file import check_opset, strip_traces, translate, validate, write_onnx
from autocompress.export.qdq_network import MARK, qdq_network
from autocompress.export.session import open_session

logger = logging.getLogger(__name__)

_PACKED = (("INT2", 2, 25), ("INT4", 4, 21))  # element type, bits, the opset that can cast it to int8
_LAYERS = ("Conv", "Gemm", "MatMul")
_INT8_CONVOLUTIONS = ("QLinearConv", "ConvInteger")
_FLOAT_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv")


def export_qcdq(
    net: fx.GraphModule, path: Path, *, input_shape: tuple[int, int, int], opset: int = 21
) -> Path:
    """Write a quantised network as one ONNX file of QuantizeLinear, Clip and DequantizeLinear nodes.

    ONNX Runtime runs such a file with integer kernels: every convolution whose input and output are
    quantised becomes a QLinearConv. Activations are written as unsigned bytes with a zero point, which
    changes no value; grids narrower than 8 bits are clipped. Weights that fit in 4 bits are stored in 4 bits
    (2 from opset 25 on) and widened when the file is loaded, so they run at the speed of 8 bits; from 5 bits
    up a weight takes a byte, and below opset 21 every weight does. Biases are 32-bit integers.

    Args:
        net: made by ``autocompress.quant.quantize``, trained or not; evaluated and not changed.
        path: of the file; replaced only once the new one is complete and ONNX Runtime has loaded it.
        input_shape: (C, H, W) of one image.
        opset: version of the ONNX operator set, at least 18; 21 is read by ONNX Runtime from 1.18 on.

    Raises:
        ExportError: the opset is not available, a quantiser is binary or wider than 8 bits, or a reason of
            :func:`~autocompress.export.export_onnx`.
    """
    check_opset(opset)
    if not isinstance(net, fx.GraphModule):
        raise ExportError(
            f"QCDQ is written from the network that quantize(tables, plan) makes, got {type(net).__name__}; "
            "write a float network with export_onnx"
        )
    proto = translate(qdq_network(net, input_shape), input_shape, opset)
    _name_tensors(proto)
    _pool_globally(proto)
    _pack_weights(proto, opset)
    strip_traces(proto)
    validate(proto, opset)
    write_onnx(proto, path)
    logger.info("wrote %s (%d bytes, opset %d)", path, path.stat().st_size, opset)
    return path


def count_int8(path: Path) -> tuple[int, int]:
    """How many convolutions of a file ONNX Runtime runs on integers on this CPU, and how many there are.

    Raises:
        ExportError: ONNX Runtime cannot read the file.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, write_optimised=optimised)
        operators = [node.op_type for node in onnx.load(optimised).graph.node]
    on_integers = sum(operators.count(kind) for kind in _INT8_CONVOLUTIONS)
    return on_integers, on_integers + sum(operators.count(kind) for kind in _FLOAT_CONVOLUTIONS)


def _name_tensors(proto: Any) -> None:
    """Name byte tensors after the quantisers that make them, and nodes after their layers."""
    graph = proto.graph
    readers = {name: node for node in graph.node for name in node.input}
    new: dict[str, str] = {}
    for node in graph.node:
        mark = next((entry.value for entry in node.metadata_props if entry.key == MARK), None)
        if mark is None:
            continue
        if node.op_type != "DequantizeLinear":  # the Clip, where there is one, comes last
            new[node.output[0]] = mark
            if node.op_type == "Clip":
                new[node.input[0]] = f"{mark}.unclipped"
            continue
        new[node.output[0]] = f"{mark}.values"
        reader = readers.get(node.output[0])
        if reader is not None and reader.op_type in _LAYERS and reader.input[1] == node.output[0]:
            reader.name = mark
    _rename(graph, new)


def _rename(graph: Any, new: dict[str, str]) -> None:
    kept = {value.name for value in graph.output}
    new = {old: name for old, name in new.items() if old not in kept}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for value in graph.value_info:
        value.name = new.get(value.name, value.name)


def _pool_globally(proto: Any) -> None:
    """Write means over height and width as GlobalAveragePool, for which integer kernels exist."""
    from onnx import helper, numpy_helper

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    nodes = []
    for node in graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if (
            axes is None
            or ranks.get(node.input[0]) != 4
            or sorted(int(axis) % 4 for axis in numpy_helper.to_array(axes)) != [2, 3]
        ):
            nodes.append(node)
            continue
        keeps = {a.name: a.i for a in node.attribute}.get("keepdims", 1)
        pooled = node.output[0] if keeps else f"{node.output[0]}.pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if not keeps:
            nodes.append(helper.make_node("Squeeze", [pooled, node.input[1]], [node.output[0]]))
    kept = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _pack_weights(proto: Any, opset: int) -> None:
    """Store weights of few bits in few bits; a Cast, which runtimes do once on loading, widens them."""
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        tensor = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is None or tensor.data_type != TensorProto.INT8:
            continue
        values = numpy_helper.to_array(tensor)
        for kind, bits, oldest in _PACKED:
            half = 1 << (bits - 1)
            if opset < oldest or values.min() < -half or values.max() >= half:
                continue
            name = f"{tensor.name}.{kind.lower()}"
            packed = helper.make_tensor(
                name, getattr(TensorProto, kind), values.shape, _packed(values, bits).tobytes(), raw=True
            )
            cast = helper.make_node("Cast", [name], [tensor.name], to=TensorProto.INT8)
            graph.initializer.remove(tensor)
            graph.initializer.append(packed)
            graph.node.insert(0, cast)
            break


def _packed(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Two's complement integers of 2 or 4 bits in bytes, the first in the lowest bits, as ONNX packs them."""
    per_byte = 8 // bits
    flat = values.ravel().astype(np.uint8) & ((1 << bits) - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8)
    return packed
