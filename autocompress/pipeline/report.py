"""The HTML report of a finished run: one file that opens offline and runs no scripts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autocompress.core import Cost, Metric, Plan, Result, SearchResult, Trial
from autocompress.core.errors import RunDirectoryError
from autocompress.core.files import write_atomically
from autocompress.pipeline.comparison import (
    budget_rows,
    comparison,
    number,
    points,
    prediction_check,
    target_name,
)
from autocompress.pipeline.plots import (
    NUM_COLOURS,
    SMALL,
    Axis,
    Row,
    Rule,
    Series,
    kept_bars,
    paired_bars,
    percent,
    si,
    xy_chart,
)

logger = logging.getLogger(__name__)

_Content = TypeVar("_Content")
_METRIC_NAMES = {"macs": "MACs", "params": "parameters"}
_EPOCH_FIGURES = ("epoch", "loss", "train_accuracy", "search_accuracy")

_Searches = Mapping[str, tuple[Trial, ...]]
_Training = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after, as in ``layers.json``; ``locked`` is the reason or None."""

    name: str
    kind: str
    group: str | None
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    locked: str | None


@dataclass(frozen=True)
class _Figure:
    """A drawing with its legend: (colour class, mark, name) per entry."""

    svg: Markup
    legend: tuple[tuple[str, str, str], ...] = ()


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
    source = run_dir / "result.json"
    if not source.exists():
        raise RunDirectoryError(
            f"{run_dir} holds no result.json: the run has not finished. "
            f"Go on with `autocompress run --resume {run_dir}` and report again."
        )
    result = _read(source, Result.from_json)
    layers = _read_optional(run_dir / "layers.json", _parse_layers)
    searches = _read_optional(run_dir / "trials.json", _parse_trials)
    if searches:  # the run's own search comes first, whatever the order in the file
        searches = dict(sorted(searches.items(), key=lambda item: item[0] != result.search.get("algorithm")))
    training = _read_optional(run_dir / "training.json", _parse_training)
    recipe = _read_optional(run_dir / "recipe.yaml", str)
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            result=result,
            headline=_headline(result),
            comparison=comparison(result),
            prediction=prediction_check(result),
            budgets=list(budget_rows(result)),
            kept=_kept_figure(layers) if layers else None,
            macs=_macs_figure(layers) if layers else None,
            locked=_locked(layers or ()),
            curve=_search_figure(searches) if searches else None,
            trade_off=_trade_off_figure(result, searches) if searches else None,
            training=_training_figures(training) if training else None,
            parity=_flat(result.export),
            provenance=_flat(result.provenance),
            recipe=recipe,
        )
    )
    return write_atomically(run_dir / "report.html", html.encode())


def _environment() -> Environment:
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "metric": _metric_name}
    return environment


# Reading


def _read(path: Path, parse: Callable[[str], _Content]) -> _Content:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
        raise RunDirectoryError(
            f"{path} is damaged ({type(fault).__name__}: {fault}); delete it and finish the run again with "
            f"`autocompress run --resume {path.parent}`"
        ) from fault


def _read_optional(path: Path, parse: Callable[[str], _Content]) -> _Content | None:
    return _read(path, parse) if path.exists() else None


def _parse_layers(text: str) -> tuple[LayerChange, ...]:
    return tuple(LayerChange(**{f.name: layer[f.name] for f in fields(LayerChange)}) for layer in _load(text))


def _parse_trials(text: str) -> dict[str, tuple[Trial, ...]]:
    return {
        name: tuple(
            Trial(
                Plan.from_json(json.dumps(entry["plan"])),
                float(entry["score"]),
                Cost(entry["cost"]),
                int(entry["index"]),
                float(entry["seconds"]),
                str(entry["source"]),
            )
            for entry in entries
        )
        for name, entries in _load(text).items()
        if entries
    }


def _parse_training(text: str) -> dict[str, list[dict[str, float]]]:
    """Stage -> epochs, training before what follows it; stages without epochs are left out."""
    stages = {
        name: [{key: float(epoch[key]) for key in _EPOCH_FIGURES} for epoch in epochs]
        for name, epochs in _load(text).items()
        if epochs
    }
    return dict(sorted(stages.items(), key=lambda item: not item[0].startswith("train")))


