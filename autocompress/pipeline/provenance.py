"""What a figure depends on besides the recipe."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from autocompress.pipeline.recipe import Recipe

PACKAGES = (
    "autocompress",
    "torch",
    "torchvision",
    "stable-baselines3",
    "gymnasium",
    "onnx",
    "onnxruntime",
    "numpy",
    "scikit-learn",
)


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Versions, seed, recipe digest, git revision, threads and machine."""
    return {
        "recipe": recipe.digest,
        "seed": recipe.seed,
        "device": recipe.device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": _machine(),
        "revision": _revision(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()}, {platform.system()})"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _revision() -> str:
    """Git revision of the package's own checkout, with ``+changes`` when it is not clean."""
    folder = Path(__file__).resolve().parent
    try:
        revision = _git("rev-parse", "--short=12", "HEAD", folder=folder)
        return revision + (
            "+changes" if _git("status", "--porcelain", "--untracked-files=no", folder=folder) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _git(*words: str, folder: Path) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
