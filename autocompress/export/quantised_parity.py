"""Does a quantised ONNX file compute what the Brevitas network computes, layer by layer and end to end?"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import ExportError
from autocompress.export.brevitas_calls import Call, record_calls
from autocompress.export.parity import Parity, check_images, compare_logits
from autocompress.export.session import open_session

_AT_ONCE = 8  # images whose intermediate tensors are held together
_ROUNDING = 1e-5
"""Largest difference of a float32 sum, as a share of the tensor's largest magnitude, that the order of its
terms explains: about 30 roundings of 2**-24, grown over some thousand terms."""
_MADE = ".made"
_REMEDY = (
    "Export the network again after its last training step; if it persists, this CPU's integer kernels or "
    "the translation of that layer are at fault."
)


@dataclass(frozen=True)
class QuantisedParity:
    """How far ONNX Runtime is from Brevitas.

    Args:
        as_written: the logits of the file run node by node, with float arithmetic between quantisers.
        as_run: the logits with integer kernels, as users run it.
        rounded_otherwise: share of all quantised values, in [0, 1], that an integer kernel rounds to the
            other side when it is given Brevitas' integers; each lies on the boundary between the two.
        num_tensors: quantised tensors compared for each image.
    """

    as_written: Parity
    as_run: Parity
    rounded_otherwise: float
    num_tensors: int


def check_quantised_parity(
    net: nn.Module, path: Path, images: Tensor, *, tolerance: float = 0.1
) -> QuantisedParity:
    """Compare a file of ``export_qcdq`` in ONNX Runtime (CPU) with its Brevitas network, in two ways.

    Layer by layer: every layer is given Brevitas' integers and must make Brevitas' integers, and the last one
    its logits to 1e-5 of their range. One exception is rounding: where the value lies on the boundary between
    two integers to within 1e-5 of the tensor's largest magnitude, the order in which floats are summed
    decides, and the neighbour is accepted. End to end: the logits agree within the tolerance, which such
    neighbours need when later layers amplify them, and so do the best classes, except for images whose two
    best logits Brevitas itself holds to be equal within it.

    Both are done twice: with the file run as it is written, and with the integer kernels that ONNX Runtime
    puts in place of its nodes by default. On CPUs without VNNI, integer kernels of ONNX Runtime may saturate
    sums of two products at 16 bits; this check finds it.

    Args:
        net: the network the file was written from; not changed.
        path: the file.
        images: real ones, at least two, float, shape (N, C, H, W).
        tolerance: largest end-to-end difference, as a share of the range of Brevitas' logits.

    Raises:
        DataError: the images have another shape or are not finite.
        ExportError: the file cannot be run, or disagrees; names the first layer that differs.
    """
    batch = check_images(images)
    network = copy.deepcopy(net).cpu().eval()
    quantisers = [call.name for call in record_calls(network, batch[:1]) if call.kind == "quantiser"]
    with tempfile.TemporaryDirectory() as folder:
        cut, zero_points = _cut(path, quantisers, Path(folder) / "cut.onnx")
        sessions = {mode: open_session(cut, integer_kernels=mode) for mode in (False, True)}
    num_values, num_otherwise = 0, dict.fromkeys(sessions, 0)
    logits = []
    for chunk in batch.split(_AT_ONCE):  # type: ignore[no-untyped-call]
        wanted = _run_brevitas(network, chunk, zero_points)
        num_values += sum(step.codes.size for step in wanted.steps)
        logits.append(wanted.logits)
        for mode, session in sessions.items():
            num_otherwise[mode] += _compare_steps(path, session, chunk.numpy(), wanted)
    everything = np.concatenate(logits)
    as_written, as_run = (_end_to_end(path, everything, batch, tolerance, mode) for mode in sessions)
    share = num_otherwise[True] / num_values if num_values else 0.0
    return QuantisedParity(as_written, as_run, share, len(quantisers))


def _end_to_end(
    path: Path, wanted: NDArray[np.float32], images: Tensor, tolerance: float, integer_kernels: bool
) -> Parity:
    try:
        return compare_logits(wanted, open_session(path, integer_kernels=integer_kernels), images, tolerance)
    except ExportError as fault:
        raise ExportError(
            f"{fault} Every layer by itself agrees; where the accuracy is as it should be, the network "
            "amplifies values that round to the other side, and a larger tolerance is in place."
        ) from fault


@dataclass(frozen=True)
class _Step:
    """A quantised tensor in Brevitas.

    Args:
        name: of the byte tensor in the file.
        maker: what made the tensor, for messages.
        codes: the bytes.
        position: the values before rounding, in steps.
        slack: by how much a position may be off, in steps.
    """

    name: str
    maker: str
    codes: NDArray[np.uint8]
    position: NDArray[np.float64]
    slack: float


@dataclass(frozen=True)
class _Wanted:
    """What Brevitas makes of some images.

    Args:
        steps: every quantised tensor, in execution order.
        logits: shape (N, classes).
        maker: what made the logits, for messages.
        slack: by how much a logit may be off.
    """

    steps: list[_Step]
    logits: NDArray[np.float32]
    maker: str
    slack: float


def _run_brevitas(network: nn.Module, images: Tensor, zero_points: dict[str, int]) -> _Wanted:
    outputs: list[Any] = []
    handle = network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        calls = record_calls(network, images)
    finally:
        handle.remove()
    steps, depth, maker = [], 0, ""
    for call in calls:
        depth += call.kind == "layer"
        maker = f"layer {call.name!r}" if call.kind == "layer" else maker or f"quantiser {call.name!r}"
        if call.kind == "quantiser":
            steps.append(_step(call, maker, zero_points[call.name], depth))
            depth, maker = 0, ""
    logits: Tensor = outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1].value
    values = logits.detach().numpy()
    return _Wanted(steps, values, maker or "its output", _slack(values, depth))


def _step(call: Call, maker: str, zero_point: int, depth: int) -> _Step:
    scale = float(call.module.scale().detach())
    reads = call.reads if isinstance(call.reads, Tensor) else call.reads.value
    codes = torch.round(call.value.double() / scale) + zero_point
    position = (reads.detach().double() / scale).numpy()
    return _Step(call.name, maker, codes.numpy().astype(np.uint8), position, _slack(position, depth))


def _slack(values: NDArray[Any], depth: int) -> float:
    """How far the sums of ``depth`` layers between two quantisers may be off."""
    return _ROUNDING * max(1, depth) * float(np.abs(values).max())


def _compare_steps(path: Path, session: Any, images: NDArray[np.float32], wanted: _Wanted) -> int:
    """How many values fall to the other side of a boundary; raises where something else differs."""
    steps, logits = wanted.steps, wanted.logits
    given = {session.get_inputs()[0].name: images, **{step.name: step.codes for step in steps}}
    try:
        *made, got = session.run([*(step.name + _MADE for step in steps), "logits"], given)
    except Exception as fault:  # ONNX Runtime's exceptions share no public base class
        raise ExportError(
            f"{path} cannot be run layer by layer: {fault}. Export the network again."
        ) from fault
    num_otherwise = 0
    for step, codes in zip(steps, made, strict=True):
        differs = codes != step.codes
        distance = np.abs(codes.astype(np.int16) - step.codes.astype(np.int16))
        beyond = np.abs(step.position - np.floor(step.position) - 0.5)  # from the boundary, in steps
        wrong = differs & ~((distance <= 1) & (beyond <= step.slack))
        if wrong.any():
            raise ExportError(
                f"{path} disagrees with the network, first at {step.maker}: {int(wrong.sum())} of "
                f"{wrong.size} values of {step.name!r} differ, by up to {int(distance[wrong].max())} steps, "
                f"although both were given the same integers. {_REMEDY}"
            )
        num_otherwise += int(differs.sum())
    difference = float(np.abs(got - logits).max())
    if not difference <= wanted.slack:
        raise ExportError(
            f"{path} disagrees with the network, first at {wanted.maker}: logits differ by up to "
            f"{difference:.3g} (allowed {wanted.slack:.3g}), although both were given the same integers. "
            f"{_REMEDY}"
        )
    return num_otherwise


def _cut(path: Path, quantisers: list[str], target: Path) -> tuple[Path, dict[str, int]]:
    """A copy of the file whose quantised tensors are inputs, and what is made of them outputs.

    Returns:
        The copy, and the zero point of each quantised tensor.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    graph = proto.graph
    types = {value.name: value for value in graph.value_info}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    zero_points = {
        node.input[0]: int(numpy_helper.to_array(constants[node.input[2]]))
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantisers
    }
    if missing := [name for name in quantisers if name not in zero_points or name not in types]:
        raise ExportError(
            f"{path} lacks quantised tensors of the network: {', '.join(missing)}; it was written from "
            "another network or plan, export it again"
        )
    for node in graph.node:
        node.output[:] = [name + _MADE if name in zero_points else name for name in node.output]
    for name in quantisers:
        graph.input.append(types[name])
        made = graph.output.add()
        made.CopyFrom(types[name])
        made.name = name + _MADE
    target.write_bytes(proto.SerializeToString())
    return target, zero_points
