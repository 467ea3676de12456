"""The command line; the only module that prints."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from autocompress.core.errors import AutocompressError

if TYPE_CHECKING:
    from autocompress.core import Metric, Problem, Result
    from autocompress.pipeline import (
        Architectures,
        Candidate,
        Event,
        Fidelity,
        Outcome,
        Prepared,
        SeriesResult,
    )

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Decides, layer by layer, how many channels and bits a network keeps, for a budget.",
)
PIPE_WIDTH = 160
"""Columns where output goes to a file or pipe, which have no width of their own."""
out = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True)

INTERRUPTED = 130
FAULT = 2

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe file, or the name of a bundled one.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe; may be repeated."),
]

WorkersOption = Annotated[
    int | None,
    typer.Option(
        help="Processes that score plans, where a search asks for several at once; no result changes."
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Score plans on a Ray cluster: auto, local or HOST:PORT."),
]


class Listing(StrEnum):
    """What ``autocompress list`` can list."""

    MODELS = "models"
    TARGETS = "targets"
    SEARCHES = "searches"
    RECIPES = "recipes"
    DATA = "data"


class Format(StrEnum):
    """How ``autocompress price`` writes its figures."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"


@app.command(
    epilog="Examples: [bold]autocompress run recipes/digits.yaml[/] · "
    "[bold]autocompress run digits --set search.num_plans=50 --set seed=1[/] · "
    "[bold]autocompress run my.yaml --set 'budgets={macs: [0.75, 0.5, 0.25]}'[/] · "
    "[bold]autocompress run --resume runs/digits[/]"
)
def run(  # noqa: PLR0917
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe file, or the name of a bundled one.")
    ] = None,
    overrides: SetOption = None,
    workers: WorkersOption = None,
    ray_address: RayOption = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder of the run [runs/NAME].")] = None,
) -> None:
    """Run a recipe: find a network, train, prune, fine-tune, quantise, export, report.

    A budget with several limits makes one compressed network for each, from one training.
    """
    from autocompress import pipeline
    from autocompress.agents import Workers

    crew = Workers(workers, ray_address)
    with _progress() as on_event:
        result: Result | SeriesResult
        if resume is not None:
            if recipe is not None or overrides or out_dir is not None:
                raise typer.BadParameter("--resume takes its recipe from the run; give nothing else with it")
            go_on = pipeline.resume_series if pipeline.is_series(resume) else pipeline.resume
            result = go_on(resume, workers=crew, on_event=on_event)
        elif recipe is None:
            raise typer.BadParameter("name a recipe, or a run to --resume")
        else:
            loaded = pipeline.Recipe.load(recipe, overrides or ())
            start = pipeline.run_series if loaded.is_series else pipeline.run_recipe
            result = start(loaded, out=out_dir, workers=crew, on_event=on_event)
    if isinstance(result, pipeline.SeriesResult):
        _show_series(result)
    else:
        _show_result(result)


