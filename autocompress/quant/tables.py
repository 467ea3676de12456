"""Weights rounded once per layer and bit-width, and the fast quantised network a search evaluates."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant.calibration import Calibration
from autocompress.quant.grids import Grid, has_integer_bias, quantise_bias, symmetric
from autocompress.quant.ranges import clip_thresholds
from autocompress.quant.skeleton import LAYER_TYPES, Layer, Skeleton

_MAX_BYTES = 1 << 30  # of rounded weights kept; the least recently used go first


@dataclass(frozen=True)
class RoundedWeight:
    """A layer's weights on their grid.

    Args:
        grid: its threshold has shape (out, 1, ...) or (1,).
        values: dequantised, in the weight's shape.
        bias_shift: what the rounding adds to each output on average, shape (out,).
    """

    grid: Grid
    values: Tensor
    bias_shift: Tensor


class QuantTables:
    """Everything a plan of bits needs to become a network, computed when first asked for and kept.

    Args:
        skeleton: the network.
        calibration: its activation statistics; its settings also rule the weights.
    """

    def __init__(self, skeleton: Skeleton, calibration: Calibration) -> None:
        self.skeleton, self.calibration = skeleton, calibration
        self._weights: OrderedDict[tuple[str, int], RoundedWeight] = OrderedDict()
        self._bytes = 0

    def weight(self, layer: str, bits: int) -> RoundedWeight:
        """A layer's weights rounded to some bits."""
        key = (layer, bits)
        if key not in self._weights:
            self._weights[key] = self._rounded(layer, bits)
            self._bytes += self._weights[key].values.nbytes
            while self._bytes > _MAX_BYTES and len(self._weights) > 1:
                _, oldest = self._weights.popitem(last=False)
                self._bytes -= oldest.values.nbytes
        self._weights.move_to_end(key)
        return self._weights[key]

    def bias(self, layer: str) -> Tensor | None:
        """A layer's float bias, or None."""
        bias = self.skeleton.layers[layer].bias
        return None if bias is None else bias.detach()

    def corrected_bias(self, layer: str, weight_bits: int) -> Tensor | None:
        """The bias before it is rounded: the float one less the mean error of the rounded weights."""
        bias = self.bias(layer)
        if bias is None or weight_bits >= 32 or not self.calibration.settings.bias_correction:
            return bias
        return bias - self.weight(layer, weight_bits).bias_shift

    def input_grid(self, layer: str, bits: int) -> Grid:
        """The grid of what a layer reads."""
        return self.calibration.grid(self.skeleton.source_of(layer), bits)

    def network(self, plan: Plan, *, keep_inputs: bool = False) -> fx.GraphModule:
        """The quantised network of a plan, for evaluation only; equal to the Brevitas one to the last bit.

        Costs a small share of one evaluation: weights come from the table, and a quantiser behind a ReLU
        does the ReLU's work and rounds in place.

        Args:
            plan: its ``bits`` name layers of the network; without bits it is the float network.
            keep_inputs: no operation writes into its inputs, for those who keep tensors of inner nodes.

        Raises:
            ValueError: a layer the network lacks, or bits that no grid has.
        """
        return self.skeleton.instrumented(
            plan.bits,
            make_quantiser=lambda source, bits: Quantiser(self.calibration.grid(source, bits)),
            make_layer=self._layer,
            finish=_without_clamps if keep_inputs else _save_passes,
        )

    def _layer(self, layer: str, bits: Bits) -> nn.Module:
        original = self.skeleton.layers[layer]
        if bits.weight >= 32:
            return original
        rounded = self.weight(layer, bits.weight)
        bias = self.corrected_bias(layer, bits.weight)
        if bias is not None and has_integer_bias(bits):
            bias = quantise_bias(bias, self.input_grid(layer, bits.act).scale, rounded.grid.scale)
        return FixedLayer(original, rounded.values, bias)

    def _rounded(self, layer: str, bits: int) -> RoundedWeight:
        module = self.skeleton.layers[layer]
        weight = module.weight.detach().float()
        settings = self.calibration.settings
        rows = weight.flatten(1) if settings.per_channel else weight.flatten()[None]
        thresholds = clip_thresholds(rows.cpu(), bits, settings.weight_range, signed=True, narrow=True)
        shape = (-1, *[1] * (weight.ndim - 1)) if settings.per_channel else ()
        grid = symmetric(
            thresholds.reshape(shape), bits, signed=True, narrow=True, power_of_two=settings.power_of_two
        )
        values = grid.quantise(weight)
        means = self.calibration.activations[self.skeleton.source_of(layer)].channel_means
        return RoundedWeight(grid, values, _mean_shift(module, values - weight, means))


