"""The quantised network in Brevitas layers: what is trained, exported and measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant.grids import Grid, has_integer_bias
from autocompress.quant.skeleton import Layer
from autocompress.quant.tables import QuantTables

_SMALLEST_SCALE = 1e-30  # Brevitas' own limit, 1e-10, would change the values of nearly dead channels


def quantize(tables: QuantTables, plan: Plan) -> fx.GraphModule:
    """A network of Brevitas layers with the bits of a plan, ready for training and export.

    Weights keep their float values and are rounded on the fly with straight-through gradients; clipping
    thresholds of weights and activations are parameters that training adjusts; biases are rounded to 32 bits
    at the accumulator's scale. In evaluation mode its values are those of ``tables.network(plan)`` to the
    last bit.

    Args:
        tables: the float network with its calibration; not changed.
        plan: its ``bits`` name layers of the network.

    Raises:
        ValueError: a layer the network lacks, or bits that no grid has.
    """

    def make_layer(layer: str, bits: Bits) -> nn.Module:
        original = tables.skeleton.layers[layer]
        if bits.weight >= 32:
            return quantised_layer(original, bits, None, original.bias)
        grid = tables.weight(layer, bits.weight).grid
        return quantised_layer(original, bits, grid, tables.corrected_bias(layer, bits.weight))

    made = tables.skeleton.instrumented(
        plan.bits,
        make_quantiser=lambda source, bits: activation_quantiser(tables.calibration.grid(source, bits)),
        make_layer=make_layer,
        make_plain=Plain,
    )
    return copy.deepcopy(made)  # what no layer replaced would be trained in the tables too


def activation_quantiser(grid: Grid) -> nn.Module:
    """A Brevitas module that rounds to a grid."""
    from brevitas.nn import QuantIdentity

    made: nn.Module = QuantIdentity(act_quant=_injector(grid, _base("Act", grid)), return_quant_tensor=True)
    return made


def quantised_layer(original: Layer, bits: Bits, grid: Grid | None, bias: Tensor | None) -> nn.Module:
    """A Brevitas layer with the weights of another layer.

    Args:
        original: the layer.
        bits: its bits; with float weights it is the layer itself, behind a :class:`Plain`.
        grid: of the weights; None for float ones.
        bias: in place of the original's.
    """
    import brevitas.nn as qnn
    from brevitas.quant import Int32Bias

    if grid is None:
        return nn.Sequential(Plain(), original)
    settings: dict[str, Any] = {
        "bias": bias is not None,
        "weight_quant": _injector(grid, _base("Weight", grid)),
        "bias_quant": Int32Bias if bias is not None and has_integer_bias(bits) else None,
    }
    if isinstance(original, nn.Linear):
        made: Any = qnn.QuantLinear(original.in_features, original.out_features, **settings)
    else:
        kind = qnn.QuantConv1d if isinstance(original, nn.Conv1d) else qnn.QuantConv2d
        made = kind(
            original.in_channels,
            original.out_channels,
            original.kernel_size,
            stride=original.stride,
            padding=original.padding,
            dilation=original.dilation,
            groups=original.groups,
            **settings,
        )
    with torch.no_grad():
        made.weight.copy_(original.weight)
        if bias is not None:
            made.bias.copy_(bias)
    placed: nn.Module = made.to(original.weight.device).train(original.training)
    return placed


class Plain(nn.Module):
    """The values of a tensor without its Brevitas envelope, for operations that know no scales."""

    def forward(self, x: Any) -> Tensor:
        """The values."""
        return x if isinstance(x, Tensor) else x.value


def _base(side: str, grid: Grid) -> Any:
    """The Brevitas quantiser that a grid is a case of."""
    import brevitas.quant as bq

    if grid.binary:
        return getattr(bq, f"SignedBinary{side}PerTensorConst")
    if grid.zero_point is not None:
        return bq.ShiftedUint8ActPerTensorFloat
    if side == "Weight":
        per_channel = grid.threshold.numel() > 1
        if grid.power_of_two:
            return bq.Int8WeightPerTensorFixedPoint
        return bq.Int8WeightPerChannelFloat if per_channel else bq.Int8WeightPerTensorFloat
    name = "Int8" if grid.signed else "Uint8"
    return getattr(bq, f"{name}ActPerTensor{'FixedPoint' if grid.power_of_two else 'Float'}")


def _injector(grid: Grid, base: Any) -> Any:
    """The quantiser with the grid's bits and with its threshold as a parameter."""
    from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType

    threshold = grid.threshold.detach().clone()
    values: dict[str, Any] = {
        "bit_width": grid.bits,
        "scaling_impl_type": ScalingImplType.PARAMETER,
        "scaling_init": threshold,
        "scaling_shape": tuple(threshold.shape),
        "signed": grid.signed,
        "narrow_range": grid.narrow,
        "scaling_min_val": _SMALLEST_SCALE,
    }
    if threshold.numel() > 1:
        values["scaling_per_output_type"] = ScalingPerOutputType.CHANNEL
    if grid.zero_point is not None:
        from brevitas.core.zero_point import ParameterZeroPoint

        values |= {
            "zero_point_impl": ParameterZeroPoint,
            "zero_point_init": (grid.zero_point * grid.scale).detach(),  # in the tensor's own unit
            "zero_point_shape": tuple(grid.zero_point.shape),
            "quantize_zero_point": True,
        }
    return type("Injected" + base.__name__, (base,), values)
