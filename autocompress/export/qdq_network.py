"""A Brevitas network rewritten in ONNX's own quantisers, in the form that integer kernels are found for."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.core.errors import ExportError
from autocompress.export.brevitas_calls import Call, record_calls

MARK = "autocompress.name"
"""Key of the node metadata that carries names through the exporter."""

_NO_OPERATION = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
_ORDERED: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, F.max_pool1d, F.max_pool2d)
_RESHAPED: tuple[Any, ...] = (
    *(nn.Flatten, torch.flatten, torch.reshape, torch.permute, torch.transpose),
    *("flatten", "view", "reshape", "permute", "transpose", "contiguous"),
)
_KEEPS_GRID = (*_ORDERED, *_RESHAPED)
"""Operations that commute with rounding: they pick or move values."""

_RELUS: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu")
_RELU6: tuple[Any, ...] = (nn.ReLU6, F.relu6)


@dataclass(frozen=True)
class Codes:
    """How the values of a quantised tensor are written as unsigned bytes: ``scale * (q - zero_point)``.

    Args:
        scale: the step; a float32 number.
        zero_point: the byte that stands for 0.
        low, high: smallest and largest byte used.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    def byte(self, value: float) -> int:
        """The code of a value, computed in float32 as a runtime does."""
        unclipped = torch.round(torch.tensor(value) / torch.tensor(self.scale)) + self.zero_point
        return int(unclipped.clamp(self.low, self.high))


