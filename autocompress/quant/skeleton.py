"""A network made ready for quantisation: BatchNorm folded, and every place found that needs a quantiser."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import Bits
from autocompress.quant.folding import folded_graph

INNER_BITS = 8
"""Bits of tensors that additions, concatenations and average pooling read, which no plan decides."""

Layer = nn.Conv1d | nn.Conv2d | nn.Linear
LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Linear)
_REFUSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d, nn.RNNBase)

_KEEPS_VALUES: tuple[Any, ...] = (
    *(nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, F.max_pool1d, F.max_pool2d, nn.ZeroPad2d, F.pad, F.dropout),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose),
    *("flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "contiguous"),
)
"""Operations whose outputs are some of their inputs, or zeros."""

_CROSSED: tuple[Any, ...] = (
    *(nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.MaxPool1d, nn.MaxPool2d),
    *(F.max_pool1d, F.max_pool2d, F.dropout, torch.flatten, torch.reshape, "flatten", "view", "reshape"),
)
"""Those in front of which a quantiser is placed: Brevitas carries scales through them, and tools for FPGAs
expect it there."""

_SPLITS: tuple[Any, ...] = (torch.chunk, torch.split, "chunk", "split")

_RECTIFIERS: tuple[Any, ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    F.relu,
    torch.relu,
    F.relu6,
    F.hardtanh,
    "relu",
)
"""Cheap clamps that an integer kernel does while it rounds; nothing is quantised in front of them."""


@dataclass(frozen=True)
class Use:
    """One reader of a quantised tensor.

    Args:
        source: name of the fx node whose output is quantised.
        reader: name of the fx node in whose input the quantised tensor takes the place of the plain one.
        layer: module name of the convolution or linear layer that reads it in the end; None for other
            operations, which read :data:`INNER_BITS`.
    """

    source: str
    reader: str
    layer: str | None


class Skeleton:
    """A copy of a network with BatchNorm folded into its layers, as an fx graph, and its quantiser uses.

    What a layer reads is quantised at the layer's activation bits. What a layer makes, after its ReLU if one
    follows, is quantised at 8 bits before any other operation computes with it (addition, concatenation,
    average pooling, multiplication), so that integers flow between layers. Quantisers are placed in front
    of max-pooling, flattening and the like, which they commute with. The network's output is not quantised.

    Args:
        model: a trained network; it is copied, never changed.

    Raises:
        UnsupportedModelError: the network cannot be traced symbolically, reuses a layer, or holds a layer
            that cannot be quantised; names them all, with remedies.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graph_module = folded_graph(model)
        self._check()
        self.layers: dict[str, Layer] = {
            str(node.target): self.graph_module.get_submodule(str(node.target))  # type: ignore[misc]
            for node in self._layer_nodes()
        }
        self.uses: tuple[Use, ...] = tuple(self._find_uses())

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the fx nodes whose outputs may be quantised, in execution order."""
        wanted = {use.source for use in self.uses}
        return tuple(node.name for node in self.graph_module.graph.nodes if node.name in wanted)

    def source_of(self, layer: str) -> str:
        """The node whose output a layer reads."""
        return next(use.source for use in self.uses if use.layer == layer)

    def instrumented(
        self,
        bits: Mapping[str, Bits],
        *,
        make_quantiser: Callable[[str, int], nn.Module],
        make_layer: Callable[[str, Bits], nn.Module],
        make_plain: Callable[[], nn.Module] | None = None,
        finish: Callable[[fx.Graph, Mapping[str, Any]], None] | None = None,
    ) -> fx.GraphModule:
        """A copy with quantisers and other layers put in, in evaluation mode.

        Layers without bits, or with 32, stay as they are. Readers of one tensor at equal bits share one
        quantiser; a tensor read at several widths is rounded to :data:`INNER_BITS` first (or to the widest)
        and from there to the others, so that the layer that makes it writes integers.

        Args:
            bits: layer -> bit-widths.
            make_quantiser: (source, bits) -> module that maps the tensor to its quantised values.
            make_layer: (layer, bits) -> module in the layer's place.
            make_plain: module that turns a quantised tensor into a plain one, for readers that are no layers.
            finish: a last change of the graph, whose nodes name these modules, before code is made of it.

        Raises:
            ValueError: a layer the network lacks.
        """
        if unknown := sorted(set(bits) - set(self.layers)):
            raise ValueError(f"no layer named {unknown}; the network has {sorted(self.layers)}")
        graph = copy.deepcopy(self.graph_module.graph)
        nodes = {node.name: node for node in graph.nodes}
        targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        modules = {target: operator.attrgetter(target)(self.graph_module) for target in targets}
        made: dict[tuple[str, int], fx.Node] = {}
        plain: dict[str, fx.Node] = {}
        reads = self._reads(bits)
        widths: dict[str, set[int]] = {}
        for use, width in reads:
            widths.setdefault(use.source, set()).add(width)

        def quantised_at(name: str, width: int) -> fx.Node:
            if (name, width) not in made:
                first = max(INNER_BITS, *widths[name])
                alone = len(widths[name]) == 1 or width == first
                before = nodes[name] if alone else quantised_at(name, first)
                modules[f"{name}_quant{width}"] = make_quantiser(name, width)
                with graph.inserting_after(before):
                    made[name, width] = graph.call_module(f"{name}_quant{width}", (before,))
            return made[name, width]

        for use, width in reads:
            source, quantised = nodes[use.source], quantised_at(use.source, width)
            if use.layer is None and make_plain is not None:
                if use.source not in plain:
                    modules[f"{use.source}_plain"] = make_plain()
                    with graph.inserting_after(quantised):
                        plain[use.source] = graph.call_module(f"{use.source}_plain", (quantised,))
                quantised = plain[use.source]
            nodes[use.reader].replace_input_with(source, quantised)
        for layer, chosen in bits.items():
            if chosen != Bits():
                modules[layer] = make_layer(layer, chosen)
        if finish is not None:
            finish(graph, modules)
        return fx.GraphModule(modules, graph).eval()

    def _reads(self, bits: Mapping[str, Bits]) -> list[tuple[Use, int]]:
        """The uses that read quantised tensors under some bits, with their widths."""
        if all(chosen.act >= 32 for chosen in bits.values()):
            return []
        widths = [
            (use, INNER_BITS if use.layer is None else bits.get(use.layer, Bits()).act) for use in self.uses
        ]
        return [(use, width) for use, width in widths if width < 32]

    def _layer_nodes(self) -> list[fx.Node]:
        return [node for node in self.graph_module.graph.nodes if self._is(node, LAYER_TYPES)]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is(self, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
        module = self._module(node)
        if module is not None:
            return isinstance(module, tuple(k for k in kinds if isinstance(k, type)))
        return node.op in ("call_function", "call_method") and node.target in kinds

    def _check(self) -> None:
        faults = []
        seen: set[str] = set()
        for node in self.graph_module.graph.nodes:
            module = self._module(node)
            if isinstance(module, _REFUSED):
                faults.append(
                    f"layer {node.target!r} ({type(module).__name__}) cannot be quantised; "
                    "replace it (an up-sampling and a convolution for a transposed one)"
                )
            if isinstance(module, LAYER_TYPES):
                if str(node.target) in seen:
                    faults.append(
                        f"layer {node.target!r} runs more than once; give each call a layer of its own"
                    )
                if getattr(module, "padding_mode", "zeros") != "zeros":
                    faults.append(
                        f"layer {node.target!r} pads with {module.padding_mode!r}, which integer kernels "
                        "cannot; pad with zeros"
                    )
                seen.add(str(node.target))
            if node.op == "call_function" and node.target in (
                F.conv1d,
                F.conv2d,
                F.linear,
                F.conv_transpose2d,
            ):
                faults.append(f"operation {node.name!r} has no module; write it as nn.Conv2d or nn.Linear")
        if not seen and not faults:
            faults.append("the network has no convolution or linear layer to quantise")
        if faults:
            raise UnsupportedModelError("\n".join(faults))

    def _find_uses(self) -> Iterator[Use]:
        for node in self.graph_module.graph.nodes:
            if self._is(node, LAYER_TYPES):
                source, reader = self._hoisted(node, node.args[0])
                yield Use(source.name, reader.name, str(node.target))
            elif node.op in ("call_module", "call_function", "call_method") and self._computes(node):
                for operand in dict.fromkeys(node.all_input_nodes):
                    source, reader = self._hoisted(node, operand)
                    if self._from_layer(source):
                        yield Use(source.name, reader.name, None)

    def _keeps_values(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return not isinstance(node.args[1], int)  # a slice of a tensor, not one of several outputs
        return self._is(node, _KEEPS_VALUES)

    def _computes(self, node: fx.Node) -> bool:
        """Whether an operation makes new values from tensors, other than a layer or a clamp."""
        if self._keeps_values(node) or self._is(node, _RECTIFIERS) or self._is(node, _SPLITS):
            return False
        return node.target not in (getattr, operator.getitem, "size", "dim")

    def _hoisted(self, reader: fx.Node, source: Any) -> tuple[fx.Node, fx.Node]:
        """The topmost node that a quantiser may be moved up to, and its reader on the way down."""
        while self._is(source, _CROSSED) and len(source.users) == 1:
            reader, source = source, source.args[0]
        return source, reader

    def _from_layer(self, node: fx.Node) -> bool:
        """Whether a tensor is made by a layer, a clamp behind it, or an addition or concatenation."""
        if node.op in ("placeholder", "get_attr"):
            return False
        passes = node.target is operator.getitem or self._is(node, _SPLITS) or self._is(node, _RECTIFIERS)
        if passes or self._keeps_values(node):
            return self._from_layer(node.all_input_nodes[0])
        return self._is(node, LAYER_TYPES) or self._is(node, _JOINS)


_JOINS: tuple[Any, ...] = (operator.add, torch.add, torch.cat, "add")
