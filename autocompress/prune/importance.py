"""How much a network would miss each unit of a channel group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core.errors import DivergenceError
from autocompress.trace import Slot, Trace
from autocompress.trace.layers import LAYERS, TRANSPOSED

Batches = Iterable[tuple[Tensor, Tensor]]


def unit_scores(
    model: nn.Module, traced: Trace, method: str = "l2", batches: Batches | None = None
) -> dict[str, Tensor]:
    """Importance of every unit of every prunable group; higher is more important.

    Each layer that produces or reads the channels scores them by its own weights; the layers' scores are
    brought to mean 1 and averaged, so that a group of many layers is judged by all of them.

    Args:
        model: the network that was traced; not changed.
        traced: its trace.
        method: a key of :data:`METHODS`.

            - ``l1``: sum of absolute weights (AMC's criterion on the consumer side; Li et al. 2017 on the
              producer side).
            - ``l2``: root of the sum of squared weights.
            - ``taylor``: absolute sum of weight times gradient of the loss (Molchanov et al. 2019).
            - ``geometric_median``: summed distance to the other units' weights in the same layer
              (FPGM, He et al. 2019, which scores filters, i.e. the producer side only).
        batches: images and labels, for ``taylor``.

    Returns:
        Group name -> float tensor of shape (units,).

    Raises:
        ValueError: unknown method, or ``taylor`` without batches.
        DivergenceError: a score is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"importance must be one of {', '.join(METHODS)}, got {method!r}")
    values = _taylor_values(model, batches) if method == "taylor" else _weights(model)
    score = METHODS[method]
    sums: dict[str, Tensor] = {}
    for slot in traced.slots:
        if slot.module not in values or (method == "geometric_median" and slot.side == "in"):
            continue
        rows = _rows(model.get_submodule(slot.module), values[slot.module], slot.side)
        if rows is None:
            continue
        for index in np.unique(slot.group[slot.group >= 0]):
            group = traced.graph.groups[index]
            if group.locked is None:
                part = score(_by_unit(rows, slot, int(index), group.size))
                part = part / part.mean().clamp_min(1e-12)
                sums[group.name] = sums.get(group.name, torch.zeros(group.size)) + part
    for name, scores in sums.items():
        if not torch.isfinite(scores).all():
            raise DivergenceError(f"importance of {name!r} is not finite; check the weights for NaN")
    return sums


def keep_best(scores: Mapping[str, Tensor], channels: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """The indices of the most important units per group, ascending; of equals the first stay."""
    kept = {}
    for name, count in channels.items():
        order = np.argsort(-scores[name].numpy(), kind="stable")
        kept[name] = np.sort(order[:count]).astype(np.int64)
    return kept


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach().cpu().float()
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    }


def _taylor_values(model: nn.Module, batches: Batches | None) -> dict[str, Tensor]:
    """Weight times gradient of the mean loss, per layer."""
    if batches is None:
        raise ValueError("importance 'taylor' needs batches of images and labels")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    weights = [module.weight for module in layers.values()]
    total = [torch.zeros_like(weight) for weight in weights]
    training = model.training
    model.eval()
    needed = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
    finally:
        model.train(training)
        for weight, flag in zip(weights, needed, strict=True):
            weight.requires_grad_(flag)
    pairs = zip(layers, weights, total, strict=True)
    return {name: (weight * grad).detach().cpu() for name, weight, grad in pairs}


def _rows(module: nn.Module, values: Tensor, side: str) -> Tensor | None:
    """Values per channel of one side: shape (channels, values per channel)."""
    grouped = getattr(module, "groups", 1) != 1
    if grouped and (side == "in") != isinstance(module, TRANSPOSED):
        return None  # the other side of the same convolution groups holds all the weights
    axis = 0 if (side == "out") != isinstance(module, TRANSPOSED) or grouped else 1
    return values.movedim(axis, 0).flatten(1)


def _by_unit(rows: Tensor, slot: Slot, group: int, size: int) -> Tensor:
    """Shape (units, values per unit): the channels of a unit side by side."""
    positions = np.flatnonzero(slot.group == group)
    order = positions[np.argsort(slot.unit[positions], kind="stable")]
    return rows[torch.from_numpy(order)].reshape(size, -1)


def _distance_to_others(units: Tensor) -> Tensor:
    return torch.cdist(units, units).sum(dim=1)


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda units: units.abs().sum(dim=1),
    "l2": lambda units: units.norm(dim=1),
    "taylor": lambda units: units.sum(dim=1).abs(),
    "geometric_median": _distance_to_others,
}
