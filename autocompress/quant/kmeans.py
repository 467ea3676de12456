"""Codebooks: the weights of a layer become a few shared values, for plans that only count bytes.

``2**b`` values per layer need b bits per weight and a short table. Nothing is folded and activations stay
floating point, so the network computes as before and its file shrinks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.core.errors import UnsupportedModelError
from autocompress.core.graph import Bits
from autocompress.core.plan import Plan

MAX_CODE_BITS = 8
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
_SPARSE = 0.1  # a larger share of exact zeros comes from pruning, not from chance
_NUM_POINTS = 512  # distinct values up to which clusters are optimal; more are binned for the start
_NUM_ROUNDS = 300


@dataclass(frozen=True, eq=False)
class Codebook:
    """A layer's weights as numbers of shared values.

    Args:
        indices: uint8, in the weight's shape.
        centroids: the shared values, float32, shape (at most 2**bits,); 0 is one of them in a pruned layer.
    """

    indices: Tensor
    centroids: Tensor

    @property
    def values(self) -> Tensor:
        """The weights, float32."""
        return self.centroids[self.indices.long()]


def make_codebook(weight: Tensor, bits: int) -> Codebook:
    """The ``2**bits`` values that stand for some weights with the least squared error.

    Exact (dynamic programming) for up to 512 distinct weights; for more, the optimum of 512 bins is refined
    by Lloyd's iteration on all weights. Deterministic. Zeros of a pruned layer, one with at least a tenth of
    zeros, stay exactly 0 and take one of the values.

    Args:
        weight: any shape.
        bits: from 1 to 8.

    Raises:
        ValueError: bits out of range, or weights that are not finite.

    Source: Han et al., "Deep Compression", ICLR 2016, section 3. HAQ's released code runs k-means++ once,
    from a random start, and gives pruned zeros a code beyond ``2**bits``.
    """
    if not 1 <= bits <= MAX_CODE_BITS:
        raise ValueError(f"a codebook has from 1 to {MAX_CODE_BITS} bits, got {bits}")
    flat = weight.detach().float().cpu().flatten().numpy()
    if not np.isfinite(flat).all():
        raise ValueError("weights must be finite to be clustered; the network has diverged")
    zero = flat == 0
    sparse = bool(zero.mean() >= _SPARSE)
    clustered = flat[~zero] if sparse else flat
    labels = np.zeros(flat.size, np.int64)
    if clustered.size:
        bounds = _boundaries(clustered.astype(np.float64), 2**bits - int(sparse))
        labels[~zero if sparse else slice(None)] = np.searchsorted(bounds, clustered, side="right") + int(
            sparse
        )
    labels = np.unique(labels, return_inverse=True)[1]
    indices = torch.from_numpy(labels.reshape(weight.shape).astype(np.uint8)).to(weight.device)
    return Codebook(indices, _cluster_means(weight.detach(), indices, int(labels.max()) + 1))


def _cluster_means(weight: Tensor, indices: Tensor, num: int) -> Tensor:
    labels = indices.flatten().long().cpu()
    sums = torch.bincount(labels, weights=weight.flatten().double().cpu(), minlength=num)
    return (sums / torch.bincount(labels, minlength=num)).float().to(weight.device)


def _boundaries(values: NDArray[np.float64], num: int) -> NDArray[np.float64]:
    """What separates ``num`` clusters (or as many as there are distinct values), ascending."""
    values = np.sort(values)
    points, masses = _summary(values)
    starts = _optimal_starts(points, masses, min(num, len(points)))
    centres = np.add.reduceat(points * masses, starts) / np.add.reduceat(masses, starts)
    total = np.concatenate([[0.0], np.cumsum(values)])
    cuts = np.zeros(0, np.int64)
    for _ in range(_NUM_ROUNDS):
        bounds = (centres[1:] + centres[:-1]) / 2
        before, cuts = cuts, np.concatenate([[0], np.searchsorted(values, bounds), [len(values)]])
        if np.array_equal(before, cuts):
            break
        sizes = np.diff(cuts)
        centres = np.where(sizes > 0, np.diff(total[cuts]) / np.maximum(sizes, 1), centres)
    return bounds


def _summary(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distinct values and their numbers; when these are many, means and numbers of bins.

    Bins are about as wide as clusters of least error would be, which is as the inverse cube root of the
    density (Panter and Dite, Proc. IRE 39(1), 1951).
    """
    points, counts = np.unique(values, return_counts=True)
    if len(points) <= _NUM_POINTS:
        return points, counts.astype(np.float64)
    strides = np.cbrt(np.diff(points) ** 2 * counts[1:])
    for _ in range(3):  # a gap before an outlier needs one bin, not most of them
        strides = np.minimum(strides, strides.sum() / _NUM_POINTS)
    places = np.concatenate([[0.0], np.cumsum(strides)])
    starts = np.searchsorted(places, np.linspace(0, places[-1], _NUM_POINTS, endpoint=False))
    starts = np.unique(starts)
    masses = np.add.reduceat(counts, starts).astype(np.float64)
    return np.add.reduceat(points * counts, starts) / masses, masses


