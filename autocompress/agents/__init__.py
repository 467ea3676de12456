"""Searches that decide a problem's knobs one by one, and the baselines they have to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from autocompress.agents.actor_critic import HAQ_SETTINGS, DDPGSearch, SACSearch, TD3Search
from autocompress.agents.allocate import allocate_bits
from autocompress.agents.baselines import Greedy, RandomSearch, Uniform, least_plans
from autocompress.agents.cma_es import CmaEs
from autocompress.agents.evolution import Evolution
from autocompress.agents.milp import MilpSearch
from autocompress.agents.tpe import Tpe
from autocompress.agents.workers import ALONE, Workers, evaluated_by
from autocompress.core import Search
from autocompress.core.errors import RecipeError
from autocompress.core.wording import did_you_mean

__all__ = [
    "ALONE",
    "HAQ_SETTINGS",
    "SEARCHES",
    "CmaEs",
    "DDPGSearch",
    "Evolution",
    "Greedy",
    "MilpSearch",
    "RandomSearch",
    "SACSearch",
    "TD3Search",
    "Tpe",
    "Uniform",
    "Workers",
    "allocate_bits",
    "evaluated_by",
    "least_plans",
    "make_search",
]

SEARCHES: dict[str, type[Any]] = {
    "ddpg": DDPGSearch,
    "td3": TD3Search,
    "sac": SACSearch,
    "random": RandomSearch,
    "uniform": Uniform,
    "greedy": Greedy,
    "milp": MilpSearch,
    "cma_es": CmaEs,
    "tpe": Tpe,
    "evolution": Evolution,
}


def make_search(name: str, settings: Mapping[str, Any]) -> Search:
    """The search of that name with some settings changed from their defaults.

    Args:
        name: a key of :data:`SEARCHES`.
        settings: setting -> value, as read from YAML; lists stand for tuples.

    Raises:
        RecipeError: unknown search or setting, or a value out of range; names every fault.

    Example:
        >>> make_search("ddpg", {"hidden": [32], "sigma": 0.3}).hidden
        (32,)
    """
    if name not in SEARCHES:
        raise RecipeError(f"no search named {name!r}{_instead(name, list(SEARCHES))}")
    kind = SEARCHES[name]
    known = [field.name for field in fields(kind)]
    faults = [
        f"search {name} has no setting {key!r}{_instead(key, known)}" for key in settings if key not in known
    ]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in known}
    try:
        search: Search = kind(**values)
    except RecipeError as fault:
        raise RecipeError([*faults, *fault.faults]) from None
    if faults:
        raise RecipeError(faults)
    return search


def _instead(word: str, known: list[str]) -> str:
    return did_you_mean(word, known) or f"; there are {', '.join(known) or 'none'}"
