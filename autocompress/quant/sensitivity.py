"""How much the bits of each layer raise the loss, before any plan is evaluated.

An exact allocation of bits takes such predictions as if they added up over layers. All three methods are
continuous and use several batches, since drops of accuracy of single layers are too noisy for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from autocompress.quant.tables import FixedLayer, QuantTables

SensitivityMethod = Literal["measured", "hessian", "fisher"]
Batches = Sequence[tuple[Tensor, Tensor]]
Losses = dict[str, dict[int, float]]

_NUM_PROBES = 16  # random vectors per batch of Hutchinson's estimator
_NUM_LABELS = 4  # labels drawn per image


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
        if other := [knob.name for knob in knobs if not knob.is_bits]:
            raise ValueError(f"sensitivities are about bits, but the knobs {other} decide something else")
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
    method: SensitivityMethod = "measured",
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
    widths = _asked(knobs)
    generator = torch.Generator().manual_seed(seed)
    if method == "measured":
        found = _measured(tables, widths, batches, reference)
    else:
        found = _fisher(tables, widths, batches, generator)
        if method == "hessian":
            found = found[0] | _hessian(tables, widths, batches, generator), found[1]
    return Sensitivity(*[{name: _falling(row) for name, row in side.items()} for side in found])


@dataclass(frozen=True)
class _Asked:
    """Layer -> widths to predict, ascending, for weights and for activations."""

    weight: dict[str, list[int]]
    act: dict[str, list[int]]


def _asked(knobs: Sequence[Knob]) -> _Asked:
    asked = _Asked({}, {})
    for knob in knobs:
        if not knob.is_bits:
            raise ValueError(f"sensitivities are about bits, but knob {knob.name!r} decides {knob.kind}")
        side = asked.weight if knob.kind == "weight_bits" else asked.act
        side.update({layer: [int(bits) for bits in knob.choices] for layer in knob.bit_layers})
    return asked


def _falling(row: Mapping[int, float]) -> dict[int, float]:
    """The closest values, in squares, that are at least 0 and never rise with the bits."""
    bits = sorted(row)
    repaired = isotonic_regression([max(row[b], 0.0) for b in bits], increasing=False).x
    return dict(zip(bits, repaired.tolist(), strict=True))


# Measured


def _measured(tables: QuantTables, asked: _Asked, batches: Batches, reference: Plan) -> tuple[Losses, Losses]:
    variants = [
        (side, layer, width)
        for side in ("weight", "act")
        for layer, widths in getattr(asked, side).items()
        for width in widths
    ]
    sums = dict.fromkeys(variants, 0.0)
    kept = Replay(tables.network(reference, keep_inputs=True))
    with torch.inference_mode():
        for images, _ in batches:
            expected = F.log_softmax(kept.record(images), dim=1)
            for side, layer, width in variants:
                before = reference.bits.get(layer, Bits())
                bits = {**reference.bits, layer: replace(before, **{side: width})}
                if bits[layer] == before:
                    continue
                network = tables.network(Plan(bits=bits), keep_inputs=True)
                answer = F.log_softmax(kept.run(network, changed=layer), dim=1)
                sums[side, layer, width] += float(
                    F.kl_div(answer, expected, reduction="sum", log_target=True)
                )
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


# Fisher information


def _fisher(
    tables: QuantTables, asked: _Asked, batches: Batches, generator: torch.Generator
) -> tuple[Losses, Losses]:
    found: tuple[Losses, Losses] = ({}, {})
    num = sum(len(images) for images, _ in batches) * _NUM_LABELS
    for images, _ in batches:
        layers = _Gradients(tables, {*asked.weight, *asked.act}).of(images, generator)
        for name, seen in layers.items():
            for width in asked.weight.get(name, ()):
                error = _output_error(tables, name, width, seen.inputs)
                _add(found[0], name, width, _squares(error, seen.output_gradients) / (2 * num))
            for width in asked.act.get(name, ()):
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


# Hessian


def _hessian(tables: QuantTables, asked: _Asked, batches: Batches, generator: torch.Generator) -> Losses:
    layers = {name: tables.skeleton.layers[name] for name in asked.weight}
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
        for width in asked.weight[name]:
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
