"""Brevitas network to QONNX file, for the tools that build hardware (FINN, hls4ml)."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autocompress.core.errors import ExportError
from autocompress.core.files import write_atomically
from autocompress.export.brevitas_calls import Call, record_calls
from autocompress.export.onnx_file import strip_traces

logger = logging.getLogger(__name__)

QUANTISERS = ("Quant", "BipolarQuant")
PRODUCTS = ("Conv", "Gemm", "MatMul")
"""What convolution and linear layers are written as."""
OLDEST_OPSET, NEWEST_OPSET = 11, 20
"""The oldest FINN and qonnx are used with; the newest the TorchScript exporter writes."""


def export_qonnx(model: nn.Module, path: Path, *, input_shape: tuple[int, int, int], opset: int = 18) -> Path:
    """Write a quantised network as a QONNX file for one image.

    Weights and activations pass through ``Quant`` or ``BipolarQuant`` nodes (Pappalardo et al., "QONNX",
    arXiv 2206.07527), shapes and data types are inferred, and layers and quantisers are named after the
    modules of the network: ``features_0``, ``features_0_weight_quant``. The same network gives the same
    bytes. Two things differ from Brevitas' own file, without changing a value, because FINN asks for them:
    biases are constants, already rounded to their 32-bit grid, and a ReLU stands in front of every quantiser
    without negative values.

    Args:
        model: Brevitas layers that map images (N, C, H, W) to one tensor; not changed.
        path: of the file; replaced only once the new one is complete and valid.
        input_shape: (C, H, W) of one image.
        opset: version of the ONNX operator set, from 11 to 20.

    Raises:
        ExportError: the package qonnx is missing, the opset is out of range, nothing in the network is
            quantised, or it cannot be exported.
        RunDirectoryError: the file cannot be written.
    """
    check_qonnx_installed()
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(
            f"opset must be from {OLDEST_OPSET} to {NEWEST_OPSET} for QONNX, got {opset}; use opset=18"
        )
    frozen = copy.deepcopy(model).cpu().eval()
    proto = _translate(frozen, input_shape, opset)
    if not any(node.op_type in QUANTISERS for node in proto.graph.node):
        raise ExportError(
            "QONNX is for quantised networks, but no tensor of this one is quantised; give layers fewer "
            "than 32 bits, or use export_onnx"
        )
    _fold_biases(proto.graph)
    calls = record_calls(frozen, torch.zeros(1, *input_shape))
    called = _called(proto.graph, calls)
    _name_nodes(proto.graph, called)
    _mend_unsigned_bits(proto.graph, called)
    _rectify(proto.graph)
    proto = _clean(proto)
    _validate(proto)
    write_atomically(path, proto.SerializeToString(deterministic=True))
    logger.info("wrote %s (%d bytes, opset %d)", path, path.stat().st_size, opset)
    return path


def check_qonnx_installed() -> None:
    """Raise ExportError if the package qonnx is missing."""
    try:
        import qonnx  # noqa: F401
    except ImportError:
        raise ExportError(
            "QONNX files need the package qonnx; install it with: pip install 'autocompress[fpga]'"
        ) from None


def identifier(name: str) -> str:
    """A module name as it appears in the file: an identifier, for the sake of C++."""
    return re.sub(r"\W|^(?=\d)", "_", name)


def constants(graph: Any) -> dict[str, NDArray[Any]]:
    """Name -> value of every initializer of an ONNX graph."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def add_constant(graph: Any, name: str, value: NDArray[Any]) -> str:
    """Append an initializer and give back its name."""
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), name))
    return name


def _translate(model: nn.Module, input_shape: tuple[int, int, int], opset: int) -> Any:
    """The ModelProto as Brevitas writes it."""
    from brevitas.export import export_qonnx as brevitas_export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Only the TorchScript exporter knows Brevitas' integer biases.
            return brevitas_export(
                model,
                args=torch.zeros(1, *input_shape),
                opset_version=opset,
                dynamo=False,
                keep_initializers_as_inputs=False,
            )
        except Exception as fault:  # the exporter lets the errors of every operator's translation through
            cause = str(fault).strip().splitlines() or [type(fault).__name__]
            raise ExportError(
                f"cannot export {type(model).__name__} for images {input_shape} as QONNX: {cause[0]}. "
                "Check that it takes this input in evaluation mode and that adaptive pooling gives one pixel."
            ) from fault


def _fold_biases(graph: Any) -> None:
    """Put rounded values in the place of bias quantisers.

    FINN's extraction of biases does not see through a quantiser, and folding one behind an addition would
    cost it a division and a multiplication per layer.
    """
    values = constants(graph)
    for node in [n for n in graph.node if n.op_type == "Quant" and "/bias_quant/" in n.name]:
        bias, scale, zero, bits = (values[name] for name in node.input)
        largest = 2.0 ** (float(bits) - 1)
        integers = np.clip(np.rint(bias / scale + zero), -largest, largest - 1) - zero
        add_constant(graph, node.output[0], integers.astype(np.float32) * scale)
        graph.node.remove(node)


