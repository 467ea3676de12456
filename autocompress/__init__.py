"""Decides, layer by layer, how many channels a network keeps, for a budget."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.core import Bits, Budget, Cost, Knob, LayerGraph, Plan, Problem, Result
    from autocompress.hardware_sim import load_target
    from autocompress.pipeline import Recipe, compress, load_compressed, run_recipe

__version__ = "0.1.0"

_HOMES = {
    "autocompress.core": ("Bits", "Budget", "Cost", "Knob", "LayerGraph", "Plan", "Problem", "Result"),
    "autocompress.hardware_sim": ("load_target",),
    "autocompress.pipeline": ("Recipe", "compress", "load_compressed", "run_recipe"),
}

__all__ = [
    "Bits",
    "Budget",
    "Cost",
    "Knob",
    "LayerGraph",
    "Plan",
    "Problem",
    "Recipe",
    "Result",
    "compress",
    "load_compressed",
    "load_target",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``autocompress --help`` needs no torch."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
