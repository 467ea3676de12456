"""How TE-NAS' indicators rank random cells that are then trained on digits.

30 random cells of NAS-Bench-201's space through which data flows: 4 channels, one cell per stage, 8x8 pixels.
For each the condition number and the number of linear regions, means over 3 draws of weights, from training
images without labels; the numbers of weights and MACs; and the accuracy on 288 held-back images after 12
epochs, mean over 3 seeds. Reports Spearman's rank correlation of each with the accuracy, with the sign for
which higher should be better; over 30 cells it has a standard error of about 0.18. Test images are not read.

Prints two tables, and saves them as results/te-nas-digits-<machine>-torch<version>.csv.
Run: python benchmarks/te_nas_digits.py [--cells 30]
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from autocompress.hardware_sim import MacsModel
from autocompress.nas import TENAS, NASBench201
from autocompress.nas.spaces.operations import Zeros
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data

SPACE = NASBench201((1, 8, 8), 10, channels=4, cells_per_stage=1)
TRAINING = TrainSettings(epochs=12, batch_size=64, lr=0.1)
COLUMNS = ("cell", "accuracy", "kappa", "regions", "weights", "macs")
# The sign for which a higher value should mean a better network.
SIGNS = {"kappa": -1, "regions": 1, "weights": 1, "macs": 1}


def random_cells(num: int) -> list[dict[str, str]]:
    """Different cells through which data flows."""
    rng, found = np.random.default_rng(0), list[dict[str, str]]()
    while len(found) < num:
        arch = SPACE.random(rng)
        blocked = any(isinstance(module, Zeros) for module in SPACE.build(arch, seed=0).modules())
        if not blocked and arch not in found:
            found.append(arch)
    return found


def te_nas(images: Tensor) -> TENAS:
    """The indicators of 24 images, and of 4x4 crops of all."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 5, (len(images), 2), generator=generator).tolist()
    crops = [x[:, top : top + 4, left : left + 4] for x, (top, left) in zip(images, corners, strict=True)]
    return TENAS(
        NASBench201((1, 8, 8), 10, channels=3, cells_per_stage=1),
        NASBench201((1, 4, 4), 10, channels=1, cells_per_stage=1),
        images[:24],
        torch.stack(crops),
    )


def accuracy(arch: dict[str, str], data: Data, seed: int) -> float:
    network = SPACE.build(arch, seed=seed)
    fit(network, data, TRAINING, seed=seed)
    return 100 * evaluate(network, data.search).accuracy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("digits", search_size=0.2, seed=0)
    images, _ = data.train.batch(torch.arange(len(data.train)), None)
    indicators, rows = te_nas(images).indicators(0), []
    print(*COLUMNS, sep="\t")
    for arch in random_cells(args.cells):
        kappa, regions = indicators({name: (op,) for name, op in arch.items()})
        graph = SPACE.graph(arch)
        values = (
            SPACE.to_text(arch),
            mean(accuracy(arch, data, seed) for seed in range(3)),
            *(kappa, regions, sum(layer.num_weights for layer in graph.layers), MacsModel()(graph)["macs"]),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(*(f"{v:.2f}" if isinstance(v, float) else v for v in values), sep="\t", flush=True)
    print(f"\ninfinite condition numbers: {sum(math.isinf(row['kappa']) for row in rows)}")
    for name, sign in SIGNS.items():
        found = spearmanr([sign * row[name] for row in rows], [row["accuracy"] for row in rows]).statistic
        print(f"Spearman({'-' if sign < 0 else ''}{name}, accuracy) = {found:.3f}")
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"te-nas-digits-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
