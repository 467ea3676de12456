"""ONNX Runtime sessions on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import ExportError

_ERRORS_ONLY = 3  # ONNX Runtime's severity scale: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal


def open_session(
    path: Path, *, threads: int = 1, integer_kernels: bool = True, write_optimised: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU with the default graph optimisations.

    Args:
        path: ONNX file.
        threads: within an operator.
        integer_kernels: False runs quantised files as they are written, with float kernels between
            quantisers.
        write_optimised: file for the graph that is really run.

    Raises:
        ExportError: ONNX Runtime cannot read the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    if not integer_kernels:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if write_optimised is not None:
        options.optimized_model_filepath = str(write_optimised)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # ONNX Runtime's exceptions share no public base class
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot read {path}: {fault}. "
            "Export it again, with a lower opset or a newer ONNX Runtime if it names a version."
        ) from fault


def run_session(session: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output for a batch of images, shape (N, C, H, W).

    Raises:
        ExportError: the graph does not accept a batch of this shape.
    """
    source = session.get_inputs()[0]
    try:
        return np.asarray(session.run(None, {source.name: images})[0], dtype=np.float32)
    except Exception as fault:  # as above
        raise ExportError(
            f"the graph takes an input of shape {source.shape} and failed on {images.shape}: {fault}. "
            "Export the network again with this image size and a dynamic batch."
        ) from fault
