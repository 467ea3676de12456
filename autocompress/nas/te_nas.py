"""TE-NAS: architectures ranked without training, by the neural tangent kernel and by linear regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from autocompress.core.errors import DataError, RecipeError
from autocompress.nas.spaces import Darts, Space
from autocompress.nas.spaces.cells import EDGES_PER_NODE
from autocompress.nas.spaces.space import ABSENT
from autocompress.nas.supernet.gates import Mixture
from autocompress.nas.supernet.network import Supernet

Operations = dict[str, tuple[str, ...]]
"""Decision -> operations that are left."""
Indicators = Callable[[Operations], tuple[float, float]]
"""Condition number and number of regions of the supernet of some operations."""
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
    live: Mapping[str, Sequence[str]],
    indicators: Indicators,
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
        items = [(name, op) for name, ops in left.items() if len(ops) > 1 for op in ops]
        without = [{**left, name: tuple(o for o in left[name] if o != op)} for name, op in items]
        importance = dict(zip(items, importances(left, without, indicators), strict=True))
        for name, ops in list(left.items()):
            count = min(num_pruned, len(ops) - 1)
            own = {op: importance[name, op] for op in ops} if count else {}
            least = sorted(own, key=own.__getitem__)[:count]
            removals += [Removal(name, op, importance[name, op]) for op in least]
            left[name] = tuple(op for op in ops if op not in least)
    return {name: ops[0] for name, ops in left.items()}, tuple(removals)


def keep_edges(
    arch: Mapping[str, str],
    edges_into_nodes: Sequence[Sequence[str]],
    indicators: Indicators,
    *,
    num_kept: int,
) -> dict[str, str]:
    """Give every node its most important edges and set the others to ``none``.

    The importance of an edge is that of an operation, ranked among all edges at once (TE-NAS' last step in
    DARTS' space).

    Args:
        arch: an operation on every edge.
        edges_into_nodes: the decisions of the edges of each node.
        indicators: see :func:`prune_by_importance`.
        num_kept: edges per node.
    """
    left: Operations = {name: (op,) for name, op in arch.items()}
    edges = [name for node in edges_into_nodes for name in node]
    without: list[Operations] = [{**left, name: ("none",)} for name in edges]
    importance = dict(zip(edges, importances(left, without, indicators), strict=True))
    kept = dict(arch)
    for node in edges_into_nodes:
        for name in sorted(node, key=lambda n: -importance[n])[num_kept:]:
            kept[name] = "none"
    return kept


def importances(whole: Operations, parts: Sequence[Operations], indicators: Indicators) -> list[float]:
    """For each part of a whole, how much is lost with what it lacks: a sum of two ranks, shared by equals.

    Args:
        whole: decision -> operations.
        parts: the same, each with something taken out.
        indicators: (condition number, regions).
    """
    before = indicators(whole)
    changes = np.array(
        [[_change(a, b) for a, b in zip(before, indicators(part), strict=True)] for part in parts]
    )
    ranks = rankdata(-changes[:, 0], "dense") + rankdata(changes[:, 1], "dense")
    return [float(rank) for rank in ranks]


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

        In DARTS' space every node then keeps two edges.

        Args:
            seed: of the weights.
        """
        live = {
            name: tuple(op for op in ops if op not in ABSENT)
            for name, ops in self.ntk_space.decisions.items()
        }
        indicators = self.indicators(seed)
        arch, removals = prune_by_importance(live, indicators, num_pruned=self.num_pruned)
        if isinstance(self.ntk_space, Darts):
            nodes = self.ntk_space.edges_into_nodes
            arch = keep_edges(arch, nodes, indicators, num_kept=EDGES_PER_NODE)
        return arch, removals

    def indicators(self, seed: int) -> Indicators:
        """Condition number and regions of the supernet of some operations, means over fresh weights.

        All sets of operations have the same weights, so that differences are the operations'.
        """
        draws = range(seed, seed + self.num_draws)
        ntk_nets = [_initialised(self.ntk_space, draw, "fan_out") for draw in draws]
        region_nets = [_initialised(self.region_space, draw, "fan_in") for draw in draws]

        def measured(live: Operations) -> tuple[float, float]:
            for supernet in (*ntk_nets, *region_nets):
                supernet.use(_equal_shares(supernet.space, live))
            kappas = [condition_number(net, self.images) for net in ntk_nets]
            regions = [num_linear_regions(net, self.region_images) for net in region_nets]
            return float(np.mean(kappas)), float(np.mean(regions))

        return measured


def _initialised(space: Space, seed: int, fan: Literal["fan_in", "fan_out"]) -> Supernet:
    """A supernet with normal weights after He et al., arXiv 1502.01852, in training mode."""
    supernet = Supernet(space, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in supernet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode=fan, generator=generator)
    return supernet.train()


def _equal_shares(space: Space, live: Operations) -> dict[str, Mixture]:
    gates = {}
    for name, ops in space.decisions.items():
        chosen = tuple(ops.index(op) for op in live[name])
        values = torch.zeros(len(ops))
        values[list(chosen)] = 1 / len(chosen)
        gates[name] = Mixture(values, chosen)
    return gates
