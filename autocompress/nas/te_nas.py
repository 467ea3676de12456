"""TE-NAS: architectures ranked without training, by the neural tangent kernel and by linear regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from autocompress.core.errors import DataError, RecipeError
from autocompress.nas.spaces import Space
from autocompress.nas.spaces.space import ABSENT
from autocompress.nas.supernet.gates import Mixture
from autocompress.nas.supernet.network import Supernet

Live = Mapping[str, Sequence[str]]
"""Decision -> operations that are left."""
_EPS = 1e-12
_DIGITS = 3


def condition_number(model: nn.Module, images: Tensor) -> float:
    """Largest over smallest eigenvalue of the empirical neural tangent kernel; smaller trains better.

    ``Theta_ij = <J_i, J_j>`` with J_i the gradient of the sum of sample i's logits by all tensors named
    ``weight``, in double precision and with the statistics of the batch. Infinite where the smallest
    eigenvalue is not positive, as with repeated samples or more samples than weights, or a gradient is not
    finite.

    Chen, Gong, Wang, TE-NAS, arXiv 2102.11535, section 3.2.1, and its released code. Differs from the code in
    the precision, which there gives negative eigenvalues.

    Args:
        model: in training mode for batch statistics; left as it was.
        images: (N, C, H, W), at least 2.

    Raises:
        DataError: fewer than 2 images.
    """
    if len(images) < 2:
        raise DataError(f"a condition number needs at least 2 images, got {len(images)}")
    weights = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "weight"]
    outputs = model(images).flatten(1).sum(1)
    rows = []
    for output in outputs:
        found = torch.autograd.grad(output, weights, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([g.flatten().double() for g in found if g is not None]))
    jacobian = torch.stack(rows)
    if not bool(torch.isfinite(jacobian).all()):
        return math.inf
    values = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    smallest, largest = float(values[0]), float(values[-1])
    return largest / smallest if smallest > _EPS * largest and largest > 0 else math.inf


def num_linear_regions(model: nn.Module, images: Tensor) -> int:
    """How many different patterns of ReLU signs some images give; more can express more.

    Chen, Gong, Wang, arXiv 2102.11535, section 3.2.2. Networks of usual size give every image its own
    pattern: use a narrow one and thousands of images.

    Args:
        model: with ``nn.ReLU`` modules; left as it was.
        images: (N, C, H, W).
    """
    patterns: list[NDArray[np.uint8]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        signs = (output.detach() > 0).flatten(1).cpu().numpy()
        patterns.append(np.packbits(signs, axis=1))

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.ReLU)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not patterns:
        return 1
    return len({row.tobytes() for row in np.concatenate(patterns, axis=1)})


@dataclass(frozen=True, slots=True)
class Removal:
    """One operation taken out.

    Args:
        decision, operation: which.
        importance: its sum of ranks; the smallest of its decision in that round.
    """

    decision: str
    operation: str
    importance: float


def prune_by_importance(
    live: Live,
    indicators: Callable[[dict[str, tuple[str, ...]]], tuple[float, float]],
    *,
    num_pruned: int = 1,
) -> tuple[dict[str, str], tuple[Removal, ...]]:
    """Take operations out, the least important of every decision in each round, until one each is left.

    The importance of an operation is the sum of two ranks over all operations still there: by how much its
    removal lowers the condition number (most first), and by how much it lowers the number of regions (least
    first). Equal changes share a rank.

    Chen, Gong, Wang, arXiv 2102.11535, algorithm 1. Changes are rounded to 3 significant digits, as in the
    released code, so that noise makes no difference.

    Args:
        live: decision -> its operations, at least one.
        indicators: (condition number, regions) of the supernet of some operations; infinite numbers are the
            worst.
        num_pruned: operations taken from each decision per round.

    Returns:
        The operation left for every decision, and the removals in order.

    Raises:
        RecipeError: ``num_pruned`` below 1 or a decision without operations.
    """
    if num_pruned < 1 or any(not ops for ops in live.values()):
        raise RecipeError(f"num_pruned must be >= 1 and every decision have operations, got {num_pruned}")
    left = {name: tuple(ops) for name, ops in live.items()}
    removals: list[Removal] = []
    while any(len(ops) > 1 for ops in left.values()):
        whole = indicators(left)
        items = [(name, op) for name, ops in left.items() if len(ops) > 1 for op in ops]
        changes = []
        for name, op in items:
            without = indicators({**left, name: tuple(o for o in left[name] if o != op)})
            changes.append([_change(a, b) for a, b in zip(whole, without, strict=True)])
        by_kappa, by_regions = np.array(changes).T
        importance = rankdata(-by_kappa, "dense") + rankdata(by_regions, "dense")
        for name in [n for n, ops in left.items() if len(ops) > 1]:
            own = sorted(
                (importance[i], left[name].index(op)) for i, (n, op) in enumerate(items) if n == name
            )
            for rank, index in own[: min(num_pruned, len(own) - 1)]:
                removals.append(Removal(name, left[name][index], float(rank)))
            gone = {left[name][index] for _, index in own[: min(num_pruned, len(own) - 1)]}
            left[name] = tuple(op for op in left[name] if op not in gone)
    return {name: ops[0] for name, ops in left.items()}, tuple(removals)


def _change(whole: float, without: float) -> float:
    """``(whole - without) / whole`` to 3 significant digits; infinity is worse than any number."""
    if math.isinf(whole) or math.isinf(without):
        return 0.0 if whole == without else math.copysign(math.inf, whole - without)
    share = (whole - without) / whole if whole else 0.0
    return float(f"{share:.{_DIGITS}g}")


@dataclass(frozen=True)
class TENAS:
    """Prunes a supernet to one member without labels or training.

    Args:
        ntk_space: small networks whose condition number is measured, with the decisions to be taken.
        region_space: the same, whose regions are counted; very narrow.
        images: (N, C, H, W) for the condition number, in the size of ``ntk_space``.
        region_images: the same for the regions; thousands.
        num_draws: of fresh weights per value, which are averaged.
        num_pruned: operations taken from each decision per round: 1 for cells of 5 operations, 3 for DARTS'.

    Raises:
        RecipeError: the two spaces have different decisions, or a number is below 1.
    """

    ntk_space: Space
    region_space: Space
    images: Tensor
    region_images: Tensor
    num_draws: int = 3
    num_pruned: int = 1

    def __post_init__(self) -> None:
        faults = []
        if dict(self.ntk_space.decisions) != dict(self.region_space.decisions):
            faults.append("ntk_space and region_space must offer the same operations for the same decisions")
        if self.num_draws < 1:
            faults.append(f"num_draws must be >= 1, got {self.num_draws}")
        if faults:
            raise RecipeError(faults)

    def __call__(self, *, seed: int) -> tuple[dict[str, str], tuple[Removal, ...]]:
        """The member that is left and the removals in order; ``none`` is taken out first.

        Args:
            seed: of the weights.
        """
        live = {
            name: tuple(op for op in ops if op not in ABSENT)
            for name, ops in self.ntk_space.decisions.items()
        }
        arch, removals = prune_by_importance(
            live, lambda left: self.indicators(left, seed=seed), num_pruned=self.num_pruned
        )
        return arch, removals

    def indicators(self, live: Live, *, seed: int) -> tuple[float, float]:
        """Condition number and regions of the supernet of some operations, means over fresh weights.

        The same weights are drawn for every set of operations, so that differences are the operations'.
        """
        kappas, regions = [], []
        for draw in range(self.num_draws):
            kappas.append(
                condition_number(_narrowed(self.ntk_space, live, seed + draw, "fan_out"), self.images)
            )
            network = _narrowed(self.region_space, live, seed + draw, "fan_in")
            regions.append(num_linear_regions(network, self.region_images))
        return float(np.mean(kappas)), float(np.mean(regions))


def _narrowed(space: Space, live: Live, seed: int, fan: str) -> Supernet:
    """A supernet of some operations, each with the same weight in the mixture."""
    supernet = Supernet(space, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in supernet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode=fan, generator=generator)  # type: ignore[arg-type]
    gates = {}
    for name, ops in space.decisions.items():
        chosen = tuple(ops.index(op) for op in live[name])
        values = torch.zeros(len(ops))
        values[list(chosen)] = 1 / len(chosen)
        gates[name] = Mixture(values, chosen)
    supernet.use(gates)
    return supernet.train()
