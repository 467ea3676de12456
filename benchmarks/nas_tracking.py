"""CHASE at small size: the module of a tracker found by DARTS, against hand-made and random ones.

Task: find in a 20x20 patch the 8x8 digit that the template shows, among two other digits, before photographs,
with noise and changing light; 49 positions (``autocompress.nas.tracking.moving_sprites``). Every module sits
between the same frozen two-stage backbone and a matching head, and is trained in the same way on the training
split. Settings were fixed on the search and hold-out splits with seed 100; the test split is read once, here.

- ``darts, first order`` and ``second order``: one search per seed, ended by the hold-out; its cell retrained.
- ``random cells``: five per seed of the same space, two edges per node.
- ``3x3 convolutions``: one or two on each feature, as wide as it takes to have at least as many trained
  parameters as the larger of the seed's two derived cells.

within_one is the share of test frames whose peak is at most one position off. ``spread`` is the standard
deviation over the seeds, for random cells over all of them. Search seconds are processor seconds of one
thread; peak_mib counts the live tensors of one step of the weights and one of the architecture.

Prints one table, and saves it as results/nas-tracking-<machine>-torch<version>.csv.
Run: python benchmarks/nas_tracking.py [--seeds 0 1 2] [--split test] [--ledger FILE]
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nas_memory import MIB, peak_of

from autocompress.nas.supernet import DARTS, Adam, HoldOut, SearchSettings, Step, Supernet, SupernetSearch
from autocompress.nas.tracking import (
    FrameNetwork,
    MatchingData,
    SequenceSettings,
    Tracker,
    TrackingCell,
    digit_sprites,
    localise,
    matching_of,
    moving_sprites,
    train_backbone,
)
from autocompress.training import TrainSettings, fit, subset

SEQUENCES = SequenceSettings((3200, 400, 150, 500), num_frames=2, noise=0.08, backdrop=0.6)
SEARCHED = 800  # of the 6,400 training pairs: what a search trains weights on; retraining sees all
SEARCH = SearchSettings(epochs=5, warmup_epochs=1, batch_size=16, lr=0.05, min_lr=0.005)
ALPHA = Adam(0.1, (0.5, 0.999), 1e-3)
TRAINING = TrainSettings(epochs=2, batch_size=16, lr=0.05, weight_decay=5e-4, clip_norm=5.0)
NUM_RANDOM = 5
FIGURES = ("within_one", "exact", "mean_iou", "centre_error")
COLUMNS = (
    "module",
    "runs",
    "params",
    "within_one",
    "spread",
    "exact",
    "mean_iou",
    "centre_error",
    "search_cpu_s",
    "peak_mib",
    "epoch_kept",
)


def method(order: int) -> DARTS:
    """CHASE's settings but for the logits' rate, 0.1 in place of 3e-4: there are 200 steps, not 90,000."""
    return DARTS(order, ALPHA, affine=True, max_skips=None, skip_dropout=0.6)


class Bench:
    """The data, the space, and a ledger of what was measured."""

    def __init__(self, split: str, ledger: Path | None) -> None:
        self.data: MatchingData = moving_sprites(digit_sprites(), SEQUENCES, seed=0)
        self.matching = matching_of(self.data)
        backbone = train_backbone(self.data.centred, seed=0)
        self.space = TrackingCell(backbone, (1, self.data.side, self.data.side))
        self.split, self.ledger, self.done = split, ledger, dict[str, dict[str, Any]]()
        if ledger is not None and ledger.exists():
            self.done = {row["key"]: row for line in ledger.open() for row in [json.loads(line)]}

    def once(self, key: str, make: Any) -> dict[str, Any]:
        """What a function gives, from the ledger if it is there."""
        if key not in self.done:
            self.done[key] = {"key": key, **make()}
            print(self.done[key], flush=True)
            if self.ledger is not None:
                with self.ledger.open("a") as file:
                    file.write(json.dumps(self.done[key]) + "\n")
        return self.done[key]

    def search(self, order: int, seed: int) -> dict[str, Any]:
        """A search, what it cost, and how it went."""
        start = time.process_time()
        search = SupernetSearch(method(order), SEARCH, task=self.matching)
        holdout = HoldOut(self.data.splits["holdout"].images)
        data = replace(self.data.data, train=subset(self.data.data.train, np.arange(SEARCHED)))
        result = search(self.space, data, seed=seed, holdout=holdout)
        return {
            "arch": result.arch,
            "search_cpu_s": time.process_time() - start,
            "epoch_kept": result.epoch,
            "holdout": [report.holdout_loss for report in result.reports],
            "entropy": [report.entropy for report in result.reports],
            "archs": [report.arch for report in result.reports],
            "peak_mib": self.peak(order) / MIB,
        }

    def peak(self, order: int) -> int:
        """Bytes of live tensors in a step of each kind, at most."""
        supernet = Supernet(self.space, seed=0, affine=True, task=self.matching)
        optimizer = torch.optim.SGD(supernet.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        for parameter in supernet.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        x, y = self.data.data.train.batch(torch.arange(SEARCH.batch_size), None)  # type: ignore[attr-defined]
        alphas = ALPHA.optimizer(supernet)

        def steps() -> None:
            step = Step((x, y), (x, y), alphas, optimizer, torch.Generator())
            method(order).architecture_step(supernet, step)
            method(order).weight_gates(supernet, torch.Generator(), 0.0)
            step.loss(supernet(x), y).backward()
            optimizer.step()

        return peak_of(supernet, optimizer, steps)

    def trained(self, network: FrameNetwork, seed: int) -> dict[str, Any]:
        """Figures of a network after training."""
        start, tracker = time.process_time(), Tracker(network, self.matching)
        fit(tracker, self.data.data, TRAINING, seed=seed)
        pairs = self.data.splits[self.split]
        found = localise(tracker, pairs, sprite_side=self.data.sprite_side)
        seconds = time.process_time() - start
        return {"params": network.num_trained, **asdict(found), "training_cpu_s": seconds}

    def seed(self, seed: int, orders: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
        """Module -> what was measured with this seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for order in orders:
            searched = self.once(f"search {order} {seed}", lambda order=order: self.search(order, seed))
            row = self.member(f"derived {order} {seed}", searched["arch"], seed)
            found[f"darts, {'first' if order == 1 else 'second'} order"] = [{**searched, **row}]
        at_least = max(row["params"] for rows in found.values() for row in rows)
        for depth in (1, 2):
            network = self.space.hand_made(depth, seed=seed, at_least=at_least)
            row = self.once(f"hand {depth} {seed}", lambda network=network: self.trained(network, seed))
            found[f"3x3 convolutions, {depth} deep"] = [row]
        generator = np.random.default_rng(seed)
        cells = [self.space.random(generator) for _ in range(NUM_RANDOM)]
        found["random cells"] = [
            self.member(f"random {number} {seed}", arch, seed) for number, arch in enumerate(cells)
        ]
        return found

    def member(self, key: str, arch: dict[str, str], seed: int) -> dict[str, Any]:
        """Figures of a cell after training."""

        def make() -> dict[str, Any]:
            network = self.space.build(arch, seed=seed)
            assert isinstance(network, FrameNetwork)
            return self.trained(network, seed)

        return self.once(key, make)


