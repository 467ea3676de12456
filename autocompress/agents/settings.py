"""What the settings of searches may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autocompress.core.errors import RecipeError

Rule = tuple[str, Any, bool]
"""What must hold in words, the value, and whether it holds."""


def check_settings(search: str, rules: Sequence[Rule]) -> None:
    """Raise if a rule does not hold.

    Raises:
        RecipeError: names every setting that breaks its rule, with its value.
    """
    faults = [f"search {search}: {rule}, got {value!r}" for rule, value, holds in rules if not holds]
    if faults:
        raise RecipeError(faults)


def is_share(value: Any) -> bool:
    """Whether a setting is a number in (0, 1]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 < value <= 1


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a setting is a whole number that is not too small."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def are_counts(values: Any) -> bool:
    """Whether a setting is one or more whole numbers from 1."""
    return isinstance(values, list | tuple) and len(values) > 0 and all(map(is_count, values))
