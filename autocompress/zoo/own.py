"""Things a user wrote, named ``pkg.mod:thing``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from autocompress.core.errors import AutocompressError, RecipeError


def import_object(name: str) -> Any:
    """The object that ``pkg.mod:thing`` names.

    Raises:
        RecipeError: the module cannot be imported or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise RecipeError(f"{name!r} must have the form pkg.mod:thing")
    try:
        module = importlib.import_module(module_name)
    except Exception as fault:  # the user's module may raise anything while it is imported
        raise RecipeError(
            f"cannot import {module_name!r} for {name!r}: {type(fault).__name__}: {fault}; "
            "install it or put its folder on PYTHONPATH"
        ) from fault
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise RecipeError(f"module {module_name!r} has no {attribute!r}, named by {name!r}") from None


def call_factory(name: str, **offered: Any) -> Any:
    """Calls the factory that ``pkg.mod:factory`` names with those of the arguments that it accepts.

    Raises:
        RecipeError: it cannot be imported, is not callable, needs other arguments, or fails.
    """
    factory = import_object(name)
    if not callable(factory):
        raise RecipeError(f"{name!r} must be callable, got {type(factory).__name__}")
    try:
        return factory(**_accepted(factory, offered))
    except AutocompressError:
        raise
    except Exception as fault:  # whatever the user's code raises is reported with its name
        raise RecipeError(f"{name!r} failed: {type(fault).__name__}: {fault}") from fault


def _accepted(factory: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return offered
    named = {n for n, p in parameters.items() if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {key: value for key, value in offered.items() if key in named}
