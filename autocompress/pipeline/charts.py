"""The drawings of the report, from what a run left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from autocompress.core import Metric, Result, SearchResult, Trial
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
from autocompress.pipeline.run_files import FoundArchitecture, LayerChange, Searches, Training, UniformPoint

_METRIC_NAMES: Mapping[str, str] = {"macs": "MACs", "params": "parameters", "bitops": "bit operations"}
_SHARES: tuple[Metric, ...] = ("latency_ms", "energy_mj")


@dataclass(frozen=True)
class Figure:
    """A drawing with its legend: (colour class, mark, name) per entry."""

    svg: Markup
    legend: tuple[tuple[str, str, str], ...] = ()


def metric_name(metric: str) -> str:
    """A metric in a sentence."""
    return _METRIC_NAMES.get(metric, metric)


def kept_figure(layers: Sequence[LayerChange]) -> Figure:
    """Channels kept of every layer."""
    rows = []
    for layer in layers:
        title = f"{layer.name} ({layer.kind}): {layer.out_after} of {layer.out_before} output channels kept"
        title += f"; group {layer.group}" if layer.group else ""
        title += f"; locked: {layer.locked}" if layer.locked else ""
        note = f"{layer.out_after:,} / {layer.out_before:,}"
        rows.append(Row(layer.name, layer.out_before, layer.out_after, note, title, layer.locked is not None))
    legend = (("c0", "bar", "kept"), ("track", "bar", "removed"), ("locked", "bar", "locked, not prunable"))
    return Figure(kept_bars(rows, label="output channels kept (share of the layer's own)"), legend)


def macs_figure(layers: Sequence[LayerChange]) -> Figure:
    """MACs of every layer before and after."""
    rows = []
    for layer in layers:
        note = f"{si(layer.macs_before)} → {si(layer.macs_after)}"
        title = f"{layer.name}: {layer.macs_before:,.0f} → {layer.macs_after:,.0f} MACs, "
        title += f"{layer.params_before:,} → {layer.params_after:,} parameters"
        rows.append(Row(layer.name, layer.macs_before, layer.macs_after, note, title))
    legend = (("before", "bar", "before"), ("c0", "bar", "after"))
    return Figure(paired_bars(rows, label="MACs per image"), legend)


def bits_figure(layers: Sequence[LayerChange]) -> Figure:
    """Bits of every layer's weights and activations, and the layer's share of latency and energy."""
    totals = {metric: sum(layer.cost_after.get(metric, 0.0) for layer in layers) for metric in _SHARES}
    known = {metric: total for metric, total in totals.items() if total > 0}
    rows = []
    for layer in layers:
        weight, act = layer.bits_after
        shares = {metric: layer.cost_after.get(metric, 0.0) / total for metric, total in known.items()}
        title = f"{layer.name} ({layer.kind}): weights {weight} bits, activations {act} bits"
        title += "".join(f"; {percent(share)} of {metric}" for metric, share in shares.items())
        note = " · ".join([f"{weight}/{act}", *(f"{100 * share:.0f} %" for share in shares.values())])
        rows.append(Row(layer.name, weight, act, note, title))
    legend = (("c0", "bar", "weights"), ("c1", "bar", "activations the layer reads"))
    return Figure(paired_bars(rows, label="bits", colours=("c0", "c1")), legend)


def search_figure(searches: Searches) -> Figure:
    """Score of every plan and the best so far of every search."""
    longest = max(trials[-1].index + 1 for trials in searches.values())
    dots, lines, legend = [], [], []
    for number, (name, trials) in enumerate(searches.items()):
        colour = number % NUM_COLOURS
        scores = [(t.index + 1.0, t.score) for t in trials]
        best = tuple(zip((i for i, _ in scores), accumulate((s for _, s in scores), max), strict=True))
        dots.append(Series(name, tuple(scores), colour, "dots", tuple(_title(name, t) for t in trials)))
        lines.append(Series(name, best, colour, "step"))
        if best[-1][0] < longest:  # carried on, so that a short search can be compared at the end
            lines.append(Series(name, (best[-1], (float(longest), best[-1][1])), colour, "dashed"))
        legend.append((f"c{colour}", "line", f"{name} (best {best[-1][1]:.4g} of {len(trials)})"))
    x = Axis.over("plans evaluated", [0, longest], whole=True)
    y = Axis.over("quick score", [t.score for trials in searches.values() for t in trials])
    return Figure(xy_chart([*dots, *lines], x=x, y=y), tuple(legend))


def _title(search: str, trial: Trial) -> str:
    source = f", {trial.source}" if trial.source else ""
    return f"{search}, plan {trial.index + 1}{source}: score {trial.score:.4g}"


def trade_off_figures(
    result: Result, stage: str, searches: Searches, uniform: Sequence[UniformPoint] = ()
) -> list[tuple[Metric, Figure]]:
    """Score against cost of every plan of a stage: by the first budget's metric, and by operations.

    Costs are shares of the original's. Empty where the plans carry no cost that the original is known by.
    """
    limits: Mapping[Metric, float] = result.search.get(stage, {}).get("budgets", {})
    every = [trial for trials in searches.values() for trial in trials]
    counted = {metric: result.before[metric] for metric in ("macs", "params") if metric in result.before}
    originals = counted | result.predicted.get("before", {})
    operations: Metric = "bitops" if uniform else "macs"
    wanted = dict.fromkeys([*list(limits)[:1], operations])
    return [
        (metric, _trade_off(result, searches, uniform, metric, (originals[metric], limits.get(metric))))
        for metric in wanted
        if originals.get(metric) and all(metric in trial.cost.totals for trial in every)
    ]


def _trade_off(
    result: Result,
    searches: Searches,
    uniform: Sequence[UniformPoint],
    metric: Metric,
    scale: tuple[float, float | None],
) -> Figure:
    original, limit = scale
    every = [trial for trials in searches.values() for trial in trials]

    def place(trial: Trial) -> tuple[float, float]:
        return trial.cost[metric] / original, trial.score

    series = [
        Series(name, tuple(map(place, ts)), i % NUM_COLOURS, "dots", tuple(_title(name, t) for t in ts))
        for i, (name, ts) in enumerate(searches.items())
    ]
    if uniform:
        points = tuple((point.cost[metric] / original, point.score) for point in uniform)
        colour = len(searches) % NUM_COLOURS
        titles = tuple(f"{point.bits} bits everywhere: score {point.score:.4g}" for point in uniform)
        series.append(Series("the same bits everywhere", points, colour, "dashed"))
        series.append(Series("", points, colour, "ring", titles))
    front = tuple(map(place, SearchResult(tuple(every)).pareto(metric)))
    series.append(Series("Pareto front", front, NUM_COLOURS - 1, "step"))
    chosen = tuple(place(trial) for trial in every if _chosen(trial, result))[:1]
    series.append(Series("chosen plan", chosen, NUM_COLOURS - 1, "ring", ("chosen plan",) * len(chosen)))
    rule = Rule(limit / original, f"budget {percent(limit / original)}") if limit else None
    places = [point for one in series for point in one.points]
    x = Axis.over(
        f"{metric_name(metric)} (share of the original)",
        [a for a, _ in places] + ([rule.x] if rule else []),
        share=True,
    )
    y = Axis.over("quick score", [b for _, b in places])
    legend = tuple((f"c{one.colour}", one.mark, one.name) for one in series if one.points and one.name)
    return Figure(xy_chart(series, x=x, y=y, rule=rule), legend)


def _chosen(trial: Trial, result: Result) -> bool:
    """Whether a trial's plan is what was done; a plan of channels may have got bits later."""
    same = trial.plan.channels == result.plan.channels
    return same and (not trial.plan.bits or trial.plan.bits == result.plan.bits)


