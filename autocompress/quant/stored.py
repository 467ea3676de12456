"""A quantised network from its stored weights, without the images it was calibrated on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant.brevitas_network import Plain, activation_quantiser, quantised_layer
from autocompress.quant.calibration import Calibration
from autocompress.quant.grids import Grid, asymmetric, symmetric
from autocompress.quant.skeleton import Skeleton

_SETTINGS = ("per_channel", "asymmetric", "power_of_two")


def structure_of(calibration: Calibration) -> dict[str, Any]:
    """What the state_dict of a quantised network does not say, as JSON values: signs and kinds of grids."""
    settings = {name: getattr(calibration.settings, name) for name in _SETTINGS}
    return settings | {"signed": {name: seen.signed for name, seen in calibration.activations.items()}}


def unfilled(
    model: nn.Module, plan: Plan, structure: Mapping[str, Any], state: Mapping[str, Tensor]
) -> fx.GraphModule:
    """A network of Brevitas layers that takes ``state``; its own weights and thresholds mean nothing.

    Args:
        model: the float network, with any weights; not changed.
        plan: with the bits of the layers.
        structure: from :func:`structure_of`.
        state: what will be loaded; only asked which layers have a bias.

    Raises:
        UnsupportedModelError: the network cannot be quantised.
        ValueError: the plan names a layer the network lacks.
    """
    skeleton = Skeleton(model)
    exact = bool(structure["power_of_two"])

    def make_quantiser(source: str, bits: int) -> nn.Module:
        signed = structure["signed"][source]
        one = torch.ones(())
        shifted = signed and structure["asymmetric"] and bits > 1
        grid = (
            asymmetric(-one, one, bits)
            if shifted
            else symmetric(one, bits, signed=signed, power_of_two=exact)
        )
        return activation_quantiser(grid)

    def make_layer(layer: str, bits: Bits) -> nn.Module:
        original = skeleton.layers[layer]
        has_bias = f"{layer}.bias" in state or f"{layer}.1.bias" in state
        bias = torch.zeros(len(original.weight)) if has_bias else None
        return quantised_layer(original, bits, _weight_grid(original, bits.weight), bias)

    def _weight_grid(original: nn.Module, bits: int) -> Grid | None:
        if bits >= 32:
            return None
        weight: Any = original.weight
        shape = (len(weight), *[1] * (weight.ndim - 1)) if structure["per_channel"] else ()
        return symmetric(torch.ones(shape), bits, signed=True, narrow=True, power_of_two=exact)

    made = skeleton.instrumented(
        plan.bits, make_quantiser=make_quantiser, make_layer=make_layer, make_plain=Plain
    )
    return copy.deepcopy(made)
