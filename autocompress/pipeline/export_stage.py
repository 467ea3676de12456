"""What a run leaves for others: files that agree with PyTorch, their size and speed."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.core import LayerGraph, Plan
from autocompress.core.errors import ExportError, InfeasibleBudgetError
from autocompress.export import (
    CodebookWeight,
    GridWeight,
    check_parity,
    check_quantised_parity,
    count_int8,
    export_onnx,
    export_qcdq,
    export_static_int8,
    measure_latency,
    packed_weights,
    write_bit_json,
    write_packed,
)
from autocompress.hardware_sim.finn_dataflow import FinnDataflow
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.progress import Event
from autocompress.pipeline.stages import Run
from autocompress.training import batches
from autocompress.zoo import named_tensors, save_weights

logger = logging.getLogger(__name__)

OPSET, QUANTISED_OPSET = 18, 21
"""Operator sets where the recipe names none; 21 can hold weights of 4 bits in 4 bits."""
PACKED = "model.packed.safetensors"
"""Weights in as many bits as the plan gives them; all that a run of method kmeans needs to be loaded."""


@dataclass
class Exported:
    """What the stage wrote and measured.

    Args:
        before, after: file_bytes and latency_ms of the files of the original and of the compressed network;
            with ``_float32`` and ``_int8``, those of the same networks in either form.
        parity: agreement of ONNX Runtime with PyTorch, by name.
        files: name -> ``about`` in words, ``bytes``, and what else is known of it.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def export(
    run: Run, candidate: Candidate, compressed: nn.Module, plan: Plan, *, floating: nn.Module
) -> Exported:
    """Write both networks as ONNX, check them against PyTorch, and measure size and latency.

    Args:
        run: the run.
        candidate: the network before.
        compressed: the network after; of Brevitas layers where the plan gives activations bits.
        plan: what was done.
        floating: the compressed network before its layers got bits.

    Raises:
        ExportError: a file disagrees with PyTorch.
    """
    recipe, shape, folder = run.prepared.recipe, run.prepared.data.input_shape, run.directory.path
    done = Exported()
    done.files |= _weight_files(compressed, plan, folder)
    if "export" not in recipe.stages:
        return done
    settings = recipe.export
    images = torch.cat([x for x, _ in islice(batches(run.prepared.data.search, settings.parity_images), 1)])
    paths = {name: folder / f"{name}.onnx" for name in ("original", "model")}
    integers = any(bits.act < 32 for bits in plan.bits.values())
    with run.timed("export"):
        run.on_event(Event("export", 0, 3))
        export_onnx(candidate.model, paths["original"], input_shape=shape, opset=settings.opset or OPSET)
        run.on_event(Event("export", 1, 3))
        write = _write_integers if integers else _write_floats
        done.parity = write(compressed, paths["model"], images, settings.opset)
        run.on_event(Event("export", 2, 3))
        about = {"original": "the network before, for ONNX Runtime", "model": "the network after, likewise"}
        done.files |= {path.name: _entry(path, about[name]) for name, path in paths.items()}
        done.before, done.after = _speeds(
            paths, floating if integers else None, images, settings.latency_runs
        )
        if integers and settings.qonnx:
            done.files |= _hardware_files(candidate, compressed, plan, images, folder)
        if integers:
            path = write_bit_json(compressed, folder / "bits.json", input_shape=shape)
            done.files[path.name] = _entry(path, "bits, scale and range of every tensor")
        run.on_event(Event("export", 3, 3))
    return done