def _mean_shift(module: Layer, error: Tensor, means: Tensor) -> Tensor:
    """Mean change of each output when the weights change by ``error``, borders aside.

    Source: Nagel et al., "Data-Free Quantization", ICCV 2019, section 4.2 (empirical form: the mean input
    comes from calibration images).
    """
    per_input = error.flatten(2).sum(dim=2) if error.ndim > 2 else error
    groups = getattr(module, "groups", 1)
    inputs = per_input.shape[1] * groups
    if len(means) != inputs:  # a flatten in between: each channel became several features
        means = (
            means.repeat_interleave(inputs // len(means)) if inputs % len(means) == 0 else means.mean()[None]
        )
        means = means.expand(inputs) if len(means) == 1 else means
    by_group = means.reshape(groups, -1)
    outputs = per_input.reshape(groups, -1, per_input.shape[1])
    return torch.einsum("goi,gi->go", outputs, by_group).flatten()


class Quantiser(nn.Module):
    """Rounds a tensor to a fixed grid.

    Args:
        grid: the grid.
        in_place: write the rounded values into the input, which nothing else may read.
    """

    def __init__(self, grid: Grid, *, in_place: bool = False) -> None:
        super().__init__()
        self.grid, self.in_place = grid, in_place

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values of the grid, shape of ``x``."""
        return self.grid.quantise(x.detach(), in_place=self.in_place)


class FixedLayer(nn.Module):
    """A convolution or linear layer with given weights and bias."""

    def __init__(self, original: Layer, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that its own weights are not registered here
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """As the original layer's."""
        original = self._original[0]
        if isinstance(original, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        made: Tensor = original._conv_forward(x, self.weight, self.bias)
        return made


def _save_passes(graph: fx.Graph, modules: Mapping[str, Any]) -> None:
    """Let quantisers do the work of clamps in front of them, and round in place what only they read."""
    _without_clamps(graph, modules)
    for node in graph.nodes:
        quantiser = _called(node, modules)
        if isinstance(quantiser, Quantiser):
            quantiser.in_place = _is_own(node.args[0], modules)


def _without_clamps(graph: fx.Graph, modules: Mapping[str, Any]) -> None:
    """Take out clamps from 0 that only quantisers read which clamp as much."""
    for node in list(graph.nodes):
        top = _clamped_at(node, modules)
        if top is None or not node.users:
            continue
        grids = [getattr(_called(user, modules), "grid", None) for user in node.users]
        if all(grid is not None and _clamps_too(grid, top) for grid in grids):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _called(node: fx.Node, modules: Mapping[str, Any]) -> Any:
    """The module that a node calls, or None."""
    return modules[str(node.target)] if node.op == "call_module" else None


def _clamped_at(node: fx.Node, modules: Mapping[str, Any]) -> float | None:
    """The upper end of a clamp from 0; None for any other operation."""
    module = _called(node, modules)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(module.max_val) if module.min_val == 0 else None
    if isinstance(module, nn.ReLU) or (module is None and node.target in (F.relu, torch.relu, "relu")):
        return math.inf
    return 6.0 if node.target is F.relu6 else None


def _clamps_too(grid: Grid, top: float) -> bool:
    """Whether rounding to a grid gives the same with and without a clamp to [0, top] in front."""
    if grid.signed or grid.zero_point is not None:
        return False
    return bool((grid.integers(torch.full_like(grid.threshold, top)) == grid.high).all())


_FRESH = (operator.add, torch.add, torch.cat)


def _is_own(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    """Whether a node's output is memory of its own that a single node reads."""
    made_by = _called(node, modules)
    fresh = isinstance(made_by, (*LAYER_TYPES, FixedLayer, Quantiser)) or node.target in _FRESH
    return fresh and len(node.users) == 1