@app.command(
    epilog="Examples: [bold]autocompress check digits[/] · "
    "[bold]autocompress check my.yaml --set 'budgets={macs: 0.3}'[/]"
)
def check(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Say what can be decided, what is locked and why, what is reachable, and how long a run takes."""
    from autocompress import pipeline

    loaded = pipeline.Recipe.load(recipe, overrides or ())
    with pipeline.recipe_threads(loaded):
        prepared = pipeline.prepare(loaded)
        if prepared.architectures:
            _show_architectures(prepared.architectures)
        if prepared.joint:
            _show_joint(prepared)
        for candidate in prepared.candidates:
            _show_candidate(prepared, candidate)


@app.command(
    epilog="Examples: [bold]autocompress search digits --stage prune --searches cma_es,ddpg --plans 60[/] · "
    "[bold]autocompress search resnet20_cifar10_50 --seeds 5 --workers 4[/] "
    "· [bold]autocompress search --resume runs/digits-prune-searches[/]"
)
def search(  # noqa: PLR0917
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe file, or the name of a bundled one.")
    ] = None,
    searches: Annotated[
        str, typer.Option(metavar="S1,S2", help="Who takes part [the recipe's own and its baselines].")
    ] = "",
    stage: Annotated[str | None, typer.Option(help="prune or quantise, where the recipe has both.")] = None,
    seeds: Annotated[int, typer.Option(help="Each search runs with so many seeds.")] = 3,
    plans: Annotated[
        int | None, typer.Option(help="Plans of each search and seed [as in the recipe].")
    ] = None,
    overrides: SetOption = None,
    workers: WorkersOption = None,
    ray_address: RayOption = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the comparison in this folder.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder [runs/NAME-STAGE-searches].")] = None,
) -> None:
    """Compare searches on one problem with equal numbers of plans; says who wins, and by how much."""
    from autocompress import pipeline
    from autocompress.agents import Workers

    crew = Workers(workers, ray_address)
    with _progress() as on_event:
        if resume is not None:
            if recipe is not None or overrides or out_dir is not None or searches or stage or plans:
                raise typer.BadParameter(
                    "--resume takes all but workers from the comparison; give nothing else with it"
                )
            outcome = pipeline.resume_contest(resume, workers=crew, on_event=on_event)
        elif recipe is None:
            raise typer.BadParameter("name a recipe, or a comparison to --resume")
        else:
            loaded = pipeline.Recipe.load(recipe, overrides or ())
            names = [name.strip() for name in searches.split(",") if name.strip()]
            contest = pipeline.contest_of(
                loaded, searches=names, stage=stage, num_seeds=seeds, num_plans=plans
            )
            outcome = pipeline.run_contest(loaded, contest, out=out_dir, workers=crew, on_event=on_event)
    _show_contest(outcome)


@app.command(
    epilog="Examples: [bold]autocompress fidelity runs/digits[/] · "
    "[bold]autocompress fidelity runs/resnet20-cifar10-50 --plans 8 --epochs 2[/]"
)
def fidelity(
    run_dir: Annotated[
        Path, typer.Argument(help="Folder of a run, or of a comparison of searches.", metavar="RUN")
    ],
    plans: Annotated[int, typer.Option(help="Plans to fine-tune, evenly over the quick score's ranks.")] = 12,
    epochs: Annotated[int | None, typer.Option(help="Of fine-tuning [as in the recipe].")] = None,
) -> None:
    """Fine-tune some of a run's plans and say how well the quick score ranked them; repeat it to go on."""
    from autocompress.pipeline import measure_fidelity

    with _progress() as on_event:
        measured = measure_fidelity(run_dir, num_plans=plans, epochs=epochs, on_event=on_event)
    _show_fidelity(measured)


@app.command(epilog="Example: [bold]autocompress report runs/digits[/]")
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Write report.html again from the files of a run."""
    from autocompress.pipeline import write_report

    out.print(f"wrote {escape(str(write_report(run_dir)))}", soft_wrap=True)


@app.command(
    epilog="Examples: [bold]autocompress price torchvision:resnet18 --target systolic-16x16 --bits 8[/] · "
    "[bold]autocompress price resnet20 --input 3,32,32 --target bitfusion --compare eyeriss --bits 4,8[/]"
)
def price(  # noqa: PLR0917
    model: Annotated[str, typer.Argument(help="A network by name: zoo, torchvision:NAME, pkg.mod:factory.")],
    target: Annotated[str | None, typer.Option(help="A bundled target, a target file, or macs.")] = None,
    compare: Annotated[str, typer.Option(metavar="T1,T2", help="More targets, side by side.")] = "",
    bits: Annotated[
        str | None, typer.Option(help="Of every layer: 8, or 4,8 (weights, activations).")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="JSON of a plan, or of a run's result.")] = None,
    batch: Annotated[int, typer.Option(help="Samples at once; figures are per sample.")] = 1,
    input_: Annotated[
        str, typer.Option("--input", metavar="C,H,W", help="Shape of one image.")
    ] = "3,224,224",
    classes: Annotated[int, typer.Option(help="Outputs of the network.")] = 1000,
    format_: Annotated[Format, typer.Option("--format", help="How to write the figures.")] = Format.TEXT,
    plot: Annotated[Path | None, typer.Option(help="Also draw latency per layer into this SVG file.")] = None,
) -> None:
    """Say what a network costs on a machine, layer by layer."""
    from autocompress.pipeline import price as pricing

    graph = pricing.traced_graph(model, input_shape=pricing.parse_shape(input_), num_classes=classes)
    graph = pricing.changed_graph(graph, bits=bits, plan=plan)
    targets = [name.strip() for name in (target or "", *compare.split(",")) if name.strip()]
    priced = pricing.price(graph, targets, batch=batch)
    if plot is not None:
        pricing.write_chart(priced, plot)
    if format_ is not Format.TEXT:
        print((pricing.as_csv if format_ is Format.CSV else pricing.as_json)(priced))
        return
    for one in priced:
        _show_rows(f"{model} on {one.model.name}, batch {batch}, per sample", *pricing.table_of(one))
    _show_rows("totals", *pricing.totals_of(priced))
    for note in (note for one in priced for note in one.notes):
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for note in graph.uncounted:
        out.print(f"[yellow]not counted:[/] {escape(note)}")


@app.command(
    epilog="Examples: [bold]autocompress profile[/] · "
    "[bold]autocompress profile --target my-phone --csv measurements.csv[/]"
)
def profile(
    target: Annotated[str, typer.Option(help="Name of the target to make.")] = "this-cpu",
    out_file: Annotated[Path | None, typer.Option("--out", help="Target file [TARGET.yaml].")] = None,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime within a layer.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer networks and runs, larger errors.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Fit these measurements of a device elsewhere.")] = None,
) -> None:
    """Measure this machine, or read measurements of another, and write a target file that predicts it."""
    from autocompress.pipeline import profile as profiling

    path = out_file or profiling.default_path(target)
    if csv is None:
        with _progress() as on_event:
            fitted = profiling.profile_machine(target, path, threads=threads, quick=quick, on_event=on_event)
    else:
        fitted = profiling.profile_measurements(target, path, csv)
    out.print(escape(fitted.about), soft_wrap=True)
    for bits, error in fitted.model.held_out_error.items():
        out.print(
            f"{bits} bits: median error {error['layer']:.1%} per layer, {error['network']:.1%} per network, "
            "on networks left out of the fit one by one",
            soft_wrap=True,
        )
    out.print(f"wrote {escape(str(path))}; use it with --target {escape(str(path))}", soft_wrap=True)


@app.command("list", epilog="Example: [bold]autocompress list models[/]")
def list_(what: Annotated[Listing, typer.Argument(help="What to list.")]) -> None:
    """List networks, targets, searches, recipes or data sets by name."""
    for line in _LISTINGS[what]():
        out.print(escape(line), soft_wrap=True, highlight=False)


def _models() -> Iterator[str]:
    from autocompress.zoo import MODELS

    yield from sorted(MODELS)
    yield "torchvision:NAME (any torchvision classification network)"
    yield "package.module:factory (your own)"


def _targets() -> Iterator[str]:
    from autocompress.hardware_sim import MacsModel
    from autocompress.hardware_sim.target_file import bundled_targets, load_target

    yield f"{MacsModel.name}: counts {', '.join(MacsModel.metrics)}; recipes need not name it"
    for path in bundled_targets():
        yield f"{path.stem}: {load_target(path).kind}"


def _searches() -> Iterator[str]:
    from autocompress.agents import SEARCHES

    for name, kind in SEARCHES.items():
        yield f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}"


def _recipes() -> Iterator[str]:
    from autocompress.pipeline import bundled_recipes

    for path in bundled_recipes():
        yield f"{path.stem}: {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}"


def _data() -> Iterator[str]:
    from autocompress.training import DATASETS

    yield from sorted(DATASETS)
    yield "package.module:factory (your own)"


_LISTINGS: dict[Listing, Callable[[], Iterator[str]]] = {
    Listing.MODELS: _models,
    Listing.TARGETS: _targets,
    Listing.SEARCHES: _searches,
    Listing.RECIPES: _recipes,
    Listing.DATA: _data,
}


@contextmanager
def _progress() -> Iterator[Callable[[Event], None]]:
    """A live display: one line per stage with a bar, figures and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=18),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(compact=True),
    )
    with Progress(*columns, console=err, refresh_per_second=4) as progress:
        tasks: dict[str, Any] = {}

        def on_event(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(event.stage, total=event.total, figures="")
            shown = " · ".join(f"{name} {text}" for name, text in event.figures.items())
            task = tasks[event.stage]
            progress.update(task, completed=event.done, total=event.total)
            if shown:
                progress.update(task, figures=escape(shown))

        yield on_event


def _show_result(result: Result) -> None:
    from autocompress.pipeline.comparison import chain_rows, comparison, prediction_check, shortfalls

    table = Table(title=f"{result.name}: {result.provenance['model']} on {result.provenance['data']}")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in comparison(result):
        table.add_row(*map(escape, row))
    out.print(table)
    if rows := chain_rows(result):
        headings = ["network", "test accuracy", *(f"{metric} (of the budget)" for metric in result.budgets)]
        _show_rows("stage after stage", headings, rows)
    if note := prediction_check(result):
        out.print(escape(note), soft_wrap=True)
    if result.export:
        agreement = result.export["top1_agreement"]
        out.print(
            f"ONNX Runtime against PyTorch on {result.export['num_images']:.0f} images: largest difference "
            f"{result.export['max_abs_diff']:.1e}, top-1 agreement {agreement:.1%}"
        )
    for name, file in result.files.items():
        out.print(f"{escape(name)}: {file['bytes']:,} bytes, {escape(file['about'])}", soft_wrap=True)
    for shortfall in shortfalls(result):
        err.print(f"[yellow]warning:[/] {escape(shortfall)}", soft_wrap=True)
    if result.run_dir is not None:
        out.print(f"report: {escape(str(result.run_dir / 'report.html'))}", soft_wrap=True)


def _show_series(series: SeriesResult) -> None:
    from autocompress.pipeline.comparison import shortfalls
    from autocompress.pipeline.series import REPORT

    _show_rows(f"{series.name}: a network for each limit on {series.metric}", *series.table())
    for result in series.results:
        for shortfall in shortfalls(result):
            err.print(f"[yellow]warning:[/] {escape(result.name)}: {escape(shortfall)}", soft_wrap=True)
    out.print(f"report: {escape(str(series.folder / REPORT))}", soft_wrap=True)


def _show_contest(outcome: Outcome) -> None:
    from autocompress.pipeline.contest_outcome import table
    from autocompress.pipeline.contest_report import CURVES, REPORT, TRIALS

    title = f"{outcome.name}, stage {outcome.stage}: {outcome.num_plans} plans each"
    _show_rows(title, *table(outcome))
    out.print(escape(outcome.verdict()), soft_wrap=True, highlight=False)
    names = [str(outcome.folder / name) for name in (REPORT, CURVES, TRIALS)]
    out.print(f"wrote {escape(', '.join(names))}", soft_wrap=True)


def _show_fidelity(measured: Fidelity) -> None:
    from autocompress.pipeline.fidelity_outcome import FIGURES, PLOT

    title = f"{measured.name}: quick score beside fine-tuning, on the search split"
    _show_rows(title, *measured.table())
    out.print(escape(measured.verdict()), soft_wrap=True, highlight=False)
    names = [str(measured.folder / name) for name in (FIGURES, PLOT)]
    out.print(f"wrote {escape(', '.join(names))}", soft_wrap=True)


def _show_rows(title: str, headings: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, show_footer=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold", min_width=6)
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    out.print(table)


def _show_architectures(found: Architectures) -> None:
    from autocompress.pipeline.comparison import number

    space, problem = found.space, found.problem
    table = Table(title=f"{space.name}: {space.num_members:,} networks")
    for heading in ("decision", "operations, the cheapest first"):
        table.add_column(heading, overflow="fold")
    for knob in problem.knobs:
        table.add_row(escape(knob.name), escape(", ".join(map(str, knob.choices))))
    out.print(table)
    for budget in problem.budgets:
        low, high = (number(cost[budget.metric]) for cost in problem.reachable())
        share = budget.limit / found.largest.costs.original[budget.metric]
        out.print(
            f"stage nas: {budget.metric}: from {low} to {high}; the stage gets {budget} ({share:.1%} of the "
            "largest network). What follows is for a network near that.",
            highlight=False,
            soft_wrap=True,
        )


def _show_joint(prepared: Prepared) -> None:
    assert prepared.joint is not None
    problem = prepared.joint.problem
    table = Table(title=f"{prepared.joint.joint.space.name}: {len(problem.knobs)} decisions in one search")
    for heading in ("decision", "of", "choices"):
        table.add_column(heading, overflow="fold")
    for knob in problem.knobs:
        table.add_row(escape(knob.name), knob.kind, escape(", ".join(map(str, knob.choices))))
    out.print(table)
    _show_reach(prepared.candidates[0], "nas", problem)


def _show_candidate(prepared: Prepared, candidate: Candidate) -> None:
    from autocompress.pipeline import estimate, problems_of

    for stage, problem in problems_of(candidate, prepared.recipe).items():
        (_show_channels if stage == "prune" else _show_bits)(candidate, problem)
        _show_reach(candidate, stage, problem)
    for member in prepared.recipe.members()[1:]:
        for stage, problem in problems_of(candidate, member).items():
            _show_budgets(candidate, stage, problem)
    for note in candidate.traced.graph.uncounted:
        out.print(f"[yellow]not counted:[/] {escape(note)}")
    times = estimate(prepared, candidate)
    for name, seconds in times.evaluations.items():
        out.print(f"stage {name}: one evaluation took {seconds:.2f} s")
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.stages.items())
    out.print(f"estimated: {parts}; in all {times.total / 60:.1f} min")


def _show_channels(candidate: Candidate, problem: Problem) -> None:
    knobs = {knob.name: knob for knob in problem.knobs}
    table = Table(title=f"{candidate.name}: channel groups")
    for heading in ("group", "channels", "choices", "layers that read it", "locked because"):
        table.add_column(heading, overflow="fold")
    for group in candidate.traced.graph.groups:
        knob = knobs.get(group.name)
        choices = f"{knob.choices[0]}..{knob.choices[-1]} ({len(knob.choices)})" if knob else "-"
        reason = group.locked or ("" if knob else "kept by the recipe, or too small")
        readers = ", ".join(group.consumers[:3]) + (" ..." if len(group.consumers) > 3 else "")
        table.add_row(escape(group.name), str(group.size), choices, escape(readers), escape(reason))
    out.print(table)


def _show_bits(candidate: Candidate, problem: Problem) -> None:
    choices = {(str(knob.kind), layer): knob.choices for knob in problem.knobs for layer in knob.bit_layers}
    table = Table(title=f"{candidate.name}: bits")
    for heading in ("layer", "weights", "activations it reads"):
        table.add_column(heading, overflow="fold")
    for layer, bits in problem.base.bits.items():
        sides = (("weight_bits", bits.weight), ("act_bits", bits.act))
        texts = [
            ", ".join(map(str, found)) if (found := choices.get((kind, layer))) else f"{fixed} (kept)"
            for kind, fixed in sides
        ]
        table.add_row(escape(layer), *texts)
    out.print(table)


def _show_reach(candidate: Candidate, stage: str, problem: Problem) -> None:
    """What can be reached of what can be counted and of the budgets' metrics."""
    from autocompress.pipeline.comparison import number

    smallest, largest = problem.reachable()
    target = candidate.costs.target
    counts: tuple[Metric, ...] = ("macs", "params") if stage == "prune" else ("bitops", "weight_bytes")
    for metric in dict.fromkeys([*counts, *(budget.metric for budget in problem.budgets)]):
        share = smallest[metric] / largest[metric]
        where = f" on {target.name}" if target and metric in target.metrics else ""
        low, high = number(smallest[metric]), number(largest[metric])
        text = f"stage {stage}: {metric}{where}: from {low} ({share:.1%}) to {high}"
        out.print(text, highlight=False, soft_wrap=True)
    _show_budgets(candidate, stage, problem)


def _show_budgets(candidate: Candidate, stage: str, problem: Problem) -> None:
    for budget in problem.budgets:
        share = budget.limit / candidate.costs.original.totals.get(budget.metric, math.nan)
        of = f" ({share:.1%} of the original)" if math.isfinite(share) else ""
        out.print(f"stage {stage}: budget {budget}{of} can be met", highlight=False)


def _fault(message: str) -> int:
    err.print("[bold red]error:[/] ", end="")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    return FAULT


def main() -> None:
    """Entry point: wrong input ends with exit code 2 and one message, Ctrl-C with 130 and a way to go on."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False, show_time=False)],
    )
    # Said on import, and nothing a user of this command line can act on.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="brevitas")
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
    except AutocompressError as fault:
        code = _fault(str(fault))
    except KeyboardInterrupt:
        again = "search" if sys.argv[1:2] == ["search"] else "run"
        err.print(f"interrupted; go on with: autocompress {again} --resume RUN_DIRECTORY")
        code = INTERRUPTED
    except Exception as fault:
        if not hasattr(fault, "exit_code"):
            raise
        getattr(fault, "show", lambda: None)()
        code = fault.exit_code
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
