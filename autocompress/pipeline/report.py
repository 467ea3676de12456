"""The HTML report of a finished run: one file that opens offline and runs no scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from autocompress.core import Result
from autocompress.core.files import write_atomically
from autocompress.pipeline import charts
from autocompress.pipeline.comparison import (
    budget_rows,
    chain_rows,
    comparison,
    number,
    points,
    prediction_check,
    recovered,
    target_name,
)
from autocompress.pipeline.plots import percent, si
from autocompress.pipeline.run_files import FoundArchitecture, LayerChange, RunFiles

TEMPLATES = Path(__file__).parent / "templates"
_STAGES = {"nas": "Search for the network", "prune": "Search for channels", "quantise": "Search for bits"}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from the files in a run directory.

    ``result.json`` is needed; the sections of ``layers.json``, ``trials.json``, ``training.json`` and
    ``recipe.yaml`` say so where the file is missing.

    Args:
        run_dir: of a finished run.

    Returns:
        Path of the report.

    Raises:
        RunDirectoryError: the run has not finished, a file is damaged, or the report cannot be written.
    """
    files = RunFiles.read(run_dir)
    result, layers = files.result, files.layers
    quantised = bool(result.plan.bits)
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            result=result,
            headline=_headline(result),
            comparison=comparison(result),
            recovered=recovered(result),
            prediction=prediction_check(result),
            budgets=list(budget_rows(result)),
            chain=chain_rows(result),
            chain_metrics=list(result.budgets),
            chain_figure=charts.chain_figure(result),
            refused={stage: found["refused"] for stage, found in result.alone.items() if "refused" in found},
            architecture=_architecture(files.architecture) if files.architecture else None,
            has_layers=layers is not None,
            pruned=bool(result.plan.channels) or not quantised,
            kept=charts.kept_figure(layers) if layers else None,
            macs=charts.macs_figure(layers) if layers else None,
            bits=charts.bits_figure(layers) if layers and quantised else None,
            target=target_name(result),
            locked=_locked(layers or ()),
            stages=_stages(files),
            has_trials=files.searches is not None,
            training=charts.training_figures(files.training) if files.training else None,
            parity=_flat(result.export),
            provenance=_flat(result.provenance),
            recipe=files.recipe,
        )
    )
    return write_atomically(run_dir / "report.html", html.encode())


def environment() -> Environment:
    """What fills in the templates of reports."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "percent": percent, "metric": charts.metric_name}
    return made


def _stages(files: RunFiles) -> list[dict[str, Any]]:
    """Title, figures in words and drawings of every stage that searched."""
    found = []
    for stage in dict.fromkeys([*_STAGES, *files.result.search, *(files.searches or {})]):
        searches = (files.searches or {}).get(stage, {})
        said = files.result.search.get(stage, {})
        if not searches and not said:
            continue
        uniform = (files.uniform or ()) if stage == "quantise" else ()
        found.append(
            {
                "title": _STAGES.get(stage, stage),
                "said": said,
                "curve": charts.search_figure(searches) if searches else None,
                "trade_offs": charts.trade_off_figures(files.result, stage, searches, uniform)
                if searches
                else [],
                "uniform": bool(uniform),
            }
        )
    return found


def _architecture(found: FoundArchitecture) -> dict[str, Any]:
    """What the section on the architecture shows."""
    decisions = [
        (name, found.arch[name], _likeliest(ops, found.probabilities.get(name, ())))
        for name, ops in found.decisions.items()
    ]
    costs = [
        (
            metric,
            *(number(cost[metric]) for cost in (found.smallest, found.cost, found.largest)),
            number(limit),
        )
        for metric, limit in found.budgets.items()
    ]
    return {
        "space": found.space,
        "num_members": math.prod(len(ops) for ops in found.decisions.values()),
        "decisions": decisions,
        "is_likely": bool(found.probabilities),
        "costs": costs,
        "figures": charts.supernet_figures(found),
    }


def _likeliest(operations: Sequence[str], probabilities: Sequence[float]) -> str:
    """The three likeliest operations in words, or all where there are no probabilities."""
    if not probabilities:
        return ", ".join(operations)
    pairs = sorted(zip(probabilities, operations, strict=True), reverse=True)[:3]
    return ", ".join(f"{name} {percent(p, 2)}" for p, name in pairs)


def _headline(result: Result) -> str:
    """One sentence: what was removed, and what it cost."""
    before, after = result.before, result.after
    parts = []
    if before.get("macs") and "macs" in after:
        share = after["macs"] / before["macs"]
        parts.append(f"{percent(share)} of the MACs remain ({si(before['macs'])} → {si(after['macs'])})")
    if "accuracy" in before and "accuracy" in after:
        change = after["accuracy"] - before["accuracy"]
        parts.append(f"test accuracy is {percent(after['accuracy'], 4)} ({points(change)})")
    if before.get("latency_ms") and after.get("latency_ms"):
        factor = before["latency_ms"] / after["latency_ms"]
        parts.append(
            f"one image takes {after['latency_ms']:.3g} ms on this CPU ({factor:.2f} times the speed)"
        )
    first, last = (result.predicted.get(when, {}).get("latency_ms") for when in ("before", "after"))
    if first and last:
        speed = f"({first / last:.2f} times the speed)"
        parts.append(f"{target_name(result)} is predicted to take {last:.3g} ms {speed}")
    return "; ".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Pairs (dotted name, value as text) of nested mappings, sorted by name."""
    pairs: list[tuple[str, str]] = []
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return pairs


def _locked(layers: Sequence[LayerChange]) -> dict[str, list[str]]:
    """Reason -> names of the layers locked for it."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        if layer.locked is not None:
            names.setdefault(layer.locked, []).append(layer.name)
    return names
