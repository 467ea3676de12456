"""From a document to a checked recipe: short forms expanded, every fault worded and placed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from autocompress.core.cost import METRICS
from autocompress.core.errors import RecipeError
from autocompress.core.wording import did_you_mean
from autocompress.hardware_sim import MacsModel, load_target
from autocompress.hardware_sim.target_file import TargetError
from autocompress.pipeline.recipe_sections import SECTIONS
from autocompress.pipeline.yaml_marks import Document, Fault, Place
from autocompress.pipeline.yaml_marks import Path as YamlPath

logger = logging.getLogger(__name__)

Checked = TypeVar("Checked", bound=BaseModel)


def checked(
    model: type[Checked], document: Document, overrides: Sequence[str], *, folder: Path = Path()
) -> Checked:
    """A model built from a document with every short form expanded.

    Args:
        model: what to build.
        document: where the data and its places come from; it is changed.
        overrides: ``path.to.key=value``, applied in order.
        folder: where a target file is looked for besides the working directory.

    Raises:
        RecipeError: every fault found while reading, overriding and checking.
    """
    _expand_names(document)
    for override in overrides:
        document.override(override)
    _expand_names(document)
    _expand_budgets(document)
    _check_target(document, folder)
    faults = list(document.faults)
    try:
        recipe = model.model_validate(document.data)
    except ValidationError as invalid:
        found = [_fault(model, error, document) for error in invalid.errors(include_url=False)]
        unread = {fault.mark for fault in document.faults}  # no second fault for a value that was not read
        faults += [fault for fault in found if fault.mark not in unread or not fault.mark.line]
    if faults:
        raise RecipeError([str(fault) for fault in sorted(set(faults))])
    return recipe


def _expand_names(document: Document) -> None:
    """Turn ``data: digits`` into ``data: {name: digits}`` and ``model: vgg16`` into ``model: [vgg16]``."""
    data, places = document.data, document.places
    if isinstance(data.get("data"), str):
        data["data"] = {"name": data["data"]}
        places["data", "name"] = places["data",]
    if isinstance(data.get("model"), str):
        data["model"] = [data["model"]]
        places["model", 0] = places["model",]


def _budget_lists(document: Document) -> Iterator[tuple[YamlPath, dict[str, Any]]]:
    """Where the recipe and its stages keep budgets: the path of each list, and the mapping it is in."""
    yield ("budgets",), document.data
    for stage in ("nas", "prune"):
        if isinstance(document.data.get(stage), dict):
            yield (stage, "budgets"), document.data[stage]


def _expand_budgets(document: Document) -> None:
    """Turn ``budgets: {macs: 0.4}`` into the list form, and FLOPs into MACs."""
    places = document.places
    for path, data in _budget_lists(document):
        short = data.get("budgets")
        if isinstance(short, dict):
            data["budgets"] = []
            for index, (metric, limit) in enumerate(short.items()):
                first, *then = limit if isinstance(limit, list) and limit else [limit]
                share = not _is_number(first) or first <= 1
                data["budgets"].append({"metric": metric, "relative": share, "limit": first})
                place = places[*path, metric]
                places[*path, index] = places[*path, index, "limit"] = place
                if then:
                    data["budgets"][-1]["then"] = then
                    places[*path, index, "then"] = place
                places[*path, index, "metric"] = Place(place.name, place.key, place.key)
        for budget in data["budgets"] if isinstance(data.get("budgets"), list) else []:
            if isinstance(budget, dict) and budget.get("metric") == "flops":
                budget.update(_in_macs(budget))


def _in_macs(budget: Mapping[str, Any]) -> dict[str, Any]:
    limit = budget.get("limit")
    if not _is_number(limit):
        return {"metric": "macs"}
    if budget.get("relative", True):
        logger.warning("budget of %s of the FLOPs: the same share of the MACs (1 MAC = 2 FLOPs)", limit)
        return {"metric": "macs"}
    logger.warning("budget of %s FLOPs: that is %s MACs (1 MAC = 2 FLOPs)", limit, limit / 2)
    then = budget.get("then", ())
    halves = [tighter / 2 if _is_number(tighter) else tighter for tighter in then]
    return {"metric": "macs", "limit": limit / 2} | ({"then": halves} if then else {})


def _check_target(document: Document, folder: Path) -> None:
    """Find the target, and check that every budget is on a metric that it gives or that can be counted."""
    data, places = document.data, document.places
    name, target = data.get("target"), None
    given: tuple[str, ...] = MacsModel.metrics
    if isinstance(name, str) and name:
        data["target"] = name = find_target(name, folder)
        try:
            target = load_target(name)
            given += target.metrics
        except TargetError as wrong:
            place = places["target",]
            document.faults += [Fault(place.value, f"{place.name}: {fault}") for fault in wrong.faults]
            given = METRICS
    who = f"{target.name} gives {', '.join(target.metrics)}" if target else "set target to a machine"
    for path, holder in _budget_lists(document):
        budgets = holder.get("budgets")
        for index, budget in enumerate(budgets if isinstance(budgets, list) else []):
            metric = budget.get("metric") if isinstance(budget, dict) else None
            if metric in METRICS and metric not in given:
                place = places[document.nearest((*path, index, "metric"))]
                text = f"nothing gives {metric}; {who}; {', '.join(MacsModel.metrics)} are counted"
                document.faults.append(Fault(place.value, f"{place.name}: {text}"))


def find_target(name: str, folder: Path) -> str:
    """The absolute path of a target file in the working directory or the folder, else the name as it is."""
    for place in (Path(), folder):
        for file in (place / name, place / f"{name}.yaml"):
            if file.is_file():
                return str(file.resolve())
    return name


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# pydantic's error type -> the rule in our words; the value is added by `_text`.
_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-' (at most 100)",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:.10g}",
}


def _fault(model: type[BaseModel], error: ErrorDetails, document: Document) -> Fault:
    loc = error["loc"]
    written = document.nearest(loc)
    place = document.places[written]
    if error["type"] == "missing":
        name = ".".join([*filter(None, [place.name]), *map(str, loc[len(written) :])])
        return Fault(place.value, f"{name}: required")
    if error["type"] == "extra_forbidden":
        section = ".".join(step for step in loc[:-1] if isinstance(step, str))
        fields = list(SECTIONS.get(section, model).model_fields)
        guess = did_you_mean(loc[-1], fields) or f"; known are {', '.join(fields)}"
        return Fault(place.key, f"{place.name}: unknown key{guess}")
    return Fault(place.value, f"{place.name}: {_text(error)}")


def _text(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    got = repr(error["input"])
    got = got if len(got) <= 60 else got[:57] + "..."
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] == "literal_error":
        known = re.findall(r"[^' ,]+", context["expected"].replace(" or ", ", "))
        return f"must be one of {', '.join(known)}, got {got}{did_you_mean(error['input'], known)}"
    rule = _RULES.get(error["type"], error["msg"]).format(**context)
    return f"{rule}, got {got}"
