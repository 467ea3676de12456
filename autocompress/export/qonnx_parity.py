"""Does the QONNX file compute what the Brevitas network computes, layer by layer?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import ExportError
from autocompress.export.brevitas_calls import Call, record_calls
from autocompress.export.parity import check_images
from autocompress.export.qonnx_file import check_qonnx_installed, identifier

_AT_ONCE = 16  # images whose intermediate tensors are held together
_ROUNDING = 1e-5
"""Largest difference of a float32 sum, as a share of the tensor's largest magnitude, that the order of its
terms explains: one rounding is 2**-24, and errors of some thousand terms add up to about a hundred."""
_MAX_TIED = 1e-3  # share of a tensor's values; more are no accident of rounding


@dataclass(frozen=True)
class QonnxParity:
    """How far qonnx' results are from Brevitas'.

    Args:
        max_abs_diff: largest absolute difference of a logit, from image to logits.
        top1_agreement: share of images, in [0, 1], with the same best class.
        num_images: number of images compared.
        num_equal: images whose logits agree to 1e-5 of the largest magnitude.
        num_tied: quantised values, of all layers and images, on a boundary between two integers that fell
            to the other side.
        num_tensors: outputs of layers and quantisers compared for each image.
    """

    max_abs_diff: float
    top1_agreement: float
    num_images: int
    num_equal: int
    num_tied: int
    num_tensors: int


def check_qonnx_parity(model: nn.Module, path: Path, images: Tensor) -> QonnxParity:
    """Execute a QONNX file with qonnx and compare it with the Brevitas network.

    Every stretch of the file from one quantiser to the next is executed on the network's own integers, so
    that a difference shows where it arises: quantised tensors must hold the same integers, and sums of
    products agree to 1e-5 of the tensor's largest magnitude. The documented rounding: where a value lies, to
    within that 1e-5, on the boundary between two integers, the order in which floats are summed decides, so
    a neighbouring integer is accepted, for at most one value in a thousand of a tensor. With power-of-two
    scales sums are exact and this does not occur. The file is also executed from image to logits; there,
    images without such a value must give the same logits, to 1e-5 of the largest magnitude.

    Args:
        model: the network the file was written from; not changed.
        path: the file.
        images: real ones, at least two, float, shape (N, C, H, W).

    Raises:
        DataError: the images have another shape or are not finite.
        ExportError: the file cannot be executed, or disagrees; names the first layer that differs.
    """
    check_qonnx_installed()
    batch = check_images(images)
    network = copy.deepcopy(model).cpu().eval()
    starts = range(0, len(batch), _AT_ONCE)
    parts = [_compare(network, path, batch[start : start + _AT_ONCE]) for start in starts]
    return QonnxParity(
        max_abs_diff=max(part.max_abs_diff for part in parts),
        top1_agreement=sum(part.top1_agreement * part.num_images for part in parts) / len(images),
        num_images=len(images),
        num_equal=sum(part.num_equal for part in parts),
        num_tied=sum(part.num_tied for part in parts),
        num_tensors=parts[0].num_tensors,
    )


def _compare(network: nn.Module, path: Path, images: Tensor) -> QonnxParity:
    calls = record_calls(network, images)
    file = _File(path, images.numpy())
    tied = file.check_layers(calls)
    logits, wanted = file.logits(), calls[-1].value.numpy()
    differ = np.abs(logits - wanted) > _ROUNDING * np.abs(wanted).max()
    differs = differ.reshape(len(images), -1).any(axis=1)
    if (differs & (tied == 0)).any():
        raise ExportError(
            f"{path} disagrees with the network in its logits for {int((differs & (tied == 0)).sum())} of "
            f"{len(images)} images, although every layer agrees: what lies between them is exported wrongly. "
            "Export the network again; if it persists, try another opset."
        )
    same = logits.argmax(axis=-1) == wanted.argmax(axis=-1)
    return QonnxParity(
        max_abs_diff=float(np.abs(logits - wanted).max()),
        top1_agreement=float(same.mean()),
        num_images=len(images),
        num_equal=int((~differs).sum()),
        num_tied=int(tied.sum()),
        num_tensors=len(calls),
    )


class _File:
    """A QONNX file with a batch of images at its input."""

    def __init__(self, path: Path, images: NDArray[np.float32]) -> None:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.change_batchsize import ChangeBatchSize
        from qonnx.transformation.infer_shapes import InferShapes

        self.path, self.images = path, images
        try:
            model = ModelWrapper(str(path))
            self.model = model.transform(ChangeBatchSize(len(images))).transform(InferShapes())
        except Exception as fault:  # qonnx and onnx pass exceptions of every type through
            raise ExportError(f"{path} is no file of qonnx: {fault}. Write it with export_qonnx.") from fault

    def logits(self) -> NDArray[np.float32]:
        """From images to logits."""
        from qonnx.core.onnx_exec import execute_onnx

        graph = self.model.graph
        made = execute_onnx(self.model, {graph.input[0].name: self.images})
        return np.asarray(made[graph.output[0].name])

    def check_layers(self, calls: list[Call]) -> NDArray[np.int64]:
        """Compare every call on the network's own integers; returns values on boundaries per image."""
        from qonnx.core.onnx_exec import execute_node

        graph, opset = self.model.graph, self.model.model.opset_import[0].version
        by_output = self._outputs(calls)
        context = self.model.make_empty_exec_context()
        context[graph.input[0].name] = self.images
        tied = np.zeros(len(self.images), dtype=np.int64)
        for node in graph.node:
            try:
                execute_node(node, context, graph, opset)
            except Exception as fault:  # qonnx raises bare Exception, and passes others through
                raise ExportError(self._not_executable(node, fault)) from fault
            call = by_output.get(node.output[0])
            if call is not None:
                tied += self._check(call, node, context)
                if call.kind == "quantiser":
                    context[node.output[0]] = call.value.numpy()
        return tied

    def _not_executable(self, node: Any, fault: Exception) -> str:
        import onnx

        return (
            f"qonnx cannot execute node {node.name!r} of {self.path} with onnx {onnx.__version__}: {fault}. "
            "If an IR version is named, install the versions of autocompress[fpga] (onnx below 1.23); "
            "otherwise export the network again."
        )

    def _outputs(self, calls: list[Call]) -> dict[str, Call]:
        """Tensor of the file -> the call that it belongs to."""
        names = {node.name: node for node in self.model.graph.node}
        readers = {name: node for node in self.model.graph.node for name in node.input}
        found: dict[str, Call] = {}
        seen: dict[str, int] = {}
        missing = []
        for call in calls:
            count = seen[call.name] = seen.get(call.name, -1) + 1
            node = names.get(identifier(call.name) + (f"_{count}" if count else ""))
            if node is None:
                missing.append(call.name)
                continue
            output = node.output[0]
            if node.op_type == "MatMul" and getattr(call.module, "bias", None) is not None:
                output = readers[output].output[0]
            found[output] = call
        if missing:
            raise ExportError(
                f"{self.path} is not of this network: it has no {', '.join(map(repr, missing))}; export the "
                "network again"
            )
        return found

    def _check(self, call: Call, node: Any, context: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        wanted, got = call.value.numpy(), context[node.output[0]]
        if got.shape != wanted.shape:
            raise ExportError(
                f"{self.path} disagrees with the network, first at {call.name!r}: shape {got.shape} in place "
                f"of {wanted.shape}; export the network again"
            )
        largest = np.abs(wanted).max()
        wrong = ~(np.abs(got - wanted) <= _ROUNDING * largest)
        tied = np.zeros_like(wrong)
        if call.kind == "quantiser":
            step = context[node.input[1]]
            reach = 2 * step if node.op_type == "BipolarQuant" else step
            neighbours = np.abs(got - wanted) <= reach + _ROUNDING * largest
            tied = wrong & neighbours & _on_boundary(context[node.input[0]], step, node.op_type)
            if tied.mean() > _MAX_TIED:
                tied[...] = False
        if (wrong & ~tied).any():
            raise ExportError(
                f"{self.path} disagrees with the network, first at {call.name!r}: "
                f"{int((wrong & ~tied).sum())} of {wrong.size} values differ, by up to "
                f"{np.abs(got - wanted).max():.3g} where the largest magnitude is {largest:.3g}. Export the "
                "network again after its last training step; if it persists, report the layer."
            )
        return np.asarray(tied.reshape(len(tied), -1).sum(axis=1))


def _on_boundary(source: NDArray[Any], step: NDArray[Any], operator: str) -> NDArray[np.bool_]:
    """Where a value lies half-way between two multiples of a step, or at 0 for binary quantisers."""
    q = source / step
    offset = q if operator == "BipolarQuant" else q - np.floor(q) - 0.5
    return np.asarray(np.abs(offset) <= _ROUNDING * np.abs(q).max())
