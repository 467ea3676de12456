"""How much the bits of each layer raise the loss, before any plan is evaluated.

An exact allocation of bits takes such predictions as if they added up over layers. All three methods are
continuous and use several batches, since drops of accuracy of single layers are too noisy for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor, fx

from autocompress.core.errors import DataError
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.core.problem import Knob
from autocompress.quant.curvature import Batches, Losses, Widths, fisher_losses, hessian_losses
from autocompress.quant.tables import QuantTables

SensitivityMethod = Literal["measured", "hessian", "fisher"]


@dataclass(frozen=True)
class Sensitivity:
    """Predicted rise of the loss, in nats per image, when one side of one layer gets some bits.

    Args:
        weight: layer -> bits -> rise, at least 0, never rising with the bits.
        act: the same for the activations that the layer reads.
    """

    weight: Mapping[str, Mapping[int, float]]
    act: Mapping[str, Mapping[int, float]]

    def per_knob(self, knobs: Sequence[Knob]) -> list[NDArray[np.float64]]:
        """What ``Problem.sensitivities`` returns: the rise over the last choice, shape (choices,), per knob.

        Layers that share a knob add up.

        Raises:
            ValueError: a knob that decides no bits.
        """
        _check(knobs)
        arrays = []
        for knob in knobs:
            side = self.weight if knob.kind == "weight_bits" else self.act
            rows = [[side[layer][int(bits)] for bits in knob.choices] for layer in knob.bit_layers]
            total = np.sum(np.array(rows, np.float64), axis=0)
            arrays.append(total - total[-1])
        return arrays


def sensitivity(
    tables: QuantTables,
    knobs: Sequence[Knob],
    batches: Batches,
    *,
    method: SensitivityMethod = "fisher",
    reference: Plan,
    seed: int,
) -> Sensitivity:
    """Predictions for every layer and width that some knobs offer.

    * ``measured``: Kullback-Leibler divergence of the network's answers when one side of one layer leaves the
      reference, from the reference's. Costs about half an evaluation per layer, side and width.
    * ``hessian``: of weights, half the mean Hessian trace times the squared rounding error (HAWQ-V2); of
      activations, as ``fisher``, since HAWQ says nothing about them.
    * ``fisher``: half the mean square of the change that rounding makes in the loss to first order, under
      labels drawn from the network's own answers: the quadratic form of the Fisher information with the
      rounding error. One backward pass per drawn label.

    On ResNet-20 (CIFAR-10), over random plans of equal mean bits, ``fisher`` ranks the loss as well as
    ``measured`` does or better, and ``hessian`` worse at 2 bits; it is also the cheapest.

    The rise is measured from the reference for ``measured``, from the float network for the others; it is
    made to fall with the bits by isotonic regression.

    Args:
        tables: the network.
        knobs: decide bits; their layers and choices are covered.
        batches: images (N, C, H, W) and labels (N,), a few hundred in several batches; only ``hessian`` reads
            labels.
        method: how to predict.
        reference: bits of all layers before any decision, such as ``problem.plan([])``.
        seed: of random vectors and labels.

    Raises:
        DataError: there are no batches.
        ValueError: unknown method, or a knob that decides no bits.

    Source: Dong et al., "HAWQ-V2", NeurIPS 2020, section 3.1 for ``hessian``. ``fisher`` differs from the
    usual diagonal form in keeping the products of errors of different elements.
    """
    if method not in get_args(SensitivityMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(SensitivityMethod))}, got {method!r}")
    if not batches:
        raise DataError("sensitivities need at least one batch of images")
    _check(knobs)
    weight, act = _widths(knobs, "weight_bits"), _widths(knobs, "act_bits")
    generator = torch.Generator().manual_seed(seed)
    if method == "measured":
        found = _measured(tables, weight, act, batches=batches, reference=reference)
    else:
        found = fisher_losses(tables, weight, act, batches=batches, generator=generator)
        if method == "hessian":
            found = hessian_losses(tables, weight, batches=batches, generator=generator), found[1]
    return Sensitivity(*[{name: _falling(row) for name, row in side.items()} for side in found])


def _check(knobs: Sequence[Knob]) -> None:
    if other := [knob.name for knob in knobs if not knob.is_bits]:
        raise ValueError(f"sensitivities are about bits, but the knobs {other} decide something else")


def _widths(knobs: Sequence[Knob], kind: str) -> Widths:
    """Layer -> choices of the knobs of one kind."""
    return {
        layer: [int(bits) for bits in knob.choices]
        for knob in knobs
        if knob.kind == kind
        for layer in knob.bit_layers
    }


def _falling(row: Mapping[int, float]) -> dict[int, float]:
    """The closest values, in squares, that are at least 0 and never rise with the bits."""
    bits = sorted(row)
    repaired = isotonic_regression([max(row[b], 0.0) for b in bits], increasing=False).x
    return dict(zip(bits, repaired.tolist(), strict=True))


def _measured(
    tables: QuantTables, weight: Widths, act: Widths, *, batches: Batches, reference: Plan
) -> tuple[Losses, Losses]:
    variants = [
        (side, layer, width)
        for side, asked in (("weight", weight), ("act", act))
        for layer, widths in asked.items()
        for width in widths
    ]
    sums = dict.fromkeys(variants, 0.0)
    kept = Replay(tables.network(reference, keep_inputs=True))
    with torch.inference_mode():
        for images, _ in batches:
            expected = F.log_softmax(kept.record(images), dim=1)
            for side, layer, width in variants:
                before = reference.bits.get(layer, Bits())
                changed = replace(before, **{side: width})
                if changed == before:
                    continue
                network = tables.network(Plan(bits={**reference.bits, layer: changed}), keep_inputs=True)
                answer = F.log_softmax(kept.run(network, changed=layer), dim=1)
                divergence = F.kl_div(answer, expected, reduction="sum", log_target=True)
                sums[side, layer, width] += float(divergence)
    num_images = sum(len(images) for images, _ in batches)
    found: tuple[Losses, Losses] = ({}, {})
    for side, layer, width in variants:
        rows = found[0] if side == "weight" else found[1]
        rows.setdefault(layer, {})[width] = sums[side, layer, width] / num_images
    return found


class Replay:
    """Runs variants of one network on one batch, computing only what differs from the recorded run.

    Args:
        network: none of its operations writes into its inputs.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self._network = network
        self._values: dict[tuple[str, ...], Any] = {}

    def record(self, images: Tensor) -> Tensor:
        """The network's output, with the outputs of all its nodes kept."""
        self._values = {}
        runner = _Runner(self._network, lambda node, value: self._values.update({_call(node): value}))
        result: Tensor = runner.run(images)
        return result

    def run(self, network: fx.GraphModule, *, changed: str) -> Tensor:
        """The output of a variant that differs in the layer ``changed`` and in what is called differently."""
        known: dict[fx.Node, Any] = {}
        for node in network.graph.nodes:
            inputs_known = all(x in known for x in node.all_input_nodes)
            if (
                node.target != changed
                and node.op != "output"
                and inputs_known
                and _call(node) in self._values
            ):
                known[node] = self._values[_call(node)]
        result: Tensor = fx.Interpreter(network).run(initial_env=known)
        return result


def _call(node: fx.Node) -> tuple[str, ...]:
    """What tells whether nodes of two variants compute the same from the same."""
    return (node.name, *[x.name for x in node.all_input_nodes])


class _Runner(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, see: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(module)
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._see(n, value)
        return value
