"""Several limits on one metric: a compressed network for each, from one training and one ledger."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autocompress.agents import ALONE, Workers
from autocompress.core import Metric, Result, Trial
from autocompress.core.errors import InfeasibleBudgetError, RecipeError, RunDirectoryError
from autocompress.pipeline import stages
from autocompress.pipeline.anchor import ANCHOR, anchor
from autocompress.pipeline.charts import series_figure
from autocompress.pipeline.comparison import number
from autocompress.pipeline.plots import percent
from autocompress.pipeline.prepare import Prepared, prepare, prepare_own
from autocompress.pipeline.problems import check_num_plans, problems_of
from autocompress.pipeline.progress import Event, OnEvent, silent
from autocompress.pipeline.recipe import Recipe
from autocompress.pipeline.report import environment
from autocompress.pipeline.run import absolute_paths, check_inputs, recipe_threads, run_stages
from autocompress.pipeline.run_directory import LEDGER, RunDirectory
from autocompress.pipeline.run_files import RunFiles

REPORT = "series.html"


@dataclass(frozen=True)
class SeriesResult:
    """What came of a series.

    Args:
        name: of the recipe.
        metric: what its first budget with several limits is on.
        results: one for each limit, the tightest last; each has a folder of its own in ``folder``.
        folder: of the series.
    """

    name: str
    metric: Metric
    results: tuple[Result, ...]
    folder: Path

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows: the original network, then one for each limit."""
        keys = {"macs": "MACs", "params": "parameters", "file_bytes": "ONNX file (bytes)"}
        keys |= {"latency_ms": "measured latency (ms)"}
        keys = {key: name for key, name in keys.items() if key in self.results[0].after}
        first, metric = self.results[0], str(self.metric)
        shown = {} if metric in ("macs", "params") else {metric: f"{metric} predicted"}
        headings = ["limit", "test accuracy", *shown.values(), *keys.values()]
        rows = [
            ["original", percent(first.before["accuracy"], 4)]
            + [number(first.predicted["original"][key]) for key in shown]
            + [number(first.before[key]) for key in keys]
        ]
        for result in self.results:
            spent = [f"{number(result.predicted['after'][key])}" for key in shown]
            figures = [number(result.after[key]) for key in keys]
            limit = number(result.budgets[metric])
            rows.append([limit, percent(result.after["accuracy"], 4), *spent, *figures])
        return headings, rows


def run_series(
    recipe: Recipe, *, out: Path | None = None, workers: Workers = ALONE, on_event: OnEvent = silent
) -> SeriesResult:
    """Run a recipe whose budgets have several limits.

    The network is trained once. The tightest limit comes first: what its search scored is known to the
    next, which takes the better of both, so that a looser limit never has a plan of a lower quick score.
    Everything that can be checked is checked before the first file is written.

    Args:
        recipe: names its networks and data; see :attr:`Recipe.is_series`.
        out: folder of the series; ``runs/<name>`` with the next free number when absent.
        workers: who scores batches of plans; changes no result.
        on_event: called while it works.

    Raises:
        AutocompressError: any of its kinds.
    """
    if not recipe.is_series:
        raise RecipeError(f"{recipe.name}: no budget has several limits; run it by itself")
    with recipe_threads(recipe):
        recipe = absolute_paths(recipe)
        prepared = _prepare(recipe)
        path = out or RunDirectory.next_free(Path("runs"), recipe.name)
        with RunDirectory.create(path, recipe) as directory:
            return _run(stages.Run(prepared, directory, on_event, workers))


def resume_series(path: Path, *, workers: Workers = ALONE, on_event: OnEvent = silent) -> SeriesResult:
    """Go on with a series that was stopped or killed; it ends as if it had not been.

    Raises:
        RunDirectoryError: not the folder of a series, or in use.
    """
    with RunDirectory.open(path) as directory:
        recipe = directory.recipe
        if not recipe.is_series:
            raise RunDirectoryError(f"{path} is a run with one budget, not a series")
        with recipe_threads(recipe):
            return _run(stages.Run(_prepare(recipe), directory, on_event, workers))


def is_series(path: Path) -> bool:
    """Whether a folder holds a series, finished or not."""
    file = path / "recipe.yaml"
    return file.is_file() and Recipe.load(file).is_series


def _prepare(recipe: Recipe) -> Prepared:
    """The networks and data, once it is sure that every limit can be met."""
    prepared = prepare(recipe)
    faults = []
    for candidate in prepared.candidates:
        for member in recipe.members()[1:]:
            try:
                check_num_plans(member, problems_of(candidate, member))
            except InfeasibleBudgetError as fault:
                faults.append(f"{member.name}: {fault}")
    if faults:
        raise InfeasibleBudgetError("\n".join(faults))
    return prepared


def _run(run: stages.Run) -> SeriesResult:
    check_inputs(run)
    anchor(run)
    recipe = run.prepared.recipe
    candidate = stages.train(run)
    given = recipe.model_copy(update={"stages": tuple(s for s in recipe.stages if s != "train")})
    ledger, earlier = run.directory.path / LEDGER, dict[str, list[Trial]]()
    results: list[Result] = []
    for number_, member in reversed(list(enumerate(given.members()))):

        def on_event(event: Event, label: str = f"{number_ + 1}/{len(given.members())}") -> None:
            run.on_event(Event(f"{label} {event.stage}", event.done, event.total, event.figures))

        path = run.directory.path / member.name
        finished = path / "result.json"
        if not finished.exists():
            prepared = prepare_own(
                {candidate.name: copy.deepcopy(candidate.model)}, run.prepared.data, member
            )
            with RunDirectory.open_or_create(path, member) as directory:
                if (known := run.directory.read_json(ANCHOR)) is not None:
                    directory.write_json(ANCHOR, known)
                run_stages(
                    stages.Run(
                        prepared, directory, on_event, run.workers, ledger=ledger, earlier=_frozen(earlier)
                    )
                )
        files = RunFiles.read(path)
        results.append(replace(files.result, run_dir=path))
        for stage, said in files.result.search.items():
            found = (files.searches or {}).get(stage, {})
            earlier.setdefault(said["problem"], []).extend(t for trials in found.values() for t in trials)
    metric = next(budget.metric for budget in recipe.budgets if budget.then)
    series = SeriesResult(recipe.name, metric, tuple(reversed(results)), run.directory.path)
    _write_report(series, run.directory)
    return series


def _frozen(earlier: Mapping[str, list[Trial]]) -> dict[str, tuple[Trial, ...]]:
    return {digest: tuple(trials) for digest, trials in earlier.items()}


def _write_report(series: SeriesResult, directory: RunDirectory) -> None:
    headings, rows = series.table()
    links = ["", *(f"{result.name}/report.html" for result in series.results)]
    html = (
        environment()
        .get_template("series.html.j2")
        .render(
            series=series,
            headings=headings,
            rows=list(zip(rows, links, strict=True)),
            drawing=series_figure(series.results, series.metric),
        )
    )
    directory.write(REPORT, html)
