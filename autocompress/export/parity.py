"""Does the ONNX file compute what the PyTorch network computes?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import DataError, ExportError
from autocompress.export.session import open_session, run_session


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime's logits are from PyTorch's.

    Args:
        max_abs_diff: largest absolute difference of a logit.
        max_rel_diff: the same as a share of the range (maximum minus minimum) of PyTorch's logits.
        top1_agreement: share of images, in [0, 1], with the same best class.
        num_images: number of images compared.
    """

    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    num_images: int


def check_parity(model: nn.Module, onnx_path: Path, images: Tensor, *, tolerance: float = 1e-3) -> Parity:
    """Compare an ONNX file in ONNX Runtime (CPU, default optimisations) with its network.

    The images run as one batch, and the first again as a batch of one, so a fixed batch size is found. The
    best class may differ only for images whose two best logits PyTorch itself holds to be equal within the
    tolerance; such images lower ``top1_agreement`` without raising.

    Args:
        model: the network the file was written from; not changed.
        onnx_path: the file.
        images: at least two, float, shape (N, C, H, W).
        tolerance: largest allowed difference, as a share of the range of PyTorch's logits.

    Raises:
        DataError: the images have another shape or are not finite.
        ExportError: the file cannot be run, a logit is not finite, or the two disagree.
    """
    batch = check_images(images)
    with torch.inference_mode():
        wanted = copy.deepcopy(model).cpu().eval()(batch).numpy()
    return compare_logits(wanted, open_session(onnx_path), batch, tolerance)


def check_images(images: Tensor) -> Tensor:
    """The images as float32 on the CPU.

    Raises:
        DataError: fewer than two, another shape than (N, C, H, W), or not finite.
    """
    if images.ndim != 4 or len(images) < 2 or not bool(torch.isfinite(images).all()):
        raise DataError(
            f"parity needs at least two finite images (N, C, H, W), got shape {tuple(images.shape)} "
            f"with {int((~torch.isfinite(images)).sum())} values that are not finite"
        )
    return images.detach().cpu().float().contiguous()


def compare_logits(wanted: NDArray[np.float32], session: Any, images: Tensor, tolerance: float) -> Parity:
    """Run the images as one batch, and the first again alone, and compare; see :func:`check_parity`."""
    pixels = images.numpy()
    outcome = _compare(wanted, run_session(session, pixels), tolerance)
    single = _compare(wanted, run_session(session, pixels[:1]), tolerance, rows=1)
    return Parity(
        max(outcome.max_abs_diff, single.max_abs_diff),
        max(outcome.max_rel_diff, single.max_rel_diff),
        outcome.top1_agreement,
        outcome.num_images,
    )


def _compare(
    wanted: NDArray[np.float32], got: NDArray[np.float32], tolerance: float, *, rows: int | None = None
) -> Parity:
    """Compare logits (N, classes); ``rows`` limits the comparison, not the range, to the first rows."""
    if not np.isfinite(wanted).all():
        raise ExportError("PyTorch's logits are not finite; the network is broken before export, retrain it")
    scale = float(wanted.max() - wanted.min()) or 1.0
    wanted = wanted[:rows]
    if got.shape != wanted.shape or got.ndim != 2:
        raise ExportError(
            f"logits must have shape (N, classes): PyTorch gives {wanted.shape}, the ONNX file {got.shape}; "
            "export the network again"
        )
    if not np.isfinite(got).all():
        raise ExportError(
            "the ONNX file gives logits that are not finite where PyTorch's are; export it again"
        )
    diff = float(np.abs(got - wanted).max())
    same = wanted.argmax(axis=1) == got.argmax(axis=1)
    num_wrong = int((~same & (_margins(wanted) > tolerance * scale)).sum())
    parity = Parity(diff, diff / scale, float(same.mean()), len(wanted))
    if parity.max_rel_diff > tolerance or num_wrong:
        raise ExportError(
            f"the ONNX file disagrees with PyTorch at batch {len(wanted)}: largest difference {diff:.3g}, "
            f"{parity.max_rel_diff:.2%} of the logits' range (allowed {tolerance:.2%}); {num_wrong} of "
            f"{len(wanted)} images with a clear best class get another one. Export the network again; if it "
            "persists, an operator of the network is translated wrongly: try another opset."
        )
    return parity


def _margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Difference of the two best logits of each row; infinite where there is one class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf, dtype=np.float32)
    best = np.partition(logits, -2, axis=1)
    return np.asarray(best[:, -1] - best[:, -2], dtype=np.float32)