def summary(module: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("params", *FIGURES)}
    spread = float(np.std([row["within_one"] for row in rows], ddof=1)) if len(rows) > 1 else 0.0
    cost = {
        name: float(np.mean([row[name] for row in rows])) if name in rows[0] else ""
        for name in ("search_cpu_s", "peak_mib", "epoch_kept")
    }
    return {"module": module, "runs": len(rows), "spread": spread, **means, **cost}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--split", default="test")
    parser.add_argument("--ledger", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, rows = Bench(args.split, args.ledger), dict[str, list[dict[str, Any]]]()
    for seed in args.seeds:
        for module, found in bench.seed(seed, tuple(args.orders)).items():
            rows.setdefault(module, []).extend(found)
    table = [summary(module, found) for module, found in rows.items()]
    print("".join(f"{column:>28}" if column == "module" else f"{column:>14}" for column in COLUMNS))
    for row in table:
        cells = [f"{row[c]:>14.3f}" if isinstance(row[c], float) else f"{row[c]:>14}" for c in COLUMNS[1:]]
        print(f"{row['module']:>28}" + "".join(cells))
    if args.split != "test":
        return
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"nas-tracking-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {c: round(row[c], 4) if isinstance(row[c], float) else row[c] for c in COLUMNS} for row in table
        )


if __name__ == "__main__":
    main()
