"""ONNX Runtime's own 8-bit form of a float file, for timing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.core.errors import ExportError


def export_static_int8(source: Path, path: Path, images: Tensor) -> Path:
    """Quantise a float ONNX file as ONNX Runtime does by itself: QDQ, U8S8, one weight scale per channel.

    Ranges are the extremes over the images, and nothing is trained or checked: the file says how large and
    how fast a network is in 8 bits, not how accurate.

    Args:
        source: float file, of :func:`export_onnx`.
        path: of the new file.
        images: (N, C, H, W); every one runs through the network once.

    Raises:
        ExportError: ONNX Runtime cannot quantise the network.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(torch.split(images, 1))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    try:
        with _quiet():
            quantization.quantize_static(
                source,
                path,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
    except Exception as fault:  # ONNX Runtime's exceptions share no public base class
        raise ExportError(
            f"ONNX Runtime cannot quantise {source}: {' '.join(str(fault).split())[:300]}"
        ) from fault
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to optimise the graph first: ours has nothing left to fold."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
