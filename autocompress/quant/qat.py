"""Training for a plan of bits: the form a quantised network is trained in."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.core.errors import DivergenceError
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan
from autocompress.quant.brevitas_network import Plain, activation_quantiser, quantised_layer
from autocompress.quant.grids import Grid, has_integer_bias
from autocompress.quant.skeleton import Layer
from autocompress.quant.ste import LearnedGrid, rounded_bias
from autocompress.quant.tables import QuantTables

# Square root of the share of the learning rate that thresholds get; benchmarks/qat_ablation.py.
_THRESHOLD_RATE = 0.3
_SMALLEST_GAIN = 1e-6  # of BatchNorm; below it a channel is as good as constant

_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}
_KEEPS_SIGN = (nn.Hardtanh, nn.Identity)
_RELUS = (F.relu, torch.relu, "relu")
_MOMENTUM = 0.1


class QatNetwork(nn.Module):
    """A network that is trained for a plan of bits and becomes the Brevitas network of that plan.

    In evaluation its values are those of :meth:`brevitas` to the last bit, and before training, without
    BatchNorm (below), those of ``tables.network(plan)``. It trains 2.3 times as fast as the Brevitas network
    (ResNet-20, one CPU thread) and, at two bits, far more stably:

    * BatchNorm, which the skeleton has folded away, comes back behind the rounded weights, with the mean and
      variance that the float network's outputs have. A scale per output channel of the weights can take up
      its factor exactly, so it costs nothing at the end. Without such scales (one per layer, or powers of
      two) there is none, save where only the sign of an output is read, which no factor changes. The last
      layer has none either.
    * Weights are trained in units of their thresholds, so that one learning rate suits all channels.
    * Thresholds are learned as :class:`~autocompress.quant.ste.LearnedGrid` says.

    Args:
        tables: the float network with its calibration; neither it nor its weights are changed.
        plan: its ``bits`` name layers of the network.
        batches: images, each (N, C, H, W), as training draws them, augmented where it augments; they set
            BatchNorm's statistics.

    Raises:
        ValueError: a layer the network lacks, or bits that no grid has.

    Example:
        >>> student = QatNetwork(tables, plan, batches)  # doctest: +SKIP
        >>> fit(student, data, settings, seed=0, teacher=tables.skeleton.graph_module)  # doctest: +SKIP
        >>> network = student.brevitas()  # doctest: +SKIP
    """

    def __init__(self, tables: QuantTables, plan: Plan, batches: Iterable[Tensor]) -> None:
        super().__init__()
        self._tables, self._plan = tables, plan
        grids: dict[tuple[str, int], LearnedGrid] = {}

        def make_quantiser(source: str, bits: int) -> nn.Module:
            grid = tables.calibration.grid(source, bits)
            grids[source, bits] = LearnedGrid(grid, rate=_THRESHOLD_RATE)
            return grids[source, bits]

        def make_layer(layer: str, bits: Bits) -> nn.Module:
            original = tables.skeleton.layers[layer]
            if bits.weight >= 32:
                return original
            grid = tables.weight(layer, bits.weight).grid
            bias = tables.corrected_bias(layer, bits.weight)
            source = tables.skeleton.source_of(layer)
            reads = grids[source, bits.act] if has_integer_bias(bits) else None
            return _TrainedLayer(original, grid, bias, reads)

        made = tables.skeleton.instrumented(
            plan.bits, make_quantiser=make_quantiser, make_layer=make_layer, finish=_leave_relus
        )
        # A copy, for what no layer replaced is the tables' own.
        self.network: fx.GraphModule = copy.deepcopy(made)
        self._add_norms(list(batches))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) for images (N, C, H, W)."""
        logits: Tensor = self.network(x)
        return logits

    def brevitas(self) -> fx.GraphModule:
        """The network in Brevitas layers, in evaluation mode, with BatchNorm folded.

        Raises:
            DivergenceError: a threshold is not positive and finite; names them all.
        """
        self._check_thresholds()
        skeleton, bits = self._tables.skeleton, self._plan.bits
        own = dict(self.network.named_modules())

        def make_layer(layer: str, chosen: Bits) -> nn.Module:
            trained = own[layer]
            if not isinstance(trained, _TrainedLayer):
                return quantised_layer(copy.deepcopy(trained), chosen, None, None)
            weight, threshold, bias = trained.folded()
            grid = trained.grid.learned(threshold)
            made: Any = quantised_layer(skeleton.layers[layer], chosen, grid, bias)
            with torch.no_grad():
                made.weight.copy_(weight)
            return made  # type: ignore[no-any-return]

        made = skeleton.instrumented(
            bits,
            make_quantiser=lambda source, width: activation_quantiser(
                own[f"{source}_quant{width}"].learned()
            ),
            make_layer=make_layer,
            make_plain=Plain,
        )
        network: fx.GraphModule = copy.deepcopy(made)
        shared = skeleton.graph_module.state_dict()  # of layers the plan does not name, too
        rest = {n: t for n, t in self.network.state_dict().items() if n in shared and _owner(n) not in bits}
        network.load_state_dict(rest, strict=False)
        return network.eval()

    def _check_thresholds(self) -> None:
        faults = [
            f"a threshold of {name} is {float(worst):g}"
            for name, module in self.network.named_modules()
            if isinstance(module, LearnedGrid)
            for worst in [module.threshold.detach().min()]
            if not 0 < float(worst) < float("inf")
        ]
        if faults:
            raise DivergenceError(f"training has diverged: {'; '.join(faults)}; lower lr or set clip_norm")

    def _add_norms(self, batches: list[Tensor]) -> None:
        layers = {
            str(node.target): _only_sign_is_read(node, self.network)
            for node in self.network.graph.nodes
            if node.op == "call_module" and not any(user.op == "output" for user in node.users)
            if isinstance(self.network.get_submodule(str(node.target)), _TrainedLayer)
        }
        moments = _output_moments(self._tables, batches)
        for name, sign_only in layers.items():
            layer = self.network.get_submodule(name)
            assert isinstance(layer, _TrainedLayer)
            if name in moments and layer.takes_norm(sign_only):
                layer.add_norm(*moments[name], sign_only=sign_only)
        self._settle_norms(batches)

    def _settle_norms(self, batches: list[Tensor]) -> None:
        """Set the running statistics to averages over the batches, for the rounded weights."""
        normed = [m for m in self.modules() if isinstance(m, _TrainedLayer) and m.norm is not None]
        self.eval()
        for layer in normed:
            layer.norm.momentum = None  # a cumulative average
            layer.train()
        with torch.no_grad():
            for images in batches if normed else []:
                self(images)
        for layer in normed:
            layer.norm.momentum = _MOMENTUM


