"""Does it take my network? Every torchvision classifier, and the segmentation and detection networks.

    python benchmarks/any_network.py                       # all, resumes from the rows already written
    python benchmarks/any_network.py --only 'resnet*'      # some
    python benchmarks/any_network.py --rerun --only vit_b_16

Each network is built without weights and traced at the smallest image it accepts. Then half of the units of
every prunable group goes (``(size + 1) // 2`` stay, drawn at random), and the row says

* what was predicted for the plan and what is counted afresh on the smaller network (MACs and parameters);
* how far the shrunk network is from the masked one, as a share of the largest output;
* how far the ONNX file of the shrunk network, run by ONNX Runtime, is from PyTorch, likewise;
* what stays whole and why.

A network is ``pruned`` when all of that holds, ``refused`` when it was refused with a reason before any work,
and ``FAILED`` otherwise. Segmentation and detection networks are taken without their heads' post-processing:
the maps they return are averaged over positions. Every network has a process, a time limit and a memory limit
of its own.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import multiprocessing
import platform
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from autocompress.core.errors import AutocompressError, ExportError
from autocompress.export import export_onnx
from autocompress.export.session import open_session, run_session
from autocompress.hardware_sim import MacsModel
from autocompress.trace import Trace, measure, shrink, trace
from autocompress.trace.layers import tensors_in
from autocompress.trace.surgery import mask_in_place

COLUMNS = (
    "network", "image", "outcome", "groups", "locked_groups", "channels_before", "channels_after",
    "macs_before", "macs_after", "params_before", "params_after", "predicted_equals_measured",
    "shrunk_vs_masked", "onnx_vs_pytorch", "uncounted", "reason", "locks", "cpu_s", "peak_gb",
)  # fmt: skip
EXACT = 1e-5
"""Largest difference of shrunk and masked, as a share of the largest output."""
ONNX = 1e-4
"""Largest difference of ONNX Runtime and PyTorch, likewise."""


class Maps(nn.Module):
    """A network that returns feature maps, as a classifier: the mean of every channel of every map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels of all maps)."""
        return torch.cat([maps.mean((2, 3)) for maps in tensors_in(self.network(x))], dim=1)


def image_size(name: str) -> int:
    """The smallest image a network takes, or a little more."""
    sizes = {
        "maxvit*": 224,  # its windows of 7 positions must tile every stage
        "inception*": 96,
        "alexnet": 64,
        "vit_h_14": 56,
        "ssd300*": 300,
        "ssd*": 128,
    }
    return next((size for pattern, size in sizes.items() if fnmatch.fnmatch(name, pattern)), 64)


def classifier(name: str) -> nn.Module:
    extra: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):
        extra = {"init_weights": False, "aux_logits": True}
    if name.startswith("vit_"):
        extra = {"image_size": image_size(name)}
    return torchvision.models.get_model(name, weights=None, **extra)


def maps_of(name: str) -> nn.Module:
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return Maps(network if "segmentation" in type(network).__module__ else network.backbone)


def networks() -> dict[str, Callable[[], nn.Module]]:
    """All of them by name."""
    models = torchvision.models
    classifiers = {n: lambda n=n: classifier(n) for n in models.list_models(module=models)}
    dense = [*models.list_models(module=models.segmentation), *models.list_models(module=models.detection)]
    return classifiers | {n: lambda n=n: maps_of(n) for n in dense}


def check(name: str, folder: Path, *, export: bool) -> dict[str, Any]:
    """The row of one network."""
    side = image_size(name)
    torch.manual_seed(0)
    model, shape = networks()[name]().eval(), (3, side, side)
    randomise(model)
    row: dict[str, Any] = {"network": name, "image": side}
    try:
        traced = trace(model, shape)
    except AutocompressError as fault:
        return row | {"outcome": "refused", "reason": str(fault)}
    graph = traced.graph
    free = sum(group.size > 1 for group in graph.prunable)
    locks = Counter(group.locked for group in graph.groups if group.locked)
    row |= {
        "groups": free,
        "locked_groups": sum(locks.values()),
        "channels_before": num_channels(traced),
        "uncounted": "; ".join(graph.uncounted),
        "locks": json.dumps(dict(locks.most_common())),
    }
    if not free:
        return row | {"outcome": "refused", "reason": "nothing can be pruned: " + "; ".join(locks)}
    return row | pruned(model, traced, shape, folder if export else None)


def pruned(model: nn.Module, traced: Trace, shape: tuple[int, ...], folder: Path | None) -> dict[str, Any]:
    """Prune, run, count and export."""
    rng = np.random.default_rng(0)
    kept = {
        group.name: np.sort(rng.choice(group.size, (group.size + 1) // 2, replace=False))
        for group in traced.graph.prunable
    }
    before = MacsModel()(traced.graph)
    plan = traced.graph.with_channels({name: len(units) for name, units in kept.items()})
    predicted = MacsModel()(plan)
    small = shrink(model, traced, kept)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = small(images)
        mask_in_place(model, traced, kept)
        masked = model(images)
    del model
    difference = relative(got, masked)
    measured = measure(small, shape)
    equal = measured == {"macs": predicted["macs"], "params": predicted["params"]}
    row = {
        "channels_after": sum(layer.out_channels for layer in plan.layers),
        "macs_before": int(before["macs"]),
        "macs_after": int(predicted["macs"]),
        "params_before": int(before["params"]),
        "params_after": int(predicted["params"]),
        "predicted_equals_measured": equal,
        "shrunk_vs_masked": f"{difference:.1e}",
    }
    good = equal and difference <= EXACT
    if folder is None:
        return row | {"outcome": "pruned" if good else "FAILED"}
    try:
        path = export_onnx(small, folder / "network.onnx", input_shape=shape)
        session = open_session(path)
        pairs = [(run_session(session, x.numpy()), y) for x, y in ((images, got), (images[:1], got[:1]))]
        agreement = max(relative(torch.from_numpy(a), b) for a, b in pairs)
    except ExportError as fault:
        return row | {"outcome": "FAILED", "reason": f"export: {fault}"}
    row["onnx_vs_pytorch"] = f"{agreement:.1e}"
    return row | {"outcome": "pruned" if good and agreement <= ONNX else "FAILED"}


def randomise(model: nn.Module) -> None:
    """Statistics and scales that matter, as in a trained network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(scale := getattr(module, "layer_scale", None), nn.Parameter):
            nn.init.uniform_(scale, 0.5, 1.5)  # ConvNeXt's starts at 1e-6, which would hide its blocks


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest value; infinite where a value is not finite."""
    if a.shape != b.shape or not bool(torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def num_channels(traced: Trace) -> int:
    return sum(layer.out_channels for layer in traced.graph.layers)


def in_own_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A network must not take others down: a process of its own, limits on time and memory."""
    context = multiprocessing.get_context("fork")
    results, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(name, args, sender))
    child.start()
    sender.close()
    row: dict[str, Any] = {"outcome": "FAILED", "reason": f"not done after {args.limit_s} s"}
    if results.poll(args.limit_s):
        try:
            row = results.recv()
        except EOFError:
            child.join()
            row["reason"] = f"the process ended with exit code {child.exitcode}"
    child.kill()
    child.join()
    return {"network": name} | row


