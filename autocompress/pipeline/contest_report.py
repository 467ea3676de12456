"""What a contest leaves in its directory: curves with their spread, the standings, and every trial."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from autocompress.core import Metric, SearchResult
from autocompress.pipeline.charts import Figure, metric_name
from autocompress.pipeline.contest_outcome import Attempt, Outcome, as_csv, table
from autocompress.pipeline.plots import NUM_COLOURS, Axis, Rule, Series, percent, xy_chart
from autocompress.pipeline.report import TEMPLATES, environment
from autocompress.pipeline.run_directory import RunDirectory

REPORT, CURVES, TRIALS = "searches.html", "searches.svg", "searches.csv"
Point = tuple[float, float]


def write_contest_report(outcome: Outcome, directory: RunDirectory) -> None:
    """Write ``searches.html``, ``searches.svg`` and ``searches.csv``.

    Raises:
        RunDirectoryError: a file cannot be written.
    """
    curves = curves_figure(outcome)
    headings, rows = table(outcome)
    html = (
        environment()
        .get_template("searches.html.j2")
        .render(
            outcome=outcome,
            headings=headings,
            rows=rows,
            seeds=sorted({attempt.seed for attempt in outcome.attempts}),
            curves=curves,
            fronts=[(budget.metric, _front_figure(outcome, budget.metric)) for budget in outcome.budgets],
        )
    )
    directory.write(TRIALS, as_csv(outcome))
    directory.write(CURVES, standalone(curves))
    directory.write(REPORT, html)


def curves_figure(outcome: Outcome) -> Figure:
    """Best score so far over plans scored: mean over seeds, in the band from the lowest to the highest."""
    bands, lines, legend = [], [], []
    for number, name in enumerate(outcome.searches):
        colour, own = number % NUM_COLOURS, outcome.of(name)
        counts = _counts(own)
        at = [[_best_at(attempt, count) for attempt in own] for count in counts]
        mean = [(float(n), statistics.fmean(scores)) for n, scores in zip(counts, at, strict=True)]
        if len(own) > 1:
            low = [(float(n), min(scores)) for n, scores in zip(counts, at, strict=True)]
            high = [(float(n), max(scores)) for n, scores in zip(counts, at, strict=True)]
            around = (*_stairs(high), *reversed(_stairs(low)))
            bands.append(Series(name, around, colour, "band"))
        lines.append(Series(name, tuple(mean), colour, "step"))
        if counts[-1] < outcome.num_plans:  # carried on, so that a short search can be compared at the end
            end = (mean[-1], (float(outcome.num_plans), mean[-1][1]))
            lines.append(Series(name, end, colour, "dashed"))
        legend.append((f"c{colour}", "line", f"{name} ({mean[-1][1]:.4g})"))
    points = [point for one in (*bands, *lines) for point in one.points]
    x = Axis.over("plans scored", [0, outcome.num_plans], whole=True)
    y = Axis.over("best quick score so far", [b for _, b in points])
    return Figure(xy_chart([*bands, *lines], x=x, y=y), tuple(legend))


def _counts(attempts: Sequence[Attempt]) -> list[int]:
    """Where a curve of all seeds has a point: from the first count at which each has a plan within budget."""
    start = max(attempt.scored_at[0] for attempt in attempts)
    return sorted({start, *(n for attempt in attempts for n in attempt.scored_at if n >= start)})


def _best_at(attempt: Attempt, count: int) -> float:
    return max(best for n, best in attempt.best_so_far() if n <= count)


def _stairs(points: Sequence[Point]) -> list[Point]:
    """The corners of a line that holds each y until the next x."""
    corners = [corner for (_, y0), (x1, y1) in pairwise(points) for corner in ((x1, y0), (x1, y1))]
    return [points[0], *corners]


def _front_figure(outcome: Outcome, metric: Metric) -> Figure:
    """Score against cost, as a share of the limit: what no other plan of the same search beats in both."""
    limit = next(budget.limit for budget in outcome.budgets if budget.metric == metric)
    series = []
    for number, name in enumerate(outcome.searches):
        trials = tuple(trial for attempt in outcome.of(name) for trial in attempt.trials)
        front = tuple((t.cost[metric] / limit, t.score) for t in SearchResult(trials).pareto(metric))
        series.append(Series(name, front, number % NUM_COLOURS, "step"))
    places = [point for one in series for point in one.points]
    x = Axis.over(f"{metric_name(metric)} (share of the limit)", [*(a for a, _ in places), 1.0], share=True)
    y = Axis.over("quick score", [b for _, b in places])
    legend = tuple((f"c{one.colour}", "line", one.name) for one in series)
    return Figure(xy_chart(series, x=x, y=y, rule=Rule(1.0, f"limit {percent(1.0)}")), legend)


def standalone(figure: Figure) -> str:
    """The drawing with its colours and its legend, for a file of its own."""
    style = (Path(TEMPLATES) / "style.css").read_text(encoding="utf-8")
    entry = Markup('<text x="{}" y="{}" class="note {}" style="fill:var(--c)">{}</text>')
    names = [
        entry.format(80 + 210 * (i % 4), 26 + 15 * (i // 4), css, name)
        for i, (css, _, name) in enumerate(figure.legend)
    ]
    head, _, rest = figure.svg.partition(">")
    return f"{head}>\n<style>\n{style}</style>\n{rest.removesuffix('</svg>')}{''.join(names)}\n</svg>\n"