def _speeds(
    paths: dict[str, Path], floating: nn.Module | None, images: Tensor, runs: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and milliseconds of original and compressed network, as they are, in float and in 8 bits.

    Args:
        paths: of the two files.
        floating: the compressed network in float where its file holds integers.
        images: (N, C, H, W), for the ranges of the files in 8 bits.
        runs: timed runs of each file.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {("before", ""): paths["original"], ("after", ""): paths["model"]}
        files["before", "_float32"], files["after", "_float32"] = paths["original"], paths["model"]
        if floating is not None:
            path = Path(folder) / "float32.onnx"
            files["after", "_float32"] = export_onnx(floating, path, input_shape=_shape(images))
            files["after", "_int8"] = paths["model"]
        for when in ("before", "after") if floating is None else ("before",):
            source = files[when, "_float32"]
            try:
                files[when, "_int8"] = export_static_int8(source, Path(folder) / f"{when}.onnx", images)
            except ExportError as fault:
                logger.warning("speed in 8 bits is left out: %s", fault)
        distinct = {str(path): path for path in files.values()}
        latency = measure_latency(distinct, input_shape=_shape(images), runs=runs)
        figures: dict[str, dict[str, float]] = {"before": {}, "after": {}}
        for (when, form), path in files.items():
            figures[when][f"file_bytes{form}"] = float(path.stat().st_size)
            figures[when][f"latency_ms{form}"] = latency[str(path)].median_ms
    return figures["before"], figures["after"]


def _entry(path: Path, about: str, **more: Any) -> dict[str, Any]:
    return {"about": about, "bytes": path.stat().st_size, **more}


def _weight_files(model: nn.Module, plan: Plan, folder: Path) -> dict[str, dict[str, Any]]:
    """The weights for PyTorch, and packed where the plan gives them bits.

    Shared values are written packed only: unpacked they take as much as before.
    """
    files = {}
    weights: dict[str, CodebookWeight | GridWeight] = {**packed_weights(model)}
    shared = {} if weights else _shared_weights(model, plan)
    if not shared:
        path = folder / "model.safetensors"
        save_weights(model, path)
        files[path.name] = _entry(path, "the network after, for PyTorch")
    if weights or shared:
        path = write_packed(folder / PACKED, weights | shared, named_tensors(model))
        files[path.name] = _entry(path, "its weights, packed in the bits of the plan")
    return files


def _shared_weights(model: nn.Module, plan: Plan) -> dict[str, CodebookWeight | GridWeight]:
    """The weights of few values as numbers of a codebook, by layer."""
    modules = dict(model.named_modules())
    shared: dict[str, CodebookWeight | GridWeight] = {}
    for name, bits in plan.bits.items():
        if bits.weight < 32:
            weight = modules[name].weight
            assert isinstance(weight, Tensor)
            values, indices = torch.unique(weight.detach().cpu(), return_inverse=True)
            shared[name] = CodebookWeight(indices, values)
    return shared


def _shape(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _write_floats(model: nn.Module, path: Path, images: Tensor, opset: int | None) -> dict[str, float]:
    export_onnx(model, path, input_shape=_shape(images), opset=opset or OPSET)
    return {name: float(value) for name, value in asdict(check_parity(model, path, images)).items()}


def _write_integers(model: nn.Module, path: Path, images: Tensor, opset: int | None) -> dict[str, float]:
    assert isinstance(model, fx.GraphModule)
    export_qcdq(model, path, input_shape=_shape(images), opset=opset or QUANTISED_OPSET)
    parity = check_quantised_parity(model, path, images)
    on_integers, convolutions = count_int8(path)
    return {name: float(value) for name, value in asdict(parity.as_run).items()} | {
        "max_abs_diff_as_written": parity.as_written.max_abs_diff,
        "top1_agreement_as_written": parity.as_written.top1_agreement,
        "rounded_otherwise": parity.rounded_otherwise,
        "integer_convolutions": float(on_integers),
        "convolutions": float(convolutions),
    }


def _hardware_files(
    candidate: Candidate, model: nn.Module, plan: Plan, images: Tensor, folder: Path
) -> dict[str, dict[str, Any]]:
    """QONNX for FINN and hls4ml and, for a target that is a FINN pipeline, its folding."""
    from autocompress.export.qonnx_file import export_qonnx
    from autocompress.export.qonnx_parity import check_qonnx_parity

    path = export_qonnx(model, folder / "model.qonnx", input_shape=_shape(images))
    parity = check_qonnx_parity(model, path, images)
    files = {path.name: _entry(path, "QONNX, for FINN and hls4ml", parity=asdict(parity))}
    target = candidate.costs.target
    if isinstance(target, FinnDataflow):
        files |= _folding_files(target, plan.apply(candidate.costs.graph), path)
    return files


def _folding_files(target: FinnDataflow, graph: LayerGraph, qonnx: Path) -> dict[str, dict[str, Any]]:
    """FINN's folding of the network; none, with a warning, where no folding fits the device."""
    from autocompress.export.finn_folding_file import StageFold, write_finn_files

    try:
        folding = target.folding(graph)
    except InfeasibleBudgetError as fault:
        logger.warning("no folding for FINN: %s", fault)
        return {}
    costs = folding.costs
    columns = (folding.pe, folding.simd, costs.cycles, costs.luts, costs.brams, costs.dsps)
    folds = {
        layer.name: StageFold(int(pe), int(simd), int(cycles), float(luts), float(brams), float(dsps))
        for layer, pe, simd, cycles, luts, brams, dsps in zip(graph.layers, *columns, strict=True)
    }
    paths = write_finn_files(
        qonnx.parent, qonnx, folds, clock_mhz=target.clock_mhz, multipliers=target.multipliers
    )
    about = (
        "PE and SIMD per layer, for FINN",
        "names of the layers' hardware, for FINN",
        "estimated rate and size",
    )
    return {path.name: _entry(path, text) for path, text in zip(paths, about, strict=True)}
