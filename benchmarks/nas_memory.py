"""Peak memory of searching with binary paths, beside training one network and the mixture of all.

Counts the bytes of every tensor that is alive (weights, gradients, momentum, activations, temporaries between
operations; not the scratch space inside a kernel), and gives the peak over a step of the weights and one of
the architecture. Space: the chain for 32x32 images (10 blocks, 6 or 7 operations each), float32, SGD.

- ``one network``: training the largest member.
- ``binary paths, largest``: a search step whose drawn path is that member everywhere: the worst case.
- ``binary paths, drawn``: the largest of some search steps on drawn paths.
- ``mixture``: a step of DARTS over the same space.

Prints one table, and saves it as results/nas-memory-<machine>-torch<version>.csv.
Run: python benchmarks/nas_memory.py [--batch 32] [--steps 2]
"""

from __future__ import annotations

import argparse
import csv
import platform
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autocompress.nas.spaces import mbconv_chain
from autocompress.nas.supernet import DARTS, ProxylessNAS, Step, Supernet
from autocompress.nas.supernet.gates import BinaryPath, OnePath, straight_through

COLUMNS = ("what", "batch", "peak_mib", "ratio_to_one_network", "weights_mib")
MIB = 2**20


class PeakBytes(TorchDispatchMode):
    """Bytes of live tensor storages, and the most there were."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in existing:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out


def sgd(model: nn.Module) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def weight_step(model: nn.Module, optimizer: torch.optim.SGD, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def peak_of(model: nn.Module, optimizer: torch.optim.SGD, steps: Callable[[], None]) -> int:
    existing = [*model.parameters(), *model.buffers()]
    existing += [state["momentum_buffer"] for state in optimizer.state.values()]
    with PeakBytes(existing) as counted:
        steps()
    return counted.peak


def one_network(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[int, int]:
    optimizer = sgd(network)
    weights = sum(p.numel() * 4 for p in network.parameters())
    return peak_of(network, optimizer, lambda: weight_step(network, optimizer, batch)), weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    space = mbconv_chain((3, 32, 32), 10)
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(args.batch, 3, 32, 32, generator=generator), torch.arange(args.batch) % 10)
    largest = {name: ops[-1] for name, ops in space.decisions.items()}
    peaks: dict[str, tuple[int, int]] = {}

    peaks["one network"] = one_network(space.build(largest, seed=0).train(), batch)
    supernet = Supernet(space, seed=0).train()
    weights = sum(p.numel() * 4 for p in supernet.parameters())
    optimizer = sgd(supernet)

    def worst() -> None:
        supernet.use({name: OnePath(len(ops) - 1) for name, ops in space.decisions.items()})
        weight_step(supernet, optimizer, batch)
        optimizer.zero_grad()
        gates = {
            name: BinaryPath(straight_through(p, len(p) - 1), len(p) - 1, tuple(range(len(p))))
            for name, p in supernet.probabilities().items()
        }
        supernet.use(gates)
        torch.autograd.grad(F.cross_entropy(supernet(batch[0]), batch[1]), list(supernet.alphas.values()))

    def drawn() -> None:
        method = ProxylessNAS()
        alphas = method.alpha.optimizer(supernet)
        for _ in range(args.steps):
            method.architecture_step(supernet, Step(batch, batch, alphas, optimizer, generator))
            method.weight_gates(supernet, generator, 0.0)
            weight_step(supernet, optimizer, batch)

    def mixture() -> None:
        method = DARTS()
        alphas = method.alpha.optimizer(supernet)
        method.architecture_step(supernet, Step(batch, batch, alphas, optimizer, generator))
        method.weight_gates(supernet, generator, 0.0)
        weight_step(supernet, optimizer, batch)

    for name, steps in (
        ("binary paths, largest", worst),
        ("binary paths, drawn", drawn),
        ("mixture", mixture),
    ):
        supernet.zero_grad()
        peaks[name] = peak_of(supernet, optimizer, steps), weights
    rows = [
        dict(
            zip(
                COLUMNS,
                (
                    name,
                    args.batch,
                    round(peak / MIB, 1),
                    round(peak / peaks["one network"][0], 3),
                    round(w / MIB, 1),
                ),
                strict=True,
            )
        )
        for name, (peak, w) in peaks.items()
    ]
    print("".join(f"{column:>24}" for column in COLUMNS))
    for row in rows:
        print("".join(f"{value:>24}" for value in row.values()))
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"nas-memory-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
