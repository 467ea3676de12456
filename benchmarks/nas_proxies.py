"""How well scores without training rank NAS-Bench-201's cells, beside published scores of the same cells.

Networks have the benchmark's size (16 channels, 5 cells per stage) and fresh weights; scores come from one
batch of CIFAR-10 training images. For each score: Spearman's rank correlation with the trained validation
accuracy for our scores and for the published ones of the same cells, and what the literature reports over all
cells (Abdelfattah et al., arXiv 2101.08134, table 1, CIFAR-10). The cells are a random sample of the 725 that
were published; a correlation over n cells has a standard error of about 1 / sqrt(n).

Prints one table, and saves it as results/nas-proxies-<machine>-torch<version>.csv.
Run: python benchmarks/nas_proxies.py zc_nasbench201.json cifar10.npz [--cells 60] [--batch 32]
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from autocompress.nas.proxies import PROXIES
from autocompress.nas.spaces import NASBench201

# Operations and edges in the order of the published tuples (NASLib).
OPERATIONS = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
EDGES = ("cell.0_1", "cell.0_2", "cell.0_3", "cell.1_2", "cell.1_3", "cell.2_3")
PUBLISHED_NAMES = {"naswot": "nwot", "jacob_cov": "jacov", "macs": "flops"}
LITERATURE = {"synflow": 0.737, "jacob_cov": 0.731, "snip": 0.596, "grad_norm": 0.594, "fisher": 0.36}
COLUMNS = (
    "score",
    "cells",
    "ours",
    "published_scores_same_cells",
    "literature_all_cells",
    "seconds_per_cell",
)


def images_of(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first training images, normalised by their own mean and deviation."""
    with np.load(path) as arrays:
        x = np.asarray(arrays["x_train"][:count], dtype=np.float32) / 255
        y = np.asarray(arrays["y_train"][:count], dtype=np.int64)
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return (images - mean) / std, torch.from_numpy(y)


def arch_of(key: str) -> dict[str, str]:
    codes = [int(code) for code in key.strip("()").split(",")]
    return {edge: OPERATIONS[code] for edge, code in zip(EDGES, codes, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=list(PROXIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    published = json.loads(args.scores.read_text())["cifar10"]
    keys = [str(k) for k in np.random.default_rng(0).permutation(sorted(published))[: args.cells]]
    accuracy = [published[key]["val_accuracy"] for key in keys]
    images, labels = images_of(args.images, args.batch)
    space, ours = NASBench201(), {name: list[float]() for name in args.only}
    seconds = dict.fromkeys(args.only, 0.0)
    for number, key in enumerate(keys):
        network = space.build(arch_of(key), seed=number)
        for name in args.only:
            start = time.process_time()
            ours[name].append(PROXIES[name](network, images, labels))
            seconds[name] += time.process_time() - start
    rows = []
    for name in args.only:
        theirs = [published[key].get(PUBLISHED_NAMES.get(name, name), {}).get("score") for key in keys]
        rows.append(
            {
                "score": name,
                "cells": len(keys),
                "ours": float(spearmanr(ours[name], accuracy).statistic),
                "published_scores_same_cells": float("nan")
                if None in theirs
                else float(spearmanr(theirs, accuracy).statistic),
                "literature_all_cells": LITERATURE.get(name, float("nan")),
                "seconds_per_cell": seconds[name] / len(keys),
            }
        )
    print("".join(f"{column:>29}" for column in COLUMNS))
    for row in rows:
        print("".join(f"{v:>29.3f}" if isinstance(v, float) else f"{v:>29}" for v in row.values()))
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"nas-proxies-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


if __name__ == "__main__":
    main()
