"""PyTorch network to ONNX file."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.core.errors import ExportError
from autocompress.export.session import open_session

logger = logging.getLogger(__name__)

# The dynamo exporter implements this operator set. Asked for an older one it tries to convert the graph and,
# where that fails, keeps 18 and only logs it.
_OLDEST_OPSET = 18


def export_onnx(model: nn.Module, path: Path, *, input_shape: tuple[int, int, int], opset: int = 18) -> Path:
    """Write a network in evaluation mode as one ONNX file with a dynamic batch size.

    BatchNorm layers that follow a convolution are folded into it. The file holds no source paths or stack
    traces, so its size is that of the graph and its weights. The model is not changed.

    Args:
        model: maps images (N, C, H, W) to one tensor (N, classes).
        path: of the file; replaced only once the new one is complete and ONNX Runtime has loaded it.
        input_shape: (C, H, W) of one image.
        opset: version of the ONNX operator set, at least 18.

    Raises:
        ExportError: the opset is not available, the network cannot be traced, or the graph is not valid.
    """
    check_opset(opset)
    proto = translate(model, input_shape, opset)
    strip_traces(proto)
    validate(proto, opset)
    write_onnx(proto, path)
    logger.info("wrote %s (%d bytes, opset %d)", path, path.stat().st_size, opset)
    return path


def write_onnx(proto: Any, path: Path) -> None:
    """Write a ModelProto under a temporary name, load it in ONNX Runtime, and only then replace ``path``."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(proto.SerializeToString())
        open_session(partial)
        partial.replace(path)
    except (OSError, ValueError) as fault:
        raise ExportError(f"cannot write {path}: {fault}. Check the folder and the free space.") from fault
    finally:
        partial.unlink(missing_ok=True)


def check_opset(opset: int) -> None:
    """Raise ExportError if the exporter cannot write this operator set."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise ExportError(
            f"opset must be between {_OLDEST_OPSET} (the oldest the exporter writes) and {newest} "
            f"(the newest onnx {onnx.__version__} knows), got {opset}; use opset=18"
        )


def translate(model: nn.Module, input_shape: tuple[int, int, int], opset: int) -> Any:
    """The ModelProto of an evaluation copy of the model on the CPU."""
    try:
        frozen = copy.deepcopy(model).cpu().eval()
        # Batch 2: torch.export takes a traced batch of 1 for a constant.
        images = torch.zeros(2, *input_shape)
        with _quiet():
            program: Any = torch.onnx.export(
                frozen,
                (images,),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        return program.model_proto
    except Exception as fault:  # the exporter lets the errors of every operator's translation through
        cause = str(fault).strip().splitlines() or [type(fault).__name__]
        raise ExportError(
            f"cannot export {type(model).__name__} for images {input_shape}: {cause[0]}. "
            "Check that the network accepts this input in evaluation mode and that no Python branch depends "
            "on values of a tensor."
        ) from fault


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress marks, warnings and log lines off the user's screen."""
    talkers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [talker.level for talker in talkers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for talker in talkers:
                talker.setLevel(logging.CRITICAL)
            yield
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)


def strip_traces(proto: Any) -> None:
    """Remove the stack traces and module paths that the exporter attaches to nodes and values."""
    graph = proto.graph
    for part in (
        proto,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def validate(proto: Any, opset: int) -> None:
    """Check opset, outputs, batch and the whole graph, and set an IR version that runtimes can read."""
    import onnx

    written = {entry.domain: entry.version for entry in proto.opset_import}
    if written.get("") != opset:
        raise ExportError(
            f"the exporter could not write opset {opset} and wrote {written.get('')}; use opset=18"
        )
    if len(proto.graph.output) != 1:
        names = ", ".join(output.name for output in proto.graph.output)
        raise ExportError(
            f"the network must return one tensor, it returns {len(proto.graph.output)} ({names}); "
            "wrap it in a module that returns the logits only"
        )
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:  # the exporter retries with constant sizes where a dynamic one does not work
        raise ExportError(
            f"the network fixes its batch size to {batch.dim_value}; let no reshape or parameter name the "
            "batch dimension (use flatten(1), or -1 in its place)"
        )
    # onnx stamps the newest IR version it knows, which may be ahead of ONNX Runtime's; the smallest one that
    # carries the operator sets is read by all of them.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as fault:  # checker, shape inference and protobuf have unrelated exception types
        raise ExportError(f"the exported graph is not valid ONNX: {fault}. Try another opset.") from fault
