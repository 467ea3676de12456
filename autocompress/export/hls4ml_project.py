"""QONNX file to an hls4ml project whose arithmetic is that of the network, bit for bit."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from autocompress.core.errors import ExportError
from autocompress.export.hls4ml_graph import hls4ml_graph
from autocompress.export.qonnx_file import check_qonnx_installed

IoType = Literal["io_parallel", "io_stream"]


def convert_with_hls4ml(
    path: Path,
    folder: Path,
    *,
    io_type: IoType = "io_parallel",
    backend: str = "Vitis",
    **options: Any,
) -> Any:
    """An hls4ml project of a QONNX file, with precisions that lose nothing.

    The graph is put into hls4ml's channels-last form, biases get the narrowest fixed-point type that holds
    them, pooling keeps the bits its division makes, and the input port rounds as the first quantiser does.
    hls4ml derives the accumulators from these, wide enough never to overflow. The project takes images as
    (N, H, W, C), flattened or not.

    Args:
        path: written by :func:`~autocompress.export.export_qonnx` from a network with power-of-two scales,
            one per tensor.
        folder: of the project; files of an earlier one are overwritten.
        io_type: ``io_parallel`` for the lowest latency of small networks, ``io_stream`` for larger ones.
        backend: of hls4ml: ``Vitis``, ``Vivado``, ``Quartus``, ...
        **options: passed on to ``hls4ml.converters.convert_from_onnx_model``, such as ``part`` and
            ``clock_period``.

    Returns:
        hls4ml's ``ModelGraph``: ``compile()`` builds its C++ emulation, ``build()`` runs the synthesis.

    Raises:
        ExportError: a package is missing, scales or operators that hls4ml cannot express exactly, all named,
            or hls4ml refuses the graph.
    """
    check_qonnx_installed()
    try:
        import hls4ml
    except ImportError:
        raise ExportError(
            "this needs the package hls4ml; install it with: pip install 'autocompress[fpga]'"
        ) from None
    with _silent():
        model, precisions = hls4ml_graph(path)
        try:
            config = hls4ml.utils.config_from_onnx_model(
                model, granularity="name", backend=backend, default_precision="fixed<16,6>"
            )
            for name, precision in precisions.items():
                config["LayerName"][name]["Precision"]["result"] = precision
            return hls4ml.converters.convert_from_onnx_model(
                model,
                output_dir=str(folder),
                io_type=io_type,
                backend=backend,
                hls_config=config,
                **options,
            )
        except Exception as fault:  # hls4ml raises bare Exception, and passes others through
            raise ExportError(
                f"hls4ml {hls4ml.__version__} cannot convert {path}: {fault}. Use convolutions, linear "
                "layers, ReLU, max and global average pooling and additions."
            ) from fault


def check_hls4ml_parity(project: Any, logits: Tensor, images: Tensor) -> float:
    """Compare a compiled project's C++ emulation with the network.

    Sums are integers times a power of two on both sides, so the logits are equal as long as the network's
    float32 sums are exact (below 2**24 steps); allowed is 1e-5 of the largest magnitude.

    Args:
        project: from :func:`convert_with_hls4ml`, after ``compile()``.
        logits: of the Brevitas network for the images, shape (N, classes).
        images: float, shape (N, C, H, W).

    Returns:
        The largest absolute difference of a logit.

    Raises:
        ExportError: a difference is larger, or a best class another one.
    """
    pixels = np.ascontiguousarray(images.detach().cpu().numpy().transpose(0, 2, 3, 1), dtype=np.float32)
    wanted = logits.detach().cpu().numpy()
    got = np.asarray(project.predict(pixels)).reshape(wanted.shape)
    diff = np.abs(got - wanted)
    num_other = int((got.argmax(axis=1) != wanted.argmax(axis=1)).sum())
    if not diff.max() <= 1e-5 * np.abs(wanted).max() or num_other:
        raise ExportError(
            f"hls4ml's emulation disagrees with the network for {int((diff > 0).any(axis=1).sum())} of "
            f"{len(images)} images, by up to {diff.max():.3g}; {num_other} get another best class. Compare "
            "project.trace(images) with the network to see in which layer the difference arises."
        )
    return float(diff.max())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the prints of hls4ml and the warnings of qonnx off the user's screen."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
