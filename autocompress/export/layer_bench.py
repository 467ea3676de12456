"""How long layers take in ONNX Runtime on this machine's CPU, each inside a chain of layers.

A layer on its own would pay for changing to the runtime's blocked data layout and back and would find its
weights in the cache, which it does not within a network. So chains are timed, and the runtime's own profile
says how long each layer of a chain took.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import ExportError, RecipeError
from autocompress.core.graph import LayerSpec

PRECISIONS = (8, 32)
"""Bits that can be timed: int8 written as QDQ (unsigned activations, one scale per output channel), float."""

LAYER_OPERATORS = frozenset(
    {"Conv", "FusedConv", "QLinearConv", "Gemm", "FusedGemm", "QGemm", "MatMul", "QLinearMatMul"}
)
"""What ONNX Runtime runs a convolution or linear layer as, after its graph optimisations."""

_OPSET = 18
# 8 bits reach up to 5.99, so the runtime drops a ReLU6 before the quantisation, as in a calibrated network.
_ACT_SCALE = np.float32(0.0235)
_WARM_UP_ROUNDS = 3  # the first runs allocate memory and pack weights
_CLEAN_SHARE = 0.97  # of a run's wall time that must be CPU time of this process
_FEWEST = 4  # times of a layer that are averaged
_UNDISTURBED_MS = 2.0  # shorter layers often run between two interruptions: Linux gives 3 ms and more at once


@dataclass(frozen=True)
class Timing:
    """Times of one network in milliseconds.

    Args:
        network_ms: one sample from end to end, without the profiler.
        layer_ms: of each convolution or linear layer, in the order in which they ran.
        windows: kernel and output size of each float convolution, (height, width, height, width); empty for
            other layers. The runtime may swap parallel branches: these tell them apart.
        names: of each layer in the runtime. Those of a chain contain ``layer`` and its number; other int8
            layers start with their name in the model.
        clean_share: mean share of a run's wall time in which this process had the CPU.
    """

    network_ms: float
    layer_ms: tuple[float, ...]
    windows: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    clean_share: float


@dataclass(frozen=True)
class Chain:
    """Layers that run one after the other.

    Where a layer reads fewer pixels than were written, a 2 x 2 maximum pooling stands between; in front of a
    linear layer the map is flattened, after a global average pooling unless the layer reads every pixel.

    Args:
        layers: not transposed; each must fit what it reads.
        inverted: a ReLU6 after each layer but none after 1 x 1 convolutions with fewer outputs than inputs,
            as in MobileNetV2; otherwise a ReLU after each. ONNX Runtime runs ReLU within a convolution, but
            ReLU6 as one more pass over its output. The last layer has none.
        reads: layer -> layers whose outputs it reads, concatenated; others read the one before.
        adds: layer -> earlier layer whose output is added to its own before the activation.
    """

    layers: tuple[LayerSpec, ...]
    inverted: bool = False
    reads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    adds: Mapping[int, int] = field(default_factory=dict)


def chain_model(chain: Chain, *, bits: int = 32) -> bytes:
    """An ONNX model of a chain with random weights.

    Args:
        chain: at least one layer.
        bits: 32 for float, 8 for int8 as QDQ.

    Raises:
        RecipeError: bits other than 8 and 32, no layers, or layers that do not fit each other.
    """
    layers = chain.layers
    if bits not in PRECISIONS or not layers:
        raise RecipeError(f"a chain needs layers and bits out of {PRECISIONS}, got {len(layers)} and {bits}")
    import onnx

    graph = _Graph(quantised=bits == 8, inverted=chain.inverted, last=layers[-1])
    first = layers[0]
    shape = [1, first.in_channels] + ([] if first.kind == "linear" else list(first.in_hw))
    written = [graph.quantise("images", zero_point=128)]  # by the image, then by each layer
    for index, layer in enumerate(layers):
        sources = chain.reads.get(index, (index - 1,))
        value = graph.joined([written[source + 1] for source in sources])
        value = graph.bridge(value, layers[sources[0]] if index else None, layer)
        added = chain.adds.get(index)
        if added is not None:
            size = replace(layer, in_hw=layer.out_hw, kind="conv")
            added_value = graph.bridge(written[added + 1], layers[added], size)
        written.append(graph.layer(value, layer, index, None if added is None else added_value))
    value = written[-1]
    proto = onnx.helper.make_graph(
        graph.nodes,
        "chain",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None)],
        graph.constants,
    )
    opsets = [onnx.helper.make_opsetid("", _OPSET)]
    model = onnx.helper.make_model(proto, opset_imports=opsets)
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    serialised: bytes = model.SerializeToString()
    return serialised


@dataclass
class _Graph:
    """The nodes and constants of a chain under construction; methods return the name of a value."""

    quantised: bool
    inverted: bool
    last: LayerSpec
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    halves: dict[str, str] = field(default_factory=dict)

    def node(self, operator: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        import onnx

        name = name or f"{operator}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: NDArray[Any]) -> str:
        import onnx

        name = f"constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(values, name))
        return name

    def quantise(self, value: str, *, zero_point: int = 0) -> str:
        """Through 8 unsigned bits and back; nothing in a float chain."""
        if not self.quantised:
            return value
        scales = [self.constant(np.array(_ACT_SCALE)), self.constant(np.array(zero_point, np.uint8))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [value, *scales]), *scales])

    def bridge(self, value: str, before: LayerSpec | None, after: LayerSpec) -> str:
        """What stands between two layers."""
        if before is None or before.kind == after.kind == "linear":
            return value
        height, width = before.out_hw
        halved = (height // 2, width // 2)
        if after.kind == "linear":
            if after.in_channels == before.out_channels * math.prod(halved):
                value = self.halve(value)
            elif after.in_channels != before.out_channels * height * width:
                value = self.quantise(self.node("GlobalAveragePool", [value]))
            return self.quantise(self.node("Flatten", [value]))
        if before.out_hw == after.in_hw:
            return value
        if halved != after.in_hw:
            raise RecipeError(
                f"layer {after.name!r} must read {before.out_hw} pixels, or {halved} after pooling, "
                f"got {after.in_hw}"
            )
        return self.halve(value)

    def halve(self, value: str) -> str:
        """Pooled once, however many read it."""
        if value not in self.halves:
            pooled = self.node("MaxPool", [value], kernel_shape=[2, 2], strides=[2, 2])
            self.halves[value] = self.quantise(pooled)
        return self.halves[value]

    def joined(self, values: Sequence[str]) -> str:
        if len(values) == 1:
            return values[0]
        return self.quantise(self.node("Concat", values, axis=1))

    def layer(self, value: str, layer: LayerSpec, index: int, added: str | None) -> str:
        """A layer; the runtime's name for it starts with ``layer`` and its index."""
        fan_in = layer.kernel_weights // layer.out_channels
        window = layer.kernel if layer.kind == "conv" else ()
        shape = (layer.out_channels, layer.in_channels // layer.groups, *window)
        weights = self.rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(fan_in))
        inputs = [value, *self.parameters(weights)]
        name = f"layer{index}"
        if layer.kind == "linear":
            value = self.node("Gemm", inputs, f"{name}_", transB=1)
        else:
            sizes = {"kernel_shape": layer.kernel, "strides": layer.stride, "pads": _pads(layer)}
            value = self.node("Conv", inputs, f"{name}_", group=layer.groups, **sizes)
        if added is not None:
            value = self.node("Add", [self.quantise(value, zero_point=128), added], f"{name}_sum")
        return self.quantise(self.activation(value, layer, f"{name}_out"))

    def activation(self, value: str, layer: LayerSpec, name: str) -> str:
        if layer is self.last:
            return value
        if not self.inverted:
            return self.node("Relu", [value], name)
        if layer.kind == "conv" and layer.kernel == (1, 1) and layer.out_channels < layer.in_channels:
            return value
        bounds = [self.constant(np.array(bound, np.float32)) for bound in (0, 6)]
        return self.node("Clip", [value, *bounds], name)

    def parameters(self, weights: NDArray[np.float32]) -> list[str]:
        """Weights and biases; at 8 bits one weight scale per output channel and biases of 32 bits."""
        channels = len(weights)
        if not self.quantised:
            return [self.constant(weights), self.constant(np.zeros(channels, np.float32))]
        scale = np.abs(weights).reshape(channels, -1).max(axis=1) / np.float32(127)
        levels = np.rint(weights / scale.reshape(-1, *[1] * (weights.ndim - 1))).astype(np.int8)
        weight = [self.constant(levels), self.constant(scale), self.constant(np.zeros(channels, np.int8))]
        bias = [
            self.constant(np.zeros(channels, np.int32)),
            self.constant(scale * _ACT_SCALE),
            self.constant(np.zeros(channels, np.int32)),
        ]
        return [self.node("DequantizeLinear", given, axis=0) for given in (weight, bias)]