def _optimal_starts(points: NDArray[np.float64], masses: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """First points of the ``num`` runs with the least squared error about their means.

    Source: Wang and Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011.
    """
    centred = points - np.average(points, weights=masses)
    n, s, q = (np.concatenate([[0.0], np.cumsum(masses * centred**power)]) for power in (0, 1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.subtract.outer(q, q).T - np.subtract.outer(s, s).T ** 2 / np.subtract.outer(n, n).T
    cost[np.tril_indices(len(n))] = np.inf  # cost[i, j]: of the run from point i up to j, j left out
    least, choices = cost[0], []
    for _ in range(num - 1):
        through = least[:, None] + cost
        choices.append(through.argmin(axis=0))
        least = through.min(axis=0)
    starts, end = [], len(points)
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return np.array([0, *reversed(starts)], np.int64)


class CodebookTables:
    """Codebooks of a network's layers, made when first asked for and kept.

    Args:
        model: the trained (and perhaps pruned) network; not changed.

    Raises:
        UnsupportedModelError: the network has no convolution or linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
        if not self.layers:
            raise UnsupportedModelError("the network has no convolution or linear layer to cluster")
        self._codebooks: dict[tuple[str, int], Codebook] = {}

    def codebook(self, layer: str, bits: int) -> Codebook:
        """A layer's weights clustered to ``2**bits`` values."""
        key = (layer, bits)
        if key not in self._codebooks:
            self._codebooks[key] = make_codebook(self.layers[layer].weight, bits)
        return self._codebooks[key]

    def codebooks(self, plan: Plan) -> dict[str, Codebook]:
        """The codebooks of a plan; layers without bits, or with 32, have none.

        Raises:
            ValueError: a layer the network lacks, widths that no codebook has, or activations below 32 bits.
        """
        faults = [f"no layer named {name!r}" for name in plan.bits if name not in self.layers]
        for name, bits in plan.bits.items():
            if not (bits.weight <= MAX_CODE_BITS or bits.weight == 32):
                faults.append(
                    f"weights of {name!r} must have 1 to {MAX_CODE_BITS} or 32 bits, got {bits.weight}"
                )
            if bits.act < 32:
                faults.append(f"codebooks leave activations at 32 bits, got {bits.act} for {name!r}")
        if faults:
            raise ValueError("; ".join(faults))
        return {n: self.codebook(n, bits.weight) for n, bits in plan.bits.items() if bits != Bits()}

    def network(self, plan: Plan) -> nn.Module:
        """The network with a plan's weights, for evaluation only; shares all other tensors with the model.

        Args:
            plan: as for :meth:`codebooks`.

        Raises:
            ValueError: as :meth:`codebooks`.
        """
        books = self.codebooks(plan)
        shared: dict[int, Any] = {id(t): t for t in (*self._model.parameters(), *self._model.buffers())}
        network = copy.deepcopy(self._model, shared).eval()
        for name, book in books.items():
            layer: Any = network.get_submodule(name)
            layer.weight = nn.Parameter(book.values, requires_grad=False)
        return network


def share_weights(model: nn.Module, codebooks: Mapping[str, Codebook]) -> nn.Module:
    """A trainable copy in which the weights of some layers are values of their codebooks.

    Training moves the shared values and leaves the assignment. A step of gradient descent gives what the same
    step on every single weight gives after each weight is replaced by the mean of its cluster (HAQ's
    released code), momentum included: the gradient of a value is the mean, not the sum, over its cluster.
    A value of 0 stays 0. Shared values are vectors, so ``training.fit`` does not decay them.

    Args:
        model: the network; copied, not changed.
        codebooks: layer -> codebook.

    Raises:
        ValueError: a codebook of another shape than the layer's weight.
    """
    network = copy.deepcopy(model)
    for name, book in codebooks.items():
        layer: Any = network.get_submodule(name)
        if book.indices.shape != layer.weight.shape:
            raise ValueError(
                f"the codebook of {name!r} has shape {tuple(book.indices.shape)}, the layer's weight "
                f"{tuple(layer.weight.shape)}; make it from this network"
            )
        parametrize.register_parametrization(layer, "weight", _Shared(book))
    return network


def trained_codebooks(network: nn.Module) -> dict[str, Codebook]:
    """The codebooks of a network from :func:`share_weights`, with the values it has now."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], _Shared):
            layer = name.removesuffix(".parametrizations.weight").removesuffix("parametrizations.weight")
            found[layer] = Codebook(module[0].indices, module.original.detach().clone())
    return found


class _Shared(nn.Module):
    """Maps shared values to a weight."""

    indices: Tensor
    shares: Tensor

    def __init__(self, book: Codebook) -> None:
        super().__init__()
        sizes = torch.bincount(book.indices.flatten().long(), minlength=len(book.centroids))
        self.register_buffer("indices", book.indices)
        self.register_buffer("shares", torch.where(book.centroids == 0, 0.0, 1.0 / sizes))
        self._start = book.centroids

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values that training starts from."""
        return self._start.to(weight, copy=True)

    def forward(self, centroids: Tensor) -> Tensor:
        made: Tensor = _Look.apply(centroids, self.indices, self.shares)
        return made


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centroids: Tensor, indices: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(indices, shares)
        return centroids[indices.long()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        indices, shares = ctx.saved_tensors
        sums = torch.zeros_like(shares).index_add_(0, indices.flatten().long(), gradients[0].flatten())
        return sums * shares, None, None
