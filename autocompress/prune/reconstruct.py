"""Least-squares repair of the layers that lost inputs, from Gram matrices computed once.

A layer computes Y = X W^T from its input columns X (im2col for convolutions). When only the columns K stay,
the weights that best reproduce Y are W' = W G[:, K] G[K, K]^-1 with G = X^T X. G and W G are computed once,
so that a plan costs one Cholesky solve per changed layer and no further look at the data.

Source: AMC (He et al., ECCV 2018), section 3.3, and He et al., "Channel Pruning for Accelerating Very Deep
Neural Networks", ICCV 2017. Differs from AMC's released code in that it takes any kernel size (the code: 1x1
and linear only), solves from Gram matrices (the code: scikit-learn on stored features, for every plan), adds
a small ridge, and refits the bias of layers that have one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.core.errors import DivergenceError
from autocompress.trace import Kept, Trace
from autocompress.trace.layers import CONVOLUTIONS
from autocompress.trace.surgery import positions_removed

log = logging.getLogger(__name__)

MAX_COLUMNS = 8192
"""Layers with more input columns are left as they are: their Gram matrix would take over 256 MB."""


class Reconstruction:
    """Gram matrices of the inputs of every layer that a plan may take inputs from.

    Args:
        model: the uncompressed network; not changed.
        traced: its trace.
        batches: calibration inputs, each (N, C, H, W).
        num_images: how many images ``batches`` holds, to spread the sampled positions over them.
        ridge: share of the mean diagonal added to the diagonal.
        seed: of the sampled positions.

    Raises:
        DivergenceError: a Gram matrix is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        batches: Iterable[Tensor],
        *,
        num_images: int,
        ridge: float = 1e-3,
        seed: int = 0,
    ) -> None:
        self._traced = traced
        self._ridge = ridge
        self._num_images = num_images
        self._rng = np.random.default_rng(seed)
        self._layers = {name: model.get_submodule(name) for name in _refittable(model, traced)}
        self._weights = {name: _flat_weight(layer) for name, layer in self._layers.items()}
        self._grams: dict[str, Tensor] = {}
        self._collect(model, batches)
        for name, gram in self._grams.items():
            if not torch.isfinite(gram).all():
                raise DivergenceError(
                    f"the inputs of layer {name!r} are not finite on the calibration images"
                )
        self._cross = {name: gram @ self._weights[name].T for name, gram in self._grams.items()}

    def _collect(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        def hook(module: nn.Module, args: Any, *, name: str) -> None:
            columns = self._columns(module, args[0].detach().float())
            gram = columns.T @ columns
            self._grams[name] = self._grams[name] + gram if name in self._grams else gram

        handles = [
            layer.register_forward_pre_hook(partial(hook, name=name)) for name, layer in self._layers.items()
        ]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for images in batches:
                    model(images)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()

    def _columns(self, module: nn.Module, x: Tensor) -> Tensor:
        """Input columns at sampled positions: shape (rows, columns), with a column of ones for a bias."""
        linear = isinstance(module, nn.Linear)
        rows = x.reshape(-1, x.shape[-1]) if linear else self._patches(module, x)
        if module.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        return rows

    def _patches(self, module: nn.Module, x: Tensor) -> Tensor:
        """Rows of im2col at random output positions, the same for all images of a batch."""
        assert isinstance(module, nn.Conv2d)
        height, width = (int(k) for k in module.kernel_size)
        dilation, stride = module.dilation, module.stride
        x = _padded(module, x)
        reach = ((height - 1) * dilation[0] + 1, (width - 1) * dilation[1] + 1)
        out_h, out_w = ((x.shape[2 + i] - reach[i]) // stride[i] + 1 for i in (0, 1))
        columns = module.in_channels * height * width
        wanted = -(-max(5120, 4 * columns) // self._num_images)
        spots = self._rng.choice(out_h * out_w, min(wanted, out_h * out_w), replace=False)
        parts = []
        for spot in spots:
            top, left = (spot // out_w) * stride[0], (spot % out_w) * stride[1]
            patch = x[:, :, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]]
            parts.append(patch.reshape(len(x), -1))
        return torch.cat(parts)

    def apply(self, small: nn.Module, kept: Kept) -> None:
        """Refit, in place, every layer of a shrunk network that lost inputs.

        Args:
            small: the network made by ``shrink(model, traced, kept)``.
            kept: the units that stayed.
        """
        removed = positions_removed(self._traced, kept)
        for name in self._layers:
            gone = removed[name, "in"]
            if gone.any() and not gone.all():
                gone_out = removed.get((name, "out"))
                layer = small.get_submodule(name)
                assert isinstance(layer, (nn.Conv2d, nn.Linear))
                self._refit(name, layer, gone, gone_out)

    def _refit(
        self,
        name: str,
        layer: nn.Conv2d | nn.Linear,
        gone: np.typing.NDArray[np.bool_],
        gone_out: np.typing.NDArray[np.bool_] | None,
    ) -> None:
        gram, weight, cross = self._grams[name], self._weights[name], self._cross[name]
        has_bias = layer.bias is not None
        per_channel = (gram.shape[0] - has_bias) // len(gone)
        stays = np.append(np.repeat(~gone, per_channel), [True] * has_bias)
        columns = torch.from_numpy(np.flatnonzero(stays)).to(gram.device)
        if gone_out is not None:
            outputs = torch.from_numpy(np.flatnonzero(~gone_out)).to(weight.device)
            weight, cross = weight[outputs], cross[:, outputs]
        inner = gram[columns][:, columns]
        ridge = self._ridge * inner.diagonal().mean()
        if ridge == 0:
            return  # the layer reads only zeros, so its weights make no difference
        inner.diagonal().add_(ridge)
        factor, fault = torch.linalg.cholesky_ex(inner)
        if int(fault):
            raise DivergenceError(
                f"the inputs of layer {name!r} are degenerate on the calibration images; use more or other "
                "calibration images, or set prune.reconstruct: false"
            )
        # The ridge pulls towards the pruned weights instead of towards zero: a dead input changes nothing.
        target = cross[columns] + ridge * weight[:, columns].T
        fitted = torch.cholesky_solve(target, factor).T
        with torch.no_grad():
            body = fitted[:, :-1] if has_bias else fitted
            layer.weight.copy_(body.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(fitted[:, -1])


def _refittable(model: nn.Module, traced: Trace) -> list[str]:
    """Layers with prunable inputs that can be refitted; says which cannot."""
    names: list[str] = []
    too_wide: list[str] = []
    running = {
        layer.name for layer in traced.graph.layers
    }  # others run in training only and have no Gram matrix
    for slot in traced.slots:
        module = model.get_submodule(slot.module)
        open_groups = [traced.graph.groups[i].locked is None for i in np.unique(slot.group) if i >= 0]
        if (
            slot.side != "in"
            or slot.module not in running
            or not any(open_groups)
            or getattr(module, "groups", 1) != 1
        ):
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        columns = module.weight[0].numel()
        (names if columns <= MAX_COLUMNS else too_wide).append(slot.module)
    if too_wide:
        log.warning("not reconstructed, more than %d input columns: %s", MAX_COLUMNS, ", ".join(too_wide))
    return names


def _flat_weight(layer: nn.Module) -> Tensor:
    """Weights as (outputs, columns), the bias as the last column."""
    assert isinstance(layer, (*CONVOLUTIONS, nn.Linear))
    weight = layer.weight.detach().float().flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.detach().float()[:, None]], dim=1)
    return weight.clone()


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    if isinstance(module.padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "valid":
            total = [0, 0]
        sides = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        sides = (module.padding[1], module.padding[1], module.padding[0], module.padding[0])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode=mode)
