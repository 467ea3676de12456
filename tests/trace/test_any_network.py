"""Every torchvision network is pruned, with equal outputs in ONNX Runtime, or refused with a reason."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from torchvision import models

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "any_network.py"
LARGE = ("regnet_y_128gf", "vit_h_14")
"""More than 600 million parameters: 10 GB and more at once, so that they are left to the benchmark."""


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("any_network", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = [
    name for kind in (models, models.segmentation, models.detection) for name in models.list_models(kind)
]


def test_the_benchmark_knows_every_network() -> None:
    assert list(benchmark().networks()) == NAMES
    assert len(NAMES) > 90


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_it_is_pruned_or_refused_with_a_reason(name: str) -> None:
    args = argparse.Namespace(limit_s=1800, limit_gb=16, no_export=False)
    row = benchmark().in_own_process(name, args)
    assert row["outcome"] == "pruned" or (row["outcome"] == "refused" and row["reason"]), row
