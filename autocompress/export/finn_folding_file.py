"""Folding of a FINN pipeline: the files FINN's build takes beside the QONNX file.

FINN (Umuroglu et al., arXiv 1612.07119) names the nodes of its pipeline by operator and number, in the order
of the graph, after every step that matters here (``GiveUniqueNodeNames``). The names below are those after
its default steps ``step_qonnx_to_finn`` to ``step_specialize_layers``, as of FINN 0.10 (Xilinx/finn at
0064bae).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core.errors import ExportError
from autocompress.core.files import write_atomically
from autocompress.export.qonnx_file import PRODUCTS, QUANTISERS, constants, identifier

FOLDING_FILE, STYLE_FILE, ESTIMATE_FILE = "folding.json", "specialize_layers.json", "estimate.json"

_STYLES = {
    "MVAU": "hls",
    "VVAU": "hls",
    "ConvolutionInputGenerator": "rtl",
    "FMPadding": "rtl",
    "DownSampler": "hls",
}
"""Which implementation of a layer is named, where FINN would otherwise choose by bit-width and position."""

_UNITS = ("Conv", "Gemm", "MatMul", "MaxPool", "Relu", "Flatten", "Reshape", *QUANTISERS)
"""Operators that FINN's default steps build."""

_MAX_BITS = 8  # of activations: a threshold per value, and FINN converts no wider ones


@dataclass(frozen=True)
class StageFold:
    """Parallelism of one layer's hardware, and what it is estimated to take.

    Args:
        pe, simd: output and input channels per cycle; they divide the layer's channels.
        cycles: per image.
        luts, brams, dsps: block RAMs of 18 Kbit.
    """

    pe: int
    simd: int
    cycles: int
    luts: float
    brams: float
    dsps: float


def write_finn_files(
    folder: Path, qonnx: Path, folds: Mapping[str, StageFold], *, clock_mhz: float, multipliers: str = "lut"
) -> tuple[Path, Path, Path]:
    """Write what FINN's build needs to fold a network as planned, beside its QONNX file.

    ``folding.json`` is for ``folding_config_file`` and ``specialize_layers.json`` for
    ``specialize_layers_config_file`` of FINN's ``DataflowBuildConfig``; both are needed, because the second
    fixes the names that the first uses. ``estimate.json`` holds cycles, LUTs, block RAMs, DSP slices and the
    rate, in all and by layer, and what of the network FINN's default steps do not build.

    Args:
        folder: of the three files.
        qonnx: written by :func:`~autocompress.export.export_qonnx`.
        folds: layer of the plan -> its folding; every convolution and linear layer of the file.
        clock_mhz: of the pipeline.
        multipliers: ``lut`` or ``dsp``.

    Raises:
        ExportError: layers without a folding, foldings without a layer, or PE or SIMD that do not divide the
            channels, all named.
        RunDirectoryError: a file cannot be written.
    """
    interval = max(fold.cycles for fold in folds.values()) if folds else 0
    folding = finn_folding(qonnx, folds, interval_cycles=interval, multipliers=multipliers)
    styles: dict[str, Any] = {"Defaults": {}}
    for name in folding:
        for kind, style in _STYLES.items():
            if name.startswith(f"{kind}_{style}_"):
                styles[name.replace(f"{kind}_{style}", kind)] = {"preferred_impl_style": style}
    estimate = {
        "clock_mhz": clock_mhz,
        "cycles_per_image": interval,
        "images_per_s": clock_mhz * 1e6 / interval,
        **{name: sum(getattr(fold, name) for fold in folds.values()) for name in ("luts", "brams", "dsps")},
        "not_built_by_default_steps": list(finn_faults(qonnx)),
        "layers": {name: vars(fold) for name, fold in folds.items()},
    }
    contents = {FOLDING_FILE: folding, STYLE_FILE: styles, ESTIMATE_FILE: estimate}
    paths = [
        write_atomically(folder / name, json.dumps(content, indent=1).encode())
        for name, content in contents.items()
    ]
    return paths[0], paths[1], paths[2]


def finn_folding(
    qonnx: Path, folds: Mapping[str, StageFold], *, interval_cycles: int, multipliers: str = "lut"
) -> dict[str, dict[str, Any]]:
    """Content of FINN's ``folding_config_file``: node name -> attributes.

    Args:
        qonnx: the file FINN will be given.
        folds: layer -> its folding.
        interval_cycles: padding units are made wide enough for it.
        multipliers: ``lut`` or ``dsp``.

    Raises:
        ExportError: as for :func:`write_finn_files`.
    """
    stages = _stages(qonnx)
    _check_folds(qonnx, stages, folds)
    by_name = {identifier(layer): fold for layer, fold in folds.items()}
    config: dict[str, dict[str, Any]] = {"Defaults": {}}
    counts: Counter[str] = Counter()

    def add(kind: str, values: dict[str, Any]) -> None:
        unit = f"{kind}_{_STYLES[kind]}"
        config[f"{unit}_{counts[unit]}"] = values
        counts[unit] += 1

    for stage in stages:
        fold = by_name[stage.name]
        lanes = fold.pe if stage.depthwise else fold.simd
        if stage.padded:
            add("FMPadding", {"SIMD": _padding_lanes(stage, lanes, interval_cycles)})
        if stage.window > 1:
            add("ConvolutionInputGenerator", {"SIMD": lanes, "ram_style": "auto"})
        elif stage.strided:
            add("DownSampler", {"SIMD": lanes})
        matrix = {"PE": fold.pe, "SIMD": fold.simd, "ram_style": "auto", "resType": multipliers}
        add("VVAU" if stage.depthwise else "MVAU", matrix)
    return config


