"""How long ONNX files take on this machine's CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autocompress.core.errors import RecipeError
from autocompress.export.session import open_session, run_session

_WARM_UP_RUNS = 5  # the first runs allocate memory and pack weights


@dataclass(frozen=True)
class Latency:
    """Time of one image in milliseconds: median, 10th and 90th percentile of ``runs`` runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def measure_latency(
    files: Mapping[str, Path], *, input_shape: tuple[int, int, int], runs: int = 50, threads: int = 1
) -> dict[str, Latency]:
    """Time ONNX files at batch 1 in ONNX Runtime on the CPU.

    The files take turns within one loop: a machine's speed drifts, and files measured one after the other
    would each see another machine. One thread has its CPU time: wall time on an idle machine, without the
    waiting, but not without the lost cache, where others are at work. Several threads have wall time.

    Args:
        files: name -> ONNX file.
        input_shape: (C, H, W) of one image.
        runs: timed runs of each file.
        threads: ONNX Runtime's threads within an operator.

    Returns:
        Name -> latency, in the order given.

    Raises:
        RecipeError: no files, or runs or threads below 1.
        ExportError: a file cannot be run on an image of this shape.
    """
    faults = [
        f"{name} must be at least 1, got {n}" for name, n in (("runs", runs), ("threads", threads)) if n < 1
    ]
    if not files:
        faults.append("files must name at least one ONNX file, got none")
    if faults:
        raise RecipeError(faults)
    image = np.random.default_rng(0).standard_normal((1, *input_shape), dtype=np.float32)
    sessions = {name: open_session(path, threads=threads) for name, path in files.items()}
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    milliseconds: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(_WARM_UP_RUNS + runs):
        for name, session in sessions.items():
            start = clock()
            run_session(session, image)
            if turn >= _WARM_UP_RUNS:
                milliseconds[name].append((clock() - start) / 1e6)
    return {name: _summary(times) for name, times in milliseconds.items()}


def _summary(times: list[float]) -> Latency:
    low, median, high = np.percentile(times, (10, 50, 90))
    return Latency(float(median), float(low), float(high), len(times))