def qdq_network(net: fx.GraphModule, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """A copy of a network of Brevitas layers, for PyTorch's exporter only.

    Activations become unsigned bytes whatever their sign: integer kernels of CPUs multiply unsigned by
    signed bytes, and the smallest code is 0, so that only the upper end of a grid narrower than 8 bits needs
    a Clip. Clamps in front of a quantiser become part of its range. Behind max-pooling and reshaping the
    quantiser stands again, and in front of them too, which changes no value and lets them run on bytes.

    Args:
        net: made by ``autocompress.quant.quantize``; not changed.
        input_shape: (C, H, W) of one image.

    Raises:
        ExportError: quantisers that bytes cannot express, all named.
    """
    frozen = copy.deepcopy(net).cpu().eval()
    codes: dict[str, Codes] = {}
    layers: dict[str, nn.Module] = {}
    faults: list[str] = []
    for call in record_calls(frozen, torch.zeros(1, *input_shape)):
        try:
            if call.kind == "quantiser":
                codes[call.name] = _codes(call)
            elif hasattr(call.module, "weight_quant"):
                layers[call.name] = _QdqLayer(call)
        except ExportError as fault:
            faults.append(str(fault))
    if not codes and not layers and not faults:
        faults.append("the network has no quantised layers; write it with export_onnx")
    if faults:
        raise ExportError("\n".join(faults))
    _Rewriter(frozen, codes).rewrite()
    for target, layer in layers.items():
        frozen.set_submodule(target, layer)
    frozen.graph.lint()
    frozen.recompile()
    return frozen


def _codes(call: Call) -> Codes:
    """The codes of an activation quantiser."""
    quantiser = call.module
    bits, signed = int(quantiser.bit_width()), quantiser.is_signed
    if bits > 8 or (bits == 1 and signed):
        what = f"{bits}-bit" if bits > 8 else "binary"
        raise ExportError(
            f"quantiser {call.name!r} makes {what} activations, and QCDQ holds whole numbers of 8 bits; "
            "export as QONNX"
        )
    low = int(quantiser.is_narrow_range) - (1 << (bits - 1)) if signed else 0
    high = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
    scale, zero_point = float(quantiser.scale().detach()), int(quantiser.zero_point().detach())
    return Codes(scale, zero_point - low, 0, high - low)


class _QdqLayer(nn.Module):
    """A convolution or linear layer that reads its weights, and its bias if rounded, as integers."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._name, module = call.name, call.module
        self._module = (module,)  # in a tuple, so that its own weights are not registered here
        weight = module.quant_weight(call.reads)
        if int(weight.bit_width) > 8:
            raise ExportError(
                f"layer {call.name!r} has weights of {int(weight.bit_width)} bits, and QCDQ holds up to 8; "
                "give it at most 8, or 32"
            )
        bias: Any = None if module.bias is None else module.bias_quant(module.bias, call.reads, weight)
        scale = weight.scale.detach().flatten().expand(len(weight.value)).clone()
        self.register_buffer("weight", _integers(weight.value, weight.scale).to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int8))
        self._rounded = bias is not None and not isinstance(bias, Tensor)
        if self._rounded:
            largest = 2**31 - 1
            integers = _integers(bias.value, bias.scale.flatten()).clamp(-largest - 1, largest)
            self.register_buffer("bias", integers.to(torch.int32))
            self.register_buffer("bias_scale", bias.scale.detach().flatten().expand(len(scale)).clone())
        else:
            self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        original: Any = self._module[0]
        operands: Any = (self.weight, self.weight_scale, self.weight_zero)
        weight = _dequantise(operands, self._name, axis=0)
        bias: Any = self.bias
        if self._rounded:
            steps: Any = self.bias_scale
            bias = _dequantise((bias, steps), f"{self._name}.bias", axis=0)
        made: Tensor = original.inner_forward_impl(x, weight, bias)
        return made


def _integers(values: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers that a quantised tensor's values stand for, exact also for large biases."""
    return torch.round(values.detach().double() / scale.detach().double())


class _Quantiser(nn.Module):
    """QuantizeLinear, Clip if the codes need one, DequantizeLinear.

    Args:
        name: of the byte tensor.
        codes: of the tensor.
        on_grid: whether the values that come in lie on the grid already.
    """

    def __init__(self, name: str, codes: Codes, *, on_grid: bool = False) -> None:
        super().__init__()
        self._name = name
        self._clips = not on_grid and (codes.low > 0 or codes.high < 255)
        self.register_buffer("scale", torch.tensor(codes.scale))
        for key in ("zero_point", "low", "high"):
            self.register_buffer(key, torch.tensor(getattr(codes, key), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        symbolic, mark = torch.onnx.ops.symbolic, {MARK: self._name}
        options: Any = {"dtype": torch.uint8, "shape": x.shape, "metadata_props": mark}
        scale: Any = self.scale
        zero_point: Any = self.zero_point
        q = symbolic("::QuantizeLinear", (x, scale, zero_point), **options)
        if self._clips:
            limits: Any = (self.low, self.high)
            q = symbolic("::Clip", (q, *limits), **options)
        return _dequantise((q, scale, zero_point), self._name)


def _dequantise(operands: tuple[Tensor, ...], name: str, *, axis: int | None = None) -> Tensor:
    attributes: Any = None if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(
        "::DequantizeLinear",
        operands,
        attributes,
        dtype=torch.float32,
        shape=operands[0].shape,
        metadata_props={MARK: name},
    )


def _source(node: fx.Node) -> Any:
    """What a node reads first, in nearly all cases the node whose output that is."""
    return node.args[0] if node.args else None


class _Rewriter:
    """Puts ONNX quantisers in the place of Brevitas' ones, and some more where they change nothing."""

    def __init__(self, net: fx.GraphModule, codes: dict[str, Codes]) -> None:
        self._net, self._codes = net, codes
        self._made: dict[fx.Node, Codes] = {}  # quantiser nodes, old and new

    def rewrite(self) -> None:
        for node in list(self._net.graph.nodes):
            if self._is(node, _NO_OPERATION):
                node.replace_all_uses_with(_source(node))
                self._net.graph.erase_node(node)
        for node in list(self._net.graph.nodes):
            if node.op == "call_module" and node.target in self._codes:
                self._place(node, self._codes[node.target])
        for node in list(self._net.graph.nodes):
            if self._is(node, _KEEPS_GRID) and _source(node) in self._made:
                self._repeat_behind(node)

    def _place(self, node: fx.Node, codes: Codes) -> None:
        """Put a quantiser in its place, and in front of the max-pooling, if any, that it stands behind."""
        top = node
        while self._is(_source(top), _ORDERED) and len(_source(top).users) == 1:
            top = _source(top)
        first = self._absorb_clamp(top, codes)
        if top is not node:
            front = self._insert(f"{node.name}_front", first, before=top)
            top.replace_input_with(_source(top), front)
        module = _Quantiser(node.name, first, on_grid=top is not node)
        self._net.set_submodule(str(node.target), module)
        self._made[node] = codes

    def _absorb_clamp(self, reader: fx.Node, codes: Codes) -> Codes:
        """Codes that also do the work of a ReLU or ReLU6 in front of the reader, which is taken out.

        Rounding keeps order, so clamping before it is clamping the codes after it.
        """
        clamp = _source(reader)
        bounds = self._bounds(clamp)
        if bounds is None or len(clamp.users) > 1:
            return codes
        clamp.replace_all_uses_with(_source(clamp))
        self._net.graph.erase_node(clamp)
        low, high = (codes.byte(bound) for bound in bounds)
        return replace(codes, low=max(codes.low, low), high=min(codes.high, high))

    def _bounds(self, node: Any) -> tuple[float, float] | None:
        """Between what an operation clamps its input; None where it is no clamp."""
        if self._is(node, _RELUS):
            return 0.0, math.inf
        if self._is(node, _RELU6):
            return 0.0, 6.0
        if self._is(node, (nn.Hardtanh,)):
            module: Any = self._net.get_submodule(str(node.target))
            return float(module.min_val), float(module.max_val)
        return None

    def _repeat_behind(self, node: fx.Node) -> None:
        """Round what an operation picked or moved again: it is on the grid already, and now seen to be."""
        codes = self._made[_source(node)]
        if all(self._made.get(reader) == codes for reader in node.users):
            return
        readers = list(node.users)
        behind = self._insert(f"{node.name}_again", codes, after=node)
        for reader in readers:
            reader.replace_input_with(node, behind)

    def _insert(
        self, name: str, codes: Codes, *, before: fx.Node | None = None, after: fx.Node | None = None
    ) -> fx.Node:
        self._net.add_submodule(name, _Quantiser(name, codes, on_grid=after is not None))
        graph = self._net.graph
        if before is not None:
            with graph.inserting_before(before):
                made = graph.call_module(name, (_source(before),))
        else:
            with graph.inserting_after(after):
                made = graph.call_module(name, (after,))
        self._made[made] = codes
        return made

    def _is(self, node: Any, kinds: tuple[Any, ...]) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            module = self._net.get_submodule(str(node.target))
            return isinstance(module, tuple(kind for kind in kinds if isinstance(kind, type)))
        return node.op in ("call_function", "call_method") and node.target in kinds