def chain_figure(result: Result) -> Figure | None:
    """Accuracy against the first budget's cost after every stage, and of stages alone."""
    if not result.budgets:
        return None
    metric, limit = next(iter(result.budgets.items()))
    steps = [step for step in result.chain if metric in step]
    alone = {stage: found for stage, found in result.alone.items() if metric in found}
    path = tuple((step[metric] / limit, step["accuracy"]) for step in steps)
    if len(set(path)) < 2:
        return None
    titles = tuple(f"{step['stage']}: test accuracy {percent(step['accuracy'], 4)}" for step in steps)
    series = [Series("stage after stage", path, 0, "line"), Series("", path, 0, "dots", titles)]
    series += [
        Series(f"{stage} alone", ((found[metric] / limit, found["accuracy"]),), colour, "ring")
        for colour, (stage, found) in enumerate(alone.items(), start=1)
    ]
    places = [point for one in series for point in one.points]
    x = Axis.over(f"{metric_name(metric)} (share of the budget)", [1.0, *(a for a, _ in places)], share=True)
    y = Axis.over("test accuracy", [b for _, b in places], share=True)
    legend = tuple((f"c{one.colour}", one.mark, one.name) for one in series if one.name)
    return Figure(xy_chart(series, x=x, y=y, rule=Rule(1.0, "budget")), legend)


def series_figure(results: Sequence[Result], metric: Metric) -> Figure:
    """Test accuracy against what budgets are on, of networks for several limits and of their original."""
    original = results[0].predicted["original"][metric]
    points = tuple((r.predicted["after"][metric] / original, r.after["accuracy"]) for r in results)
    titles = tuple(f"{r.name}: test accuracy {percent(r.after['accuracy'], 4)}" for r in results)
    start = (1.0, results[0].before["accuracy"])
    series = [
        Series("compressed", tuple(sorted(points)), 0, "line"),
        Series("", points, 0, "dots", titles),
        Series("original", (start,), 1, "ring"),
    ]
    x = Axis.over(
        f"{metric_name(metric)} (share of the original)", [0.0, 1.0, *(a for a, _ in points)], share=True
    )
    y = Axis.over("test accuracy", [start[1], *(b for _, b in points)], share=True)
    return Figure(xy_chart(series, x=x, y=y), (("c0", "line", "compressed"), ("c1", "ring", "original")))


def supernet_figures(found: FoundArchitecture) -> tuple[Figure, Figure] | None:
    """Loss of the supernet, and the expected cost over the first budget, by epochs."""
    if not found.epochs:
        return None
    metric, limit = next(iter(found.budgets.items()))
    loss = _curve(found.epochs, "loss", "training loss", 0)
    spent = [{**e, "spent": e["expected_cost"] / limit} for e in found.epochs if e["expected_cost"]]
    cost = _curve(spent, "spent", f"expected {metric_name(metric)}", 1)
    label = f"{metric_name(metric)} (share of the stage's budget)"
    return _epoch_figure([loss], "loss"), _epoch_figure([cost], label, share=True)


def training_figures(training: Training) -> list[tuple[str, Figure, Figure]]:
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


def _epoch_figure(curves: Sequence[Series], label: str, *, share: bool = False) -> Figure:
    points = [point for curve in curves for point in curve.points]
    x = Axis.over("epochs trained", [0, *(a for a, _ in points)], whole=True)
    y = Axis.over(label, [b for _, b in points], share=share)
    legend = tuple((f"c{curve.colour}", curve.mark, curve.name) for curve in curves)
    return Figure(xy_chart(curves, x=x, y=y, size=SMALL), legend)