def _rectify(graph: Any) -> None:
    """Put a ReLU in front of unsigned quantisers that have none: they clamp at 0 either way."""
    from onnx import helper

    values = constants(graph)
    makers = {output: node.op_type for node in graph.node for output in node.output}
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "Quant" or node.input[0] in values or makers.get(node.input[0]) == "Relu":
            continue
        signed = next(a.i for a in node.attribute if a.name == "signed")
        if signed or np.any(values[node.input[2]]):
            continue
        rectified = f"{node.output[0]}_rectified"
        relu = helper.make_node("Relu", [node.input[0]], [rectified], name=f"{node.name}_Relu")
        node.input[0] = rectified
        graph.node.insert(index, relu)


def _called(graph: Any, calls: list[Call]) -> dict[int, Call]:
    """Place of a node in the graph -> the call of the layer or quantiser that it stands for.

    The graph must be as the exporter left it: nodes of each kind stand in the order of their calls.
    """
    fixed = _computed_from_constants(graph)
    found: dict[int, Call] = {}
    for kind, operators, operand in (("layer", PRODUCTS, 1), ("quantiser", QUANTISERS, 0)):
        constant = kind == "layer"
        places = [
            place
            for place, node in enumerate(graph.node)
            if node.op_type in operators and (node.input[operand] in fixed) == constant
        ]
        of_kind = [call for call in calls if call.kind == kind]
        if len(of_kind) != len(places):
            raise ExportError(
                f"the network runs {len(of_kind)} {kind}s, but the exported graph has {len(places)}; let no "
                "two quantisers of equal scale read one tensor, and multiply weights in layers only"
            )
        found |= dict(zip(places, of_kind, strict=True))
    return found


def _computed_from_constants(graph: Any) -> set[str]:
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and all(name in fixed for name in node.input):
            fixed.update(node.output)
    return fixed


def _name_nodes(graph: Any, called: Mapping[int, Call]) -> None:
    """Name layers and quantisers after their modules, every other node after its operator."""
    taken: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        base = identifier(called[place].name) if place in called else node.op_type
        count = taken[base] = taken.get(base, -1) + 1
        node.name = f"{base}_{count}" if count else base
    makers = {output: node for node in graph.node for output in node.output}
    for place, call in called.items():
        maker = makers.get(graph.node[place].input[1]) if call.kind == "layer" else None
        while maker is not None and maker.op_type not in QUANTISERS:  # a transposition
            maker = makers.get(maker.input[0])
        if maker is not None:
            maker.name = f"{graph.node[place].name}_weight_quant"


def _mend_unsigned_bits(graph: Any, called: Mapping[int, Call]) -> None:
    """Write one-bit quantisers without negative values as Quant nodes.

    Brevitas 0.13 writes every one-bit quantiser as BipolarQuant, which would turn {0, 1} into {-1, 1}.
    """
    from onnx import helper

    for place, call in called.items():
        node = graph.node[place]
        if node.op_type != "BipolarQuant" or call.module.is_signed:
            continue
        zero = add_constant(graph, f"{node.output[0]}_zero", np.zeros(()))
        bits = add_constant(graph, f"{node.output[0]}_bits", np.ones(()))
        mended = helper.make_node(
            "Quant",
            [*node.input, zero, bits],
            [node.output[0]],
            name=node.name,
            domain=node.domain,
            signed=0,
            narrow=0,
            rounding_mode="ROUND",
        )
        node.CopyFrom(mended)


def _clean(proto: Any) -> Any:
    """Shapes, data types and tensor names by qonnx' transformations."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation import general
    from qonnx.transformation.fold_constants import FoldConstants
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.transformation.quant_constant_folding import FoldTransposeIntoQuantInit

    wrapped = ModelWrapper(proto)
    for step in (
        InferShapes(),
        general.GiveUniqueParameterTensors(),
        FoldConstants(exclude_op_types=[*QUANTISERS]),
        FoldTransposeIntoQuantInit(),
        general.RemoveUnusedTensors(),
        general.RemoveStaticGraphInputs(),
        general.GiveReadableTensorNames(),
        InferDataTypes(allow_scaledint_dtypes=True),
    ):
        wrapped = wrapped.transform(step)
    return wrapped.model


def _validate(proto: Any) -> None:
    """Strip what tells of this machine, set an IR version that all tools read, and check the graph."""
    import onnx

    strip_traces(proto)
    del proto.metadata_props[:]
    official = [entry for entry in proto.opset_import if entry.domain == ""]
    proto.ir_version = onnx.helper.find_min_ir_version_for(official)
    if len(proto.graph.output) != 1:
        raise ExportError(
            f"the network must return one tensor, it returns {len(proto.graph.output)}; wrap it in a module "
            "that returns the logits only"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as fault:  # checker, shape inference and protobuf have unrelated exception types
        raise ExportError(f"the exported graph is not valid: {fault}. Try another opset.") from fault
