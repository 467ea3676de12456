"""Plans per second of the quick score beside an evaluation as in AMC's reference, and how alike they rank.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_speed.py --data data --weights weights --plans 60

Both score the same random plans at about half of the multiply-accumulates, plan by plan in turns, on one
thread; the figures are CPU seconds.

* ``reference``: the network of full size with the removed channels at zero; every layer that lost inputs is
  fitted by scikit-learn's ``LinearRegression`` without intercept, from the inputs and outputs that the
  original network has at random positions of calibration images, stored once; then the accuracy on the
  whole search split of 5,000 images, in batches of 50. Written from the description in AMC (He et al., ECCV
  2018, section 3.3) and the defaults of its code. Differs from that code in --rows samples per layer (there
  30,000, which take much longer), in 3x3 layers being fitted too (there 1x1 and linear ones only), and in
  which channels stay: those that the quick score keeps, so that two scores of one thing are compared.
* ``quick``: :class:`autocompress.pipeline.quick_score.QuickScore` with ``score_images`` of --score-images
  and ``mixed_precision``.

What is done once is not counted, on either side. Networks without a file in --weights are trained first, for
--epochs on 20,000 images: about 2 CPU minutes an epoch for MobileNet, 3 for VGG-16. A reference evaluation of
VGG-16 is the dearest part: `--plans 60 20` gives it fewer plans. Prints a row per network and writes
results/evaluation-speed-<machine>-torch<version>.csv, with the figures of every plan beside it.
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from autocompress.agents import make_search
from autocompress.core import Plan
from autocompress.pipeline import Recipe
from autocompress.pipeline.costs import Costs
from autocompress.pipeline.problems import Candidate, channel_problem_of
from autocompress.pipeline.quick_score import QuickScore, calibration_batches
from autocompress.prune import keep_best, unit_scores
from autocompress.trace import Trace, mask, trace
from autocompress.trace.surgery import positions_removed
from autocompress.training import Data, TrainSettings, evaluate, fit, load_data
from autocompress.zoo import build, load_weights, save_weights

NETWORKS = ("mobilenet_v1", "vgg16")
POINTS = 10
"""Positions per image and layer, as in AMC's code."""
REFERENCE_BATCH = 50
COLUMNS = (
    "network", "plans", "macs_share", "reference_s", "fit_s", "quick_s", "build_s", "ratio", "spearman",
    "spearman_low", "spearman_high", "memory_mb",
)  # fmt: skip