def answer(name: str, args: argparse.Namespace, sender: Any) -> None:
    """What the process of one network does."""
    resource.setrlimit(resource.RLIMIT_AS, (args.limit_gb << 30,) * 2)
    row: dict[str, Any]
    try:
        with tempfile.TemporaryDirectory() as folder:
            row = check(name, Path(folder), export=not args.no_export)
    except Exception as fault:
        traceback.print_exc()
        row = {"outcome": "FAILED", "reason": f"{type(fault).__name__}: {str(fault)[:300]}"}
    row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    row["cpu_s"] = round(time.process_time())
    sender.send(row)


def read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["network"]: row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    order = [name for name in networks() if name in rows]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in order)
    partial.replace(path)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table of docs/networks.md."""
    lines = [
        "| network | image | outcome | groups | MACs after | parameters after "
        "| shrunk = masked | ONNX = PyTorch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        macs, params = (
            f"{int(row[f'{k}_after']) / int(row[f'{k}_before']):.0%}" if row.get(f"{k}_after") else "-"
            for k in ("macs", "params")
        )
        cells = (
            name, row["image"], row["outcome"], row["groups"], macs, params, row["shrunk_vs_masked"],
            row["onnx_vs_pytorch"],
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="shell pattern of network names; several with commas")
    parser.add_argument("--rerun", action="store_true", help="also networks that have a row")
    parser.add_argument("--markdown", action="store_true", help="print the table of the rows there are")
    parser.add_argument("--limit-s", type=int, default=3600, help="seconds per network")
    parser.add_argument("--limit-gb", type=int, default=20, help="address space per network")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--no-export", action="store_true", help="leave ONNX out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    version = torch.__version__.split("+")[0]
    default = Path(__file__).parent / "results" / f"any-network-{platform.machine()}-torch{version}.csv"
    path = args.out or default
    rows = read(path)
    if args.markdown:
        print(markdown(rows))
        return
    patterns = args.only.split(",")
    for name in networks():
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        if wanted and (args.rerun or name not in rows or rows[name]["outcome"] == "FAILED"):
            row = in_own_process(name, args)
            rows = read(path) | {name: row}
            write(path, rows)
            notes = row.get("reason", "")
            print(
                name,
                row["outcome"],
                f"{row.get('groups', '-')} groups",
                f"{row.get('cpu_s', '-')} s",
                notes,
                flush=True,
            )
    outcomes = Counter(row["outcome"] for row in rows.values())
    print(f"{len(rows)} networks of {len(networks())}:", ", ".join(f"{n} {o}" for o, n in outcomes.items()))


if __name__ == "__main__":
    main()
