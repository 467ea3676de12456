"""Predictions for this very machine, set right by timing the original network on it.

The profile behind ``this-cpu`` is fitted to many small networks and misses a given one by some percent, or
by more where it is unlike them. What a plan saves is a share of its original, so one factor for the network,
from timing the original, takes most of the error away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autocompress.core import Bits, LayerGraph
from autocompress.export import export_onnx, export_static_int8, measure_latency
from autocompress.hardware_sim import HardwareModel
from autocompress.hardware_sim.measured import Measured
from autocompress.hardware_sim.target_file import MEASURED
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.progress import Event
from autocompress.pipeline.stages import Run
from autocompress.training.batches import spread

ANCHOR = "anchor.json"
NUM_IMAGES = 8
RUNS = 30


def anchored(target: HardwareModel | None) -> bool:
    """Whether a target is the profile of this machine."""
    return isinstance(target, Measured) and target.name == MEASURED


def factors(
    model: nn.Module, graph: LayerGraph, target: Measured, images: Tensor, *, precisions: tuple[int, ...]
) -> dict[int, float]:
    """Measured over predicted latency of a network, by precision.

    Args:
        model: in evaluation mode.
        graph: its graph.
        target: the profile.
        images: (N, C, H, W), for the ranges of the file in 8 bits.
        precisions: 32 for float, 8 for ONNX Runtime's own static quantisation.

    Raises:
        ExportError: the network cannot be exported or quantised.
    """
    _, channels, height, width = images.shape
    shape = channels, height, width
    with tempfile.TemporaryDirectory() as folder:
        files = {32: export_onnx(model, Path(folder) / "float.onnx", input_shape=shape)}
        if 8 in precisions:
            files[8] = export_static_int8(files[32], Path(folder) / "int8.onnx", images)
        taken = measure_latency({str(b): files[b] for b in precisions}, input_shape=shape, runs=RUNS)
    found = {}
    for bits in precisions:
        # At this precision only: a file runs as it is, even where a wider one were faster.
        alone = replace(
            target,
            ns_per={bits: target.ns_per[bits]},
            between_ns_per={bits: target.between_ns_per[bits]},
            held_out_error={bits: target.held_out_error[bits]},
        )
        predicted = alone(graph.with_bits({layer.name: Bits(bits, bits) for layer in graph.layers}))
        found[bits] = taken[str(bits)].median_ms / predicted["latency_ms"]
    return found


def anchor(run: Run) -> None:
    """Give the run's networks prices anchored at their originals, where the target is this machine.

    The factors are measured once and kept in the run's folder, so that a resumed run goes on with them.

    Raises:
        ExportError: a network cannot be exported or quantised.
    """
    prepared = run.prepared
    if prepared.architectures or prepared.joint or not anchored(prepared.candidates[0].costs.target):
        return
    known: Mapping[str, Mapping[str, float]] | None = run.directory.read_json(ANCHOR)
    if known is None:
        run.on_event(Event("time the original", 0, len(prepared.candidates)))
        known = {}
        for number, candidate in enumerate(prepared.candidates, start=1):
            known[candidate.name] = {str(b): f for b, f in _factors_of(run, candidate).items()}
            run.on_event(Event("time the original", number, len(prepared.candidates)))
        run.directory.write_json(ANCHOR, known)
    candidates = tuple(_scaled(c, {int(b): f for b, f in known[c.name].items()}) for c in prepared.candidates)
    run.prepared = replace(prepared, candidates=candidates)


def _factors_of(run: Run, candidate: Candidate) -> dict[int, float]:
    recipe, target = run.prepared.recipe, candidate.costs.target
    assert isinstance(target, Measured)
    integers = "quantise" in recipe.stages or recipe.bits is not None
    images, _ = next(iter(spread(run.prepared.data.search, NUM_IMAGES, limit=NUM_IMAGES)))
    precisions = tuple(bits for bits in ((32, 8) if integers else (32,)) if bits in target.ns_per)
    with torch.no_grad():
        return factors(candidate.model.eval(), candidate.traced.graph, target, images, precisions=precisions)


def _scaled(candidate: Candidate, by: Mapping[int, float]) -> Candidate:
    target = candidate.costs.target
    assert isinstance(target, Measured)
    return replace(candidate, costs=candidate.costs.on(target.scaled(by)))