def finn_faults(qonnx: Path) -> tuple[str, ...]:
    """What of a QONNX file FINN's default build steps do not turn into hardware, with remedies."""
    import onnx

    graph = onnx.load(qonnx).graph
    values = constants(graph)
    faults = []
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type not in _UNITS:
            faults.append(
                f"{node.name}: {node.op_type} has no unit in the default steps; add one of FINN's own"
            )
        elif node.op_type == "MaxPool" and attributes["kernel_shape"] != attributes.get("strides"):
            faults.append(f"{node.name}: pooling must step by its window; use a stride equal to the kernel")
        elif node.op_type == "Quant" and node.input[0] not in values:
            if np.any(values[node.input[2]]):
                faults.append(f"{node.name}: zero points are refused; quantise with asymmetric=False")
            if values[node.input[3]] > _MAX_BITS:
                faults.append(f"{node.name}: activations have at most {_MAX_BITS} bits; give the layer fewer")
        elif (
            node.op_type == "BipolarQuant"
            and node.input[0] not in values
            and np.any(values[node.input[1]] != 1)
        ):
            faults.append(
                f"{node.name}: binary activations must be -1 and 1; give it 2 bits, or a scale of 1"
            )
        elif node.op_type == "Conv" and attributes.get("group", 1) > 1:
            faults.append(f"{node.name}: depthwise layers need InferVectorVectorActivation among the steps")
    return tuple(faults)


@dataclass(frozen=True)
class _Stage:
    """One layer of the file, as FINN sees it; ``pixels`` counts those of the padded input."""

    name: str
    out_channels: int
    in_group: int
    in_channels: int
    depthwise: bool
    window: int
    strided: bool
    padded: bool
    pixels: int


def _stages(qonnx: Path) -> list[_Stage]:
    import onnx

    graph = onnx.load(qonnx).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    stages = []
    for node in graph.node:
        if node.op_type not in PRODUCTS or node.input[1] not in shapes:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        weight, source = shapes[node.input[1]], shapes[node.input[0]]
        if node.op_type != "Conv":
            out, group = weight if attributes.get("transB") else weight[::-1]
            stages.append(_Stage(node.name, out, group, group, False, 1, False, False, 1))
            continue
        pads = attributes.get("pads", [0, 0, 0, 0])
        stages.append(
            _Stage(
                name=node.name,
                out_channels=weight[0],
                in_group=weight[1],
                in_channels=source[1],
                depthwise=1 < attributes.get("group", 1) == source[1],
                window=math.prod(weight[2:]),
                strided=max(attributes.get("strides", [1])) > 1,
                padded=any(pads),
                pixels=(source[2] + pads[0] + pads[2]) * (source[3] + pads[1] + pads[3]),
            )
        )
    return stages


def _check_folds(qonnx: Path, stages: list[_Stage], folds: Mapping[str, StageFold]) -> None:
    named = {identifier(layer): layer for layer in folds}
    known = {stage.name for stage in stages}
    faults = [f"layer {stage.name!r} has no folding" for stage in stages if stage.name not in named]
    faults += [f"there is no layer {layer!r} to fold" for name, layer in named.items() if name not in known]
    for stage in stages:
        fold = folds.get(named.get(stage.name, ""))
        if fold is None:
            continue
        for what, lanes, channels in (
            ("PE", fold.pe, stage.out_channels),
            ("SIMD", fold.simd, stage.in_group),
        ):
            if lanes < 1 or channels % lanes:
                faults.append(f"layer {stage.name!r}: {what} must divide {channels} channels, got {lanes}")
    if faults:
        raise ExportError("\n".join(f"{qonnx}: {fault}" for fault in faults))


def _padding_lanes(stage: _Stage, least: int, interval_cycles: int) -> int:
    """Channels per cycle of a padding unit: at least its reader's, and enough for the interval."""
    channels = stage.in_channels
    fitting = [
        lanes
        for lanes in range(least, channels + 1)
        if channels % lanes == 0 and stage.pixels * channels // lanes <= interval_cycles
    ]
    return fitting[0] if fitting else channels
