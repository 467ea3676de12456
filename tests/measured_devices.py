"""Golden measurements of devices as layers and milliseconds; shared by tests and benchmarks."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from autocompress.core import Bits, LayerSpec

GOLDEN = Path(__file__).resolve().parent / "golden"
FLOAT = Bits()


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of a golden file; comment lines are skipped."""
    with (GOLDEN / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def layer_of(row: dict[str, str], bits: Bits = FLOAT) -> LayerSpec:
    """A square layer from a row with in_channels, out_channels, kernel, stride, groups, in_h, out_h."""
    kernel, stride, groups, in_h, out_h = (
        int(row[k]) for k in ("kernel", "stride", "groups", "in_h", "out_h")
    )
    return LayerSpec(
        row.get("layer", "layer"),
        "linear" if row.get("kind") == "linear" else "conv",
        int(row["in_channels"]),
        int(row["out_channels"]),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        groups=groups,
        in_hw=(in_h, in_h),
        out_hw=(out_h, out_h),
        bits=bits,
    )


def eyeriss(network: str) -> tuple[list[LayerSpec], list[dict[str, str]], int]:
    """Layers at 16 bits, measurements of the whole batch, and the batch size."""
    rows = [row for row in rows_of("eyeriss.csv") if row["network"] == network]
    return [layer_of(row, Bits(16, 16)) for row in rows], rows, int(rows[0]["batch"])


def gpu_networks(bits: Bits = FLOAT) -> dict[str, list[LayerSpec]]:
    """The networks measured on the GPUs at batch 16."""
    networks: dict[str, list[LayerSpec]] = {}
    for row in rows_of("gpu_networks.csv"):
        networks.setdefault(row["network"], []).append(layer_of(row, bits))
    return networks


def gpu_measured(column: str) -> dict[str, float]:
    """Network -> measured figure of the whole batch."""
    return {row["network"]: float(row[column]) for row in rows_of("gpu_batch16.csv")}


def phone_blocks() -> tuple[list[list[LayerSpec]], list[float]]:
    """Layers of each block of the ProxylessNAS phone table, and its measured milliseconds."""
    rows = rows_of("proxylessnas_mobile.csv")
    return [_block(row) for row in rows], [float(row["mean_ms"]) for row in rows]


def _block(row: dict[str, str]) -> list[LayerSpec]:
    source = [int(n) for n in row["input"].split("x")]
    target = [int(n) for n in row["output"].split("x")]
    if row["op"] == "Logits":
        return [LayerSpec("fc", "linear", source[-1], target[-1])]
    size, channels, out_size, out = source[0], source[-1], target[0], target[-1]
    sizes = (size, out_size)
    if row["op"] in {"Conv", "Conv_1"}:
        return [_conv(channels, out, 3 if row["op"] == "Conv" else 1, sizes)]
    wide = channels * int(row["expand"])
    expand = [_conv(channels, wide, 1, (size, size))] if wide != channels else []
    depthwise = replace(_conv(wide, wide, int(row["kernel"]), sizes), groups=wide)
    return [*expand, depthwise, _conv(wide, out, 1, (out_size, out_size))]


def _conv(inputs: int, outputs: int, kernel: int, sizes: tuple[int, int]) -> LayerSpec:
    stride = sizes[0] // sizes[1]
    return LayerSpec(
        "conv",
        "conv",
        inputs,
        outputs,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        in_hw=(sizes[0], sizes[0]),
        out_hw=(sizes[1], sizes[1]),
    )