def _load(text: str) -> Any:
    """JSON without NaN and infinity, which Python's own reader lets through and no axis can show."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a figure")

    return json.loads(text, parse_constant=refuse)


# Figures in words


def _metric_name(metric: Metric) -> str:
    return _METRIC_NAMES.get(metric, metric)


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


# Figures in drawings


def _kept_figure(layers: Sequence[LayerChange]) -> _Figure:
    rows = []
    for layer in layers:
        title = f"{layer.name} ({layer.kind}): {layer.out_after} of {layer.out_before} output channels kept"
        title += f"; group {layer.group}" if layer.group else ""
        title += f"; locked: {layer.locked}" if layer.locked else ""
        note = f"{layer.out_after:,} / {layer.out_before:,}"
        rows.append(Row(layer.name, layer.out_before, layer.out_after, note, title, layer.locked is not None))
    legend = (("c0", "bar", "kept"), ("track", "bar", "removed"), ("locked", "bar", "locked, not prunable"))
    return _Figure(kept_bars(rows, label="output channels kept (share of the layer's own)"), legend)


def _macs_figure(layers: Sequence[LayerChange]) -> _Figure:
    rows = []
    for layer in layers:
        note = f"{si(layer.macs_before)} → {si(layer.macs_after)}"
        title = f"{layer.name}: {layer.macs_before:,.0f} → {layer.macs_after:,.0f} MACs, "
        title += f"{layer.params_before:,} → {layer.params_after:,} parameters"
        rows.append(Row(layer.name, layer.macs_before, layer.macs_after, note, title))
    return _Figure(
        paired_bars(rows, label="MACs per image"), (("before", "bar", "before"), ("c0", "bar", "after"))
    )


def _title(search: str, trial: Trial) -> str:
    source = f", {trial.source}" if trial.source else ""
    return f"{search}, plan {trial.index + 1}{source}: score {trial.score:.4g}"


def _search_figure(searches: _Searches) -> _Figure:
    """Score of every plan and the best so far of every search."""
    longest = max(trials[-1].index + 1 for trials in searches.values())
    dots, lines, legend = [], [], []
    for index, (name, trials) in enumerate(searches.items()):
        colour = index % NUM_COLOURS
        scores = [(t.index + 1.0, t.score) for t in trials]
        best = tuple(zip((i for i, _ in scores), accumulate((s for _, s in scores), max), strict=True))
        dots.append(Series(name, tuple(scores), colour, "dots", tuple(_title(name, t) for t in trials)))
        lines.append(Series(name, best, colour, "step"))
        if best[-1][0] < longest:  # carried on, so that a short search can be compared at the end
            lines.append(Series(name, (best[-1], (float(longest), best[-1][1])), colour, "dashed"))
        legend.append((f"c{colour}", "line", f"{name} (best {best[-1][1]:.4g} of {len(trials)})"))
    x = Axis.over("plans evaluated", [0, longest], whole=True)
    y = Axis.over("quick score", [t.score for trials in searches.values() for t in trials])
    return _Figure(xy_chart([*dots, *lines], x=x, y=y), tuple(legend))


def _trade_off_figure(result: Result, searches: _Searches) -> tuple[Metric, _Figure] | None:
    """Score against cost of every plan, with the Pareto front; None where the plans share no known cost.

    The cost is on the first budget's metric, as a share of the original's, or else in MACs.
    """
    every = [t for trials in searches.values() for t in trials]
    counted = {m: result.before[m] for m in ("macs", "params") if m in result.before}
    originals = counted | result.predicted.get("before", {})
    wanted = cast(tuple[Metric, ...], (*result.budgets, "macs"))
    known = [m for m in wanted if originals.get(m) and all(m in t.cost.totals for t in every)]
    if not known:
        return None
    metric, original = known[0], originals[known[0]]

    def place(trial: Trial) -> tuple[float, float]:
        return trial.cost[metric] / original, trial.score

    series = [
        Series(name, tuple(map(place, ts)), i % NUM_COLOURS, "dots", tuple(_title(name, t) for t in ts))
        for i, (name, ts) in enumerate(searches.items())
    ]
    front = tuple(map(place, SearchResult(tuple(every)).pareto(metric)))
    series.append(Series("Pareto front", front, NUM_COLOURS - 1, "step"))
    chosen = tuple(place(t) for t in every if t.plan == result.plan)[:1]
    titles = ("chosen plan",) * len(chosen)
    series.append(Series("chosen plan", chosen, NUM_COLOURS - 1, "ring", titles))
    limit = result.budgets.get(metric)
    rule = Rule(limit / original, f"budget {percent(limit / original)}") if limit else None
    shares = [place(t)[0] for t in every] + ([rule.x] if rule else [])
    x = Axis.over(f"{_metric_name(metric)} (share of the original)", shares, share=True)
    y = Axis.over("quick score", [t.score for t in every])
    legend = [(f"c{s.colour}", s.mark, s.name) for s in series if s.points]
    return metric, _Figure(xy_chart(series, x=x, y=y, rule=rule), tuple(legend))


def _training_figures(training: _Training) -> list[tuple[str, _Figure, _Figure]]:
    """Triples (stage, loss, accuracy)."""
    figures = []
    for stage, epochs in training.items():
        loss = [_curve(epochs, "loss", "training loss", 0)]
        accuracies = [
            _curve(epochs, "train_accuracy", "training data", 0),
            _curve(epochs, "search_accuracy", "search split", 1),
        ]
        figures.append(
            (stage, _epoch_figure(loss, "loss"), _epoch_figure(accuracies, "accuracy", share=True))
        )
    return figures


def _curve(epochs: Sequence[Mapping[str, float]], key: str, name: str, colour: int) -> Series:
    # The file counts epochs from 0; an epoch's figures hold at its end.
    return Series(name, tuple((epoch["epoch"] + 1, epoch[key]) for epoch in epochs), colour, "line")


def _epoch_figure(curves: Sequence[Series], label: str, *, share: bool = False) -> _Figure:
    points = [point for curve in curves for point in curve.points]
    x = Axis.over("epochs trained", [0, *(a for a, _ in points)], whole=True)
    y = Axis.over(label, [b for _, b in points], share=share)
    legend = tuple((f"c{curve.colour}", curve.mark, curve.name) for curve in curves)
    return _Figure(xy_chart(curves, x=x, y=y, size=SMALL), legend)
