"""What gradients and curvature at the float network say about the loss that rounding costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from autocompress.quant.tables import FixedLayer, QuantTables

Widths = Mapping[str, Sequence[int]]
Losses = dict[str, dict[int, float]]
Batches = Sequence[tuple[Tensor, Tensor]]

_NUM_PROBES = 16  # random vectors per batch of Hutchinson's estimator
_NUM_LABELS = 4  # labels drawn per image


def fisher_losses(
    tables: QuantTables, weight: Widths, act: Widths, *, batches: Batches, generator: torch.Generator
) -> tuple[Losses, Losses]:
    """Half the Fisher information's quadratic form with the rounding error, of weights and of activations.

    That is half the mean square of what the error changes the loss by to first order, under labels drawn
    from the network's own answers. A layer's error is that of its outputs (weights, with the corrected bias)
    or of its inputs (activations). Nats per image.

    Args:
        tables: the network.
        weight, act: layer -> widths.
        batches: images and labels; labels are not read.
        generator: draws labels, on the CPU.
    """
    found: tuple[Losses, Losses] = ({}, {})
    num = sum(len(images) for images, _ in batches) * _NUM_LABELS
    for images, _ in batches:
        layers = _Gradients(tables, {*weight, *act}).of(images, generator)
        for name, seen in layers.items():
            for width in weight.get(name, ()):
                error = _output_error(tables, name, width, seen.inputs)
                _add(found[0], name, width, _squares(error, seen.output_gradients) / (2 * num))
            for width in act.get(name, ()):
                rounded = tables.input_grid(name, width).quantise(seen.inputs) if width < 32 else seen.inputs
                error = rounded - seen.inputs
                _add(found[1], name, width, _squares(error, seen.input_gradients) / (2 * num))
    return found


def _add(losses: Losses, layer: str, width: int, value: float) -> None:
    row = losses.setdefault(layer, {})
    row[width] = row.get(width, 0.0) + value


def _squares(error: Tensor, gradients: Sequence[Tensor]) -> float:
    """Sum over images and drawn labels of (gradient . error)^2."""
    return sum(float((g * error).flatten(1).sum(dim=1).square().sum()) for g in gradients)


def _output_error(tables: QuantTables, layer: str, width: int, inputs: Tensor) -> Tensor:
    """What rounding a layer's weights and correcting its bias adds to its outputs."""
    module = tables.skeleton.layers[layer]
    if width >= 32:
        return torch.zeros(())
    bias, corrected = tables.bias(layer), tables.corrected_bias(layer, width)
    shift = corrected - bias if corrected is not None and bias is not None else None
    error: Tensor = FixedLayer(module, tables.weight(layer, width).values - module.weight.detach(), shift)(
        inputs
    )
    return error


@dataclass(frozen=True)
class _Seen:
    """A layer's inputs, and gradients of each image's loss, one tensor per drawn label."""

    inputs: Tensor
    input_gradients: list[Tensor]
    output_gradients: list[Tensor]


class _Gradients(fx.Interpreter):
    """Gradients of the float network's loss at the inputs and outputs of some layers."""

    def __init__(self, tables: QuantTables, layers: Iterable[str]) -> None:
        super().__init__(tables.skeleton.graph_module)
        self._layers = set(layers)
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module" or n.target not in self._layers:
            return super().run_node(n)
        (given,), _ = self.fetch_args_kwargs_from_env(n)
        # A tensor of this layer's own, so that other readers do not enter its gradient.
        inputs = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
        outputs = self.call_module(n.target, (inputs,), {})
        self._ends[str(n.target)] = inputs, outputs
        return outputs

    def of(self, images: Tensor, generator: torch.Generator) -> dict[str, _Seen]:
        """Layer -> what was seen there."""
        logits = self.run(images)
        log_p = F.log_softmax(logits, dim=1)
        seen = {name: _Seen(x.detach(), [], []) for name, (x, _) in self._ends.items()}
        ends = [end for pair in self._ends.values() for end in pair]
        drawn = torch.multinomial(
            log_p.detach().exp().cpu(), _NUM_LABELS, replacement=True, generator=generator
        ).to(log_p.device)
        for draw in range(_NUM_LABELS):
            loss = F.nll_loss(log_p, drawn[:, draw], reduction="sum")
            gradients = torch.autograd.grad(loss, ends, retain_graph=draw + 1 < _NUM_LABELS)
            for name, at_input, at_output in zip(seen, gradients[::2], gradients[1::2], strict=True):
                seen[name].input_gradients.append(at_input)
                seen[name].output_gradients.append(at_output)
        return seen


def hessian_losses(
    tables: QuantTables, weight: Widths, *, batches: Batches, generator: torch.Generator
) -> Losses:
    """Half the mean Hessian trace of each layer's weights times their squared rounding error, in nats.

    Args:
        tables: the network.
        weight: layer -> widths.
        batches: images and labels.
        generator: draws random vectors, on the CPU.
    """
    layers = {name: tables.skeleton.layers[name] for name in weight}
    weights = {f"{name}.weight": layer.weight.detach().requires_grad_() for name, layer in layers.items()}
    traces = torch.zeros(len(layers), dtype=torch.float64)
    for images, labels in batches:
        logits = torch.func.functional_call(tables.skeleton.graph_module, weights, images)
        loss = F.cross_entropy(logits, labels.to(images.device))
        samples = hutchinson_traces(loss, [*weights.values()], num_probes=_NUM_PROBES, generator=generator)
        traces += samples.mean(dim=0) * len(images)
    traces = (traces / sum(len(images) for images, _ in batches)).clamp_(min=0.0)
    found: Losses = {}
    for (name, layer), trace in zip(layers.items(), traces.tolist(), strict=True):
        for width in weight[name]:
            error = 0.0
            if width < 32:
                error = float((tables.weight(name, width).values - layer.weight.detach()).square().sum())
            found.setdefault(name, {})[width] = trace / layer.weight.numel() * error / 2
    return found


def hutchinson_traces(
    loss: Tensor, weights: Sequence[Tensor], *, num_probes: int, generator: torch.Generator
) -> Tensor:
    """Unbiased samples of the trace of each weight's own block of the Hessian: ``v . H v``.

    One Hessian-vector product serves all weights: with independent signs in v, the products between blocks
    are 0 on average.

    Args:
        loss: scalar, from a graph that can be differentiated twice.
        weights: leaves of that graph.
        num_probes: random vectors of +1 and -1.
        generator: draws them, on the CPU.

    Returns:
        Shape (num_probes, len(weights)), float64.

    Source: Yao et al., "PyHessian", IEEE BigData 2020, section 3.
    """
    gradients = torch.autograd.grad(loss, list(weights), create_graph=True)
    samples = torch.empty(num_probes, len(weights), dtype=torch.float64)
    for probe in range(num_probes):
        signs = [
            torch.randint(0, 2, w.shape, generator=generator).mul_(2).sub_(1).to(w.device, w.dtype)
            for w in weights
        ]
        products = torch.autograd.grad(gradients, list(weights), signs, retain_graph=True)
        for block, (sign, product) in enumerate(zip(signs, products, strict=True)):
            samples[probe, block] = float((sign * product).sum(dtype=torch.float64))
    return samples
