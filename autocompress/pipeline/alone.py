"""What single stages reach within the budgets of the whole chain, with as many epochs of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from autocompress.core import Result
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.pipeline.costs import bits_of
from autocompress.pipeline.prepare import prepare_nas, prepare_own
from autocompress.pipeline.problems import Candidate, problems_of
from autocompress.pipeline.progress import Event
from autocompress.pipeline.recipe import Recipe, Stage
from autocompress.pipeline.recipe_sections import BitSettings
from autocompress.pipeline.run_directory import RunDirectory
from autocompress.pipeline.stages import Run, fit_stage

Single = Literal["nas", "prune", "quantise"]
FOLDER = "alone"
_STAGES: dict[Single, tuple[Stage, ...]] = {
    "nas": ("nas", "train"),
    "prune": ("prune", "finetune"),
    "quantise": ("quantise", "qat"),
}


def alone_recipe(recipe: Recipe, stage: Single) -> Recipe:
    """The recipe of one stage without the others: the same budgets, and as many epochs in all.

    Epochs of trainings that are left out go to the last training that is left. Layers have the bits that the
    whole run assumes where no stage decides them.
    """
    stages = tuple(name for name in _STAGES[stage] if name in recipe.stages)
    lost = sum(
        getattr(recipe, s).epochs for s in ("finetune", "qat") if s in recipe.stages and s not in stages
    )
    last = next((s for s in ("qat", "finetune", "train") if s in stages), None)
    changes: dict[str, Any] = {"name": f"{recipe.name}-{stage}-alone", "stages": stages, "alone": ()}
    if last is not None:
        settings = getattr(recipe, last)
        changes[last] = settings.model_copy(update={"epochs": settings.epochs + lost})
    if "quantise" not in stages and (bits := bits_of(recipe)) is not None:
        changes["bits"] = BitSettings(weight=bits.weight, act=bits.act)
        changes["reference_bits"] = recipe.reference_bits
    for searched in ("nas", "prune"):
        # Budgets of their own are parts of a way that the stage now goes to its end.
        section = getattr(recipe, searched)
        changes[searched] = section.model_copy(update={"budgets": ()})
    return recipe.model_copy(update=changes)


def compare_alone(
    run: Run, candidate: Candidate, run_again: Callable[[Run], Result]
) -> dict[str, dict[str, Any]]:
    """Run every stage that the recipe wants compared, each in a folder of its own that can be resumed.

    Stages other than nas start from the network as it was before pruning; where nas found that one, from the
    largest member of the space, trained alike.

    Args:
        run: the whole run, its stages done.
        candidate: its network, trained.
        run_again: runs a prepared recipe to its end.

    Returns:
        Stage -> accuracy on the test split and predicted costs, or ``refused`` and why.
    """
    compared: dict[str, dict[str, Any]] = {}
    for stage in run.prepared.recipe.alone:
        with run.timed(f"{stage} alone"):
            try:
                compared[stage] = _alone(run, candidate, stage, run_again)
            except InfeasibleBudgetError as fault:
                compared[stage] = {"refused": str(fault)}
    return compared


def _alone(
    run: Run, candidate: Candidate, stage: Single, run_again: Callable[[Run], Result]
) -> dict[str, Any]:
    recipe, data = alone_recipe(run.prepared.recipe, stage), run.prepared.data

    def on_event(event: Event) -> None:
        run.on_event(Event(f"{stage} alone: {event.stage}", event.done, event.total, event.figures))

    if stage == "nas":
        prepared = prepare_nas(data, recipe)
    else:
        name, model = _start(run, candidate, recipe)
        prepared = prepare_own({name: model}, data, recipe)
    path = run.directory.path / FOLDER / stage
    with RunDirectory.open_or_create(path, recipe) as directory:
        result = run_again(Run(prepared, directory, on_event, run.workers))
    return {
        "model": str(result.provenance["model"]),
        "accuracy": result.after["accuracy"],
        **result.predicted["after"],
    }


def _start(run: Run, candidate: Candidate, recipe: Recipe) -> tuple[str, nn.Module]:
    """Name and network that stages other than nas start from."""
    architectures = run.prepared.architectures
    if architectures is None:
        return candidate.name, copy.deepcopy(candidate.model)
    name, model = f"largest of {candidate.name}", copy.deepcopy(architectures.largest.model)
    problems_of(architectures.largest, recipe)  # refused before it is trained, if it must be
    fit_stage(run, model, run.prepared.recipe.train, stage=f"train {name}", teacher=None)
    return name, model