def _pads(layer: LayerSpec) -> list[int]:
    """Padding (top, left, bottom, right) that gives the layer's output size."""
    totals = [
        max(0, (size - 1) * stride + kernel - given)
        for size, stride, kernel, given in zip(
            layer.out_hw, layer.stride, layer.kernel, layer.in_hw, strict=True
        )
    ]
    return [total // 2 for total in totals] + [total - total // 2 for total in totals]


def time_networks(
    models: Mapping[str, bytes | Path],
    *,
    runs: int,
    threads: int = 1,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Timing]:
    """Time ONNX models at batch 1, as wholes and layer by layer.

    The models take turns within one loop, because a machine's speed drifts. Networks are timed by the CPU
    time of this process where there is one thread, layers by the wall time of the runtime's profiler, and of
    each the faster half is averaged. Where others use the CPU too, fewer times of a layer are: as many as
    half the clean runs, but at least 4. A layer so long that it is never left alone is given its run's share
    of the CPU.

    Args:
        models: name -> ONNX file, or its bytes.
        runs: timed runs of each model, with and without the profiler.
        threads: ONNX Runtime's threads within an operator; interruptions can only be seen with one.
        on_round: called with rounds done and rounds there are.

    Raises:
        RecipeError: runs or threads below 1.
        ExportError: ONNX Runtime cannot read a model.
    """
    if runs < 1 or threads < 1:
        raise RecipeError(f"runs and threads must be at least 1, got {runs} and {threads}")
    with tempfile.TemporaryDirectory() as folder:
        plain = {name: _Bench(model, threads) for name, model in models.items()}
        traced = {
            name: _Bench(model, threads, str(Path(folder) / f"profile{i}"))
            for i, (name, model) in enumerate(models.items())
        }
        for number in range(_WARM_UP_ROUNDS + runs):
            for bench in (*plain.values(), *traced.values()):
                bench.run()
            on_round(number + 1, _WARM_UP_ROUNDS + runs)
        return {name: _timing(plain[name], traced[name]) for name in models}


class _Bench:
    """One session and the wall and CPU time of each of its runs."""

    def __init__(self, model: bytes | Path, threads: int, profile: str | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        # Threads that wait by spinning would count as CPU time and slow their neighbours down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        try:
            source = model if isinstance(model, bytes) else str(model)
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as fault:  # ONNX Runtime's exceptions share no public base class
            raise ExportError(
                f"ONNX Runtime {onnxruntime.__version__} cannot time a model: {fault}"
            ) from fault
        given = self.session.get_inputs()[0]
        shape = [size if isinstance(size, int) else 1 for size in given.shape]
        self.feed = {given.name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        self.threads = threads
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []

    def run(self) -> None:
        wall, cpu = time.perf_counter_ns(), time.process_time_ns()
        self.session.run(None, self.feed)
        self.cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
        self.wall_ms.append((time.perf_counter_ns() - wall) / 1e6)

    def shares(self) -> NDArray[np.float64]:
        """Of each timed run: CPU time over wall time, or 1 where several threads hide it."""
        wall, cpu = (np.array(times[_WARM_UP_ROUNDS:]) for times in (self.wall_ms, self.cpu_ms))
        return np.minimum(cpu / wall, 1.0) if self.threads == 1 else np.ones_like(wall)


def _timing(plain: _Bench, traced: _Bench) -> Timing:
    events, windows, names = _layer_events(Path(traced.session.end_profiling()))
    durations = np.array(events[_WARM_UP_ROUNDS:]) / 1e3
    # CPU time of a whole run is exact even when others interrupted it; the profile has wall time only.
    network = np.array((plain.cpu_ms if plain.threads == 1 else plain.wall_ms)[_WARM_UP_ROUNDS:])
    shares = traced.shares()
    layers = undisturbed_ms(durations, shares)
    return Timing(
        float(_fastest(network[:, None], max(1, len(network) // 2))[0]),
        tuple(map(float, layers)),
        windows,
        names,
        float(shares.mean()),
    )


def undisturbed_ms(durations: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each layer takes when nobody else uses the CPU, shape (layers,).

    Args:
        durations: wall time in each run, shape (runs, layers), in milliseconds.
        shares: CPU time over wall time of each run, shape (runs,).
    """
    num_clean = int((shares >= _CLEAN_SHARE).sum())
    # An interruption hits few layers of a run; the others are as good as those of a clean run.
    layers = _fastest(durations, max(_FEWEST, num_clean // 2))
    shared = np.median(durations * shares[:, None], axis=0)
    return np.where(layers > _UNDISTURBED_MS, np.minimum(layers, shared), layers)


def _fastest(times: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Mean of the smallest times of each column: steadier than the minimum, blind to outliers."""
    return np.asarray(np.sort(times, axis=0)[:count].mean(axis=0))


def _layer_events(profile: Path) -> tuple[list[list[float]], tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Microseconds of every layer in every run, and the layers' windows and names."""
    runs: list[list[float]] = []
    layers: list[Mapping[str, Any]] = []
    # Events stand in the order in which they ended: a run's nodes, then the run itself.
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["args"].get("op_name") in LAYER_OPERATORS:
            layers.append(event)
        elif event.get("name") == "model_run":
            runs.append([float(layer["dur"]) for layer in layers])
            windows = tuple(_window(layer["args"]) for layer in layers)
            names = tuple(str(layer["name"]).removesuffix("_kernel_time") for layer in layers)
            layers = []
    return runs, windows, names


def _window(args: Mapping[str, Any]) -> tuple[int, ...]:
    weights = next((shape for shape in map(_shape, args["input_type_shape"][1:]) if len(shape) == 4), ())
    return (*weights[2:], *_shape(args["output_type_shape"][0])[2:]) if weights else ()


def _shape(entry: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    return tuple(int(size) for size in next(iter(entry.values())))