class _TrainedLayer(nn.Module):
    """A layer whose weights are rounded as it runs.

    Args:
        original: the layer; not changed.
        grid: of its weights.
        bias: shape (out,), or None.
        reads: the grid of its input; None where the bias stays float.
    """

    unit: Tensor

    def __init__(self, original: Layer, grid: Grid, bias: Tensor | None, reads: LearnedGrid | None) -> None:
        super().__init__()
        # In tuples, so that they are not registered here.
        self._original, self._reads = (original,), (reads,)
        unit = torch.exp2(grid.threshold.log2().round())  # powers of two divide exactly
        self.register_buffer("unit", unit)
        own = replace(grid, threshold=grid.threshold / unit)
        # The bits are in the name, so that a checkpoint of other bits does not fit.
        self._name = f"grid{grid.bits}"
        self.add_module(self._name, LearnedGrid(own, rate=_THRESHOLD_RATE, weights=True))
        self.weight = nn.Parameter(original.weight.detach() / unit)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.norm: Any = None
        self._sign_only = False

    @property
    def grid(self) -> LearnedGrid:
        """Of the weights, in units."""
        made = self._modules[self._name]
        assert isinstance(made, LearnedGrid)
        return made

    def takes_norm(self, sign_only: bool) -> bool:
        """Whether a BatchNorm behind the layer can be folded into it."""
        per_channel = self.unit.ndim > 0 and not self.grid.grid.power_of_two
        return self.bias is not None and (per_channel or (sign_only and self.unit.ndim > 0))

    def add_norm(self, mean: Tensor, std: Tensor, *, sign_only: bool) -> None:
        """Put BatchNorm behind the layer in place of its bias, with outputs of this mean and deviation."""
        self.bias, self._sign_only = None, sign_only
        original = self._original[0]
        self.norm = _NORMS[type(original)](len(mean), momentum=_MOMENTUM).to(mean.device)
        with torch.no_grad():
            self.norm.weight.copy_(std)
            self.norm.bias.copy_(mean)

    def folded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights, their thresholds, and the bias, with BatchNorm folded."""
        norm, threshold = self.norm, self.grid.threshold
        if norm is None:
            return self.weight * self.unit, threshold * self.unit, self.bias
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        signs = torch.where(gain >= 0, 1.0, -1.0)
        size = gain.abs().clamp(min=_SMALLEST_GAIN)
        bias = norm.bias - norm.running_mean * signs * size
        if self._sign_only:
            bias, size = bias / size, torch.ones_like(size)
        shape = self.unit.shape
        return self.weight * (signs * size).reshape(shape), threshold * size.reshape(shape), bias

    def forward(self, x: Tensor) -> Tensor:
        """As the original layer's, normalised while training."""
        if self.norm is not None and self.training:
            made: Tensor = self.norm(self._applied(x, self.grid(self.weight), None))
            return made
        weight, threshold, bias = self.folded()
        reads = self._reads[0]
        if bias is not None and reads is not None:
            bias = rounded_bias(bias, reads.scale, self.grid.scale_of(threshold))
        return self._applied(x, self.grid.rounded(weight, threshold), bias)

    def _applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        original = self._original[0]
        if isinstance(original, nn.Linear):
            return F.linear(x, weight, bias)
        made: Tensor = original._conv_forward(x, weight, bias)
        return made


