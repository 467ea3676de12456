"""How well scores without training rank NAS-Bench-201's cells, beside published scores of the same cells.

Networks have the benchmark's size (16 channels, 5 cells per stage); scores come from one batch of CIFAR-10
training images. Weights are drawn as PyTorch draws them by default, as for the published scores, or, with
``--he``, as the package draws them. For each score: Spearman's rank correlation with the trained validation
accuracy for our scores and for the published ones of the same cells; between our and the published scores;
and what the literature reports over all cells (Abdelfattah et al., arXiv 2101.08134, table 1, CIFAR-10). The
cells are a random sample of the 725 that were published (NAS-Bench-Suite-Zero, arXiv 2210.03230); a
correlation over n cells has a standard error of about 1 / sqrt(n).

Prints one table, and saves it as results/nas-proxies-<machine>-torch<version>.csv. Scores of finished cells
are kept in --out and not computed again.
Run: python benchmarks/nas_proxies.py zc_nasbench201.json cifar10.npz [--cells 150] [--batch 32]
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from autocompress.nas.proxies import PROXIES
from autocompress.nas.spaces import NASBench201

# Operations and edges in the order of the published tuples (NASLib).
OPERATIONS = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
EDGES = ("cell.0_1", "cell.0_2", "cell.0_3", "cell.1_2", "cell.1_3", "cell.2_3")
PUBLISHED_NAMES = {"naswot": "nwot", "jacob_cov": "jacov", "macs": "flops"}
LITERATURE = {
    "synflow": 0.737,
    "jacob_cov": 0.731,
    "snip": 0.596,
    "grad_norm": 0.594,
    "grasp": 0.514,
    "fisher": 0.36,
}
COLUMNS = (
    "score",
    "cells",
    "ours",
    "published_scores_same_cells",
    "ours_with_published_scores",
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


def network_of(key: str, seed: int, *, he: bool) -> nn.Module:
    """A cell's network with fresh weights."""
    network = NASBench201().build(arch_of(key), seed=seed)
    if not he:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in network.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
    return network


def scored(
    network: nn.Module, names: list[str], images: Tensor, labels: Tensor
) -> dict[str, tuple[float, float]]:
    """Every score of a network, and the CPU seconds it took."""
    found = {}
    for name in names:
        start = time.process_time()
        score = PROXIES[name](network, images, labels)
        found[name] = (score, time.process_time() - start)
    return found


def rank_correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """Spearman's, or not a number where a value is missing."""
    return float("nan") if None in a or None in b else float(spearmanr(a, b).statistic)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--cells", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=list(PROXIES))
    parser.add_argument("--he", action="store_true", help="weights after He et al.")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-nas-proxies"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    published = json.loads(args.scores.read_text())["cifar10"]
    keys = [str(k) for k in np.random.default_rng(0).permutation(sorted(published))[: args.cells]]
    accuracy = [published[key]["val_accuracy"] for key in keys]
    images, labels = images_of(args.images, args.batch)
    ours: list[dict[str, tuple[float, float]]] = []
    for number, key in enumerate(keys):
        path = args.out / f"{'he' if args.he else 'default'}-{args.batch}-{number}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        missing = [name for name in args.only if name not in known]
        if missing:
            known |= scored(network_of(key, number, he=args.he), missing, images, labels)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known))
            part.rename(path)
        ours.append(known)
    rows = []
    for name in args.only:
        theirs = [published[key].get(PUBLISHED_NAMES.get(name, name), {}).get("score") for key in keys]
        scores = [cell[name][0] for cell in ours]
        values = (
            *(name, len(keys), rank_correlation(scores, accuracy), rank_correlation(theirs, accuracy)),
            *(rank_correlation(scores, theirs), LITERATURE.get(name, float("nan"))),
            sum(cell[name][1] for cell in ours) / len(keys),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    print("".join(f"{column:>29}" for column in COLUMNS))
    for row in rows:
        print("".join(f"{v:>29.3f}" if isinstance(v, float) else f"{v:>29}" for v in row.values()))
    version = torch.__version__.split("+")[0]
    suffix = "-he" if args.he else ""
    path = Path(__file__).parent / "results" / f"nas-proxies{suffix}-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


if __name__ == "__main__":
    main()