class Reference:
    """Scores plans as AMC's reference does; see the top of the file.

    Args:
        model: the trained network; not changed.
        traced: its trace.
        data: calibration images come from ``data.train``, the score from ``data.search``.
        rows: samples per layer, about.
    """

    def __init__(self, model: nn.Module, traced: Trace, data: Data, *, rows: int) -> None:
        self._model, self._traced, self._data = model, traced, data
        self._scores = unit_scores(model, traced)
        self._samples: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._rng = np.random.default_rng(0)
        self.fit_seconds = 0.0
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1:
                self._samples[name] = ([], [])
                handles.append(module.register_forward_hook(self._hook(name)))
        with torch.inference_mode():
            for images, _ in calibration_batches(data, max(rows // POINTS, 1), seed=0):
                model.eval()(images)
        for handle in handles:
            handle.remove()
        self._joined = {
            n: (torch.cat(x).numpy(), torch.cat(y).numpy()) for n, (x, y) in self._samples.items()
        }

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            x, inputs, outputs = args[0], *self._samples[name]
            if isinstance(module, nn.Linear):
                inputs.append(x.clone())
                outputs.append(output - module.bias)
                return
            assert isinstance(module, nn.Conv2d)
            columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
            num = columns.shape[-1]
            spots = torch.from_numpy(self._rng.choice(num, min(POINTS, num), replace=False))
            inputs.append(columns[:, :, spots].transpose(1, 2).flatten(0, 1))
            outputs.append(output.flatten(2)[:, :, spots].transpose(1, 2).flatten(0, 1))

        return hook

    def __call__(self, plan: Plan) -> float:
        """Accuracy in [0, 1] on the whole search split."""
        kept = keep_best(self._scores, plan.channels)
        masked = mask(self._model, self._traced, kept)
        start = time.process_time()
        removed = positions_removed(self._traced, kept)
        for name, (inputs, outputs) in self._joined.items():
            gone = removed.get((name, "in"))
            if gone is None or not gone.any():
                continue
            there = np.flatnonzero(~gone)
            out = np.flatnonzero(~removed[name, "out"]) if (name, "out") in removed else slice(None)
            per_channel = inputs.shape[1] // len(gone)
            columns = np.flatnonzero(np.repeat(~gone, per_channel))
            fitted = LinearRegression(fit_intercept=False).fit(inputs[:, columns], outputs[:, out]).coef_
            weight = masked.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            with torch.no_grad():
                rows = torch.arange(len(weight))[out]
                body = torch.from_numpy(fitted).float().reshape(len(rows), len(there), *weight.shape[2:])
                weight[rows[:, None], torch.from_numpy(there)] = body
        self.fit_seconds += time.process_time() - start
        return evaluate(masked, self._data.search, batch_size=REFERENCE_BATCH).accuracy


def trained(name: str, data: Data, folder: Path, *, epochs: int) -> nn.Module:
    """The network with weights from the folder, or trained briefly and stored there."""
    path = folder / f"{name}.safetensors"
    torch.manual_seed(0)
    model = build(name, num_classes=10)
    if path.exists():
        load_weights(model, path)
        return model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    settings = TrainSettings(epochs=epochs, batch_size=64, lr=0.05, mixed_precision=name == "vgg16")
    fit(model, data, settings, seed=0, checkpoint=folder / f"{name}.checkpoint", on_epoch=print)
    save_weights(model, path)
    return model.eval()


def half_plans(
    name: str, model: nn.Module, data: Data, num: int
) -> tuple[Recipe, Trace, list[tuple[Plan, float]]]:
    """Random plans that spend a budget of half the multiply-accumulates, with their share of them."""
    recipe = Recipe.from_mapping({"model": name, "data": "cifar10", "budgets": {"macs": 0.5}})
    traced = trace(model, data.input_shape)
    candidate = Candidate(name, model, traced, Costs.of(recipe, traced.graph))
    problem = replace(channel_problem_of(candidate, recipe), evaluate=lambda plan: 0.0)
    trials = make_search("random", {})(problem, num_plans=num, seed=1).trials
    whole = candidate.costs(Plan())["macs"]
    return recipe, traced, [(trial.plan, trial.cost["macs"] / whole) for trial in trials]


def compared(
    args: argparse.Namespace, name: str, data: Data, num: int
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The summary of one network and a row per plan."""
    model = trained(name, data, args.weights, epochs=args.epochs)
    recipe, traced, plans = half_plans(name, model, data, num)
    settings = recipe.prune.model_copy(update={"score_images": args.score_images, "mixed_precision": True})
    quick = QuickScore(model, traced, data, settings=settings, seed=0)
    reference = Reference(model, traced, data, rows=args.rows)
    quick(plans[0][0])  # the first call compiles kernels
    rows: list[dict[str, object]] = []
    for plan, share in plans:
        build_s, _ = seconds(partial(quick.build, plan))
        quick_s, quick_score = seconds(partial(quick, plan))
        before = reference.fit_seconds
        reference_s, reference_score = seconds(partial(reference, plan))
        rows.append(
            {
                "network": name, "plan": plan.digest, "macs_share": share, "reference": reference_score,
                "quick": quick_score, "reference_s": reference_s, "fit_s": reference.fit_seconds - before,
                "quick_s": quick_s, "build_s": build_s,
            }
        )  # fmt: skip
        if args.verbose:
            print(*(f"{v:.4f}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    return summary(name, rows), rows


def seconds(call: Callable[[], float | nn.Module]) -> tuple[float, float | nn.Module]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def summary(name: str, rows: Sequence[dict[str, object]]) -> dict[str, object]:
    figures = {
        key: np.array([row[key] for row in rows], dtype=float)
        for key in rows[0]
        if key not in ("network", "plan")
    }
    low, high = interval(figures["quick"], figures["reference"])
    return {
        "network": name,
        "plans": len(rows),
        "macs_share": round(figures["macs_share"].mean(), 3),
        **{key: round(figures[key].mean(), 3) for key in ("reference_s", "fit_s", "quick_s", "build_s")},
        "ratio": round(figures["reference_s"].sum() / figures["quick_s"].sum(), 1),
        "spearman": round(spearmanr(figures["quick"], figures["reference"]).statistic, 3),
        "spearman_low": round(low, 3),
        "spearman_high": round(high, 3),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """95 % of the Spearman correlations of plans drawn anew."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(one), size=len(one)) for _ in range(1000)]
    low, high = np.nanpercentile([spearmanr(one[d], other[d]).statistic for d in drawn], [2.5, 97.5])
    return float(low), float(high)


def write(name: str, rows: Sequence[dict[str, object]]) -> None:
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"{name}-{platform.machine()}-torch{version}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="folder of NAME.safetensors")
    parser.add_argument("--plans", type=int, nargs="+", default=[60], help="of all, or of each network")
    parser.add_argument("--score-images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8, help="of training, where weights are missing")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("cifar10", root=args.data, search_size=5000, train_size=20_000, seed=0)
    summaries, every = [], []
    print(*COLUMNS, sep="\t", flush=True)
    for name, num in zip(
        args.networks, args.plans * (len(args.networks) if len(args.plans) == 1 else 1), strict=True
    ):
        one, rows = compared(args, name, data, num)
        summaries.append(one)
        every += rows
        print(*one.values(), sep="\t", flush=True)
    write("evaluation-speed", summaries)
    write("evaluation-speed-plans", every)


if __name__ == "__main__":
    main()