def _output_moments(tables: QuantTables, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel that the float network's layers make."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.ndim == (2 if isinstance(module, nn.Linear) else module.weight.ndim):
                values = output.transpose(0, 1).flatten(1).double()
                count = torch.full((len(values),), float(values.shape[1]), dtype=torch.double)
                new = torch.stack([count.to(values), values.sum(dim=1), values.square().sum(dim=1)])
                sums[name] = sums.get(name, torch.zeros_like(new)) + new

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in tables.skeleton.layers.items()]
    try:
        with torch.no_grad():
            for images in batches:
                tables.skeleton.graph_module(images)
    finally:
        for hook in hooks:
            hook.remove()
    moments = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        moments[name] = mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()
    return moments


def _leave_relus(graph: fx.Graph, modules: Mapping[str, Any]) -> None:
    """Take out every ReLU that only grids without negative values read, and let them do its work."""
    for node in list(graph.nodes):
        module = modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(module, nn.ReLU) and (node.op == "call_module" or node.target not in _RELUS):
            continue
        readers = [modules.get(str(user.target)) for user in node.users]
        if readers and all(isinstance(r, LearnedGrid) and r.is_unsigned for r in readers):
            for reader in readers:
                reader.rectifies = True  # type: ignore[union-attr]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _only_sign_is_read(node: fx.Node, network: fx.GraphModule) -> bool:
    """Whether all that reads a layer's output are signed grids of one bit."""
    readers = [network.get_submodule(str(u.target)) if u.op == "call_module" else None for u in node.users]
    return bool(readers) and all(
        (isinstance(reader, LearnedGrid) and reader.grid.binary)
        or (isinstance(reader, _KEEPS_SIGN) and _only_sign_is_read(user, network))
        for reader, user in zip(readers, node.users, strict=True)
    )


def _owner(tensor: str) -> str:
    """The module that a tensor of a state_dict belongs to."""
    return tensor.rpartition(".")[0]
