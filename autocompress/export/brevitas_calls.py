"""What runs inside a Brevitas network: its layers and activation quantisers, in execution order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["layer", "quantiser"]


@dataclass(frozen=True, eq=False)
class Call:
    """One execution of a layer or of an activation quantiser.

    Args:
        kind: ``layer`` for convolution and linear layers.
        name: dotted module name.
        module: the layer, or Brevitas' proxy of the quantiser.
        reads: first input, a tensor or Brevitas' quantised tensor.
        value: a copy of the output's values.
    """

    kind: Kind
    name: str
    module: Any
    reads: Any
    value: Tensor


def record_calls(network: nn.Module, images: Tensor) -> list[Call]:
    """The calls of one forward pass; the network must be in evaluation mode and on the CPU.

    Args:
        network: Brevitas and plain layers.
        images: shape (N, C, H, W).
    """
    from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase

    calls: list[Call] = []

    def watch(kind: Kind, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output if isinstance(output, Tensor) else output.value
            # A copy, because a ReLU behind the layer may work in place.
            calls.append(Call(kind, name, module, inputs[0], value.detach().clone()))

        return hook

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, ActQuantProxyFromInjectorBase) and module.is_quant_enabled:
            hook = watch("quantiser", name.removesuffix(".act_quant"))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            hook = watch("layer", name)
        else:
            continue
        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls
