"""From a recipe to a compressed network and everything that proves it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.agents import ALONE, Workers
from autocompress.core import Plan, Result
from autocompress.core.errors import (
    CheckpointError,
    RecipeError,
    RunDirectoryError,
    UnsupportedModelError,
)
from autocompress.export import read_packed
from autocompress.pipeline import stages
from autocompress.pipeline.alone import compare_alone
from autocompress.pipeline.anchor import anchor
from autocompress.pipeline.arch_stage import search_architecture
from autocompress.pipeline.architectures import space_of
from autocompress.pipeline.export_stage import PACKED, export
from autocompress.pipeline.joint import joint_space_of
from autocompress.pipeline.joint_stage import search_jointly
from autocompress.pipeline.outcome import Step, check_prediction, layer_table, outcome
from autocompress.pipeline.prepare import inputs_of, prepare, prepare_nas, prepare_own
from autocompress.pipeline.progress import OnEvent, silent
from autocompress.pipeline.recipe import Recipe
from autocompress.pipeline.report import write_report
from autocompress.pipeline.run_directory import RunDirectory
from autocompress.pipeline.search_stage import calibrated, search_bits, search_channels
from autocompress.quant.stored import unfilled
from autocompress.trace import keep_first, shrink, trace
from autocompress.training import Data, Samples, evaluate, from_datasets
from autocompress.zoo import load_weights, read_safetensors


def run_recipe(
    recipe: Recipe, *, out: Path | None = None, workers: Workers = ALONE, on_event: OnEvent = silent
) -> Result:
    """Run a recipe that names its networks and data.

    Everything that can be checked is checked before the first file is written.

    Args:
        recipe: what to do.
        out: folder of the run; ``runs/<name>`` with the next free number when absent.
        workers: who scores batches of plans; changes no result.
        on_event: called while the run works.

    Raises:
        AutocompressError: any of its kinds.
    """
    _check_single(recipe)
    with recipe_threads(recipe):
        recipe = absolute_paths(recipe)
        prepared = prepare(recipe)
        path = out or RunDirectory.next_free(Path("runs"), recipe.name)
        with RunDirectory.create(path, recipe) as directory:
            return run_stages(stages.Run(prepared, directory, on_event, workers))


def resume(path: Path, *, workers: Workers = ALONE, on_event: OnEvent = silent) -> Result:
    """Go on with a run that was stopped or killed; it ends as if it had not been.

    Raises:
        RunDirectoryError: not a run directory, in use, or started from Python with its own model and data.
    """
    with RunDirectory.open(path) as directory:
        recipe = directory.recipe
        _check_single(recipe)
        if recipe.data is None or not (recipe.model or "nas" in recipe.stages):
            raise RunDirectoryError(
                f"{path} was started from Python with its own model and data; resume it there: "
                "compress(model, data, recipe, run_dir=...)"
            )
        with recipe_threads(recipe):
            return run_stages(stages.Run(prepare(recipe), directory, on_event, workers))


def compress(
    model: nn.Module | None,
    data: Data | tuple[Samples, Samples],
    recipe: Recipe | Mapping[str, Any],
    *,
    run_dir: Path | str | None = None,
    workers: Workers = ALONE,
    on_event: OnEvent = silent,
) -> Result:
    """Compress your own network on your own data.

    Args:
        model: maps (N, C, H, W) to logits (N, classes). Not changed. None where stage nas finds it.
        data: :class:`~autocompress.training.Data`, or a (train, test) pair of map-style data sets of
            (float tensor (C, H, W), int label); the search split is taken from the training data.
        recipe: what to do; ``model`` and ``data`` are left out. Without the stage ``train`` the network is
            taken as trained.
        run_dir: folder of the run; an existing one is resumed when it was started with an equal recipe,
            model and data. ``runs/<name>`` with the next free number when absent.
        workers: who scores batches of plans; changes no result.
        on_event: called while the run works.

    Returns:
        The result; :func:`load_compressed` makes the network from its ``run_dir``.

    Raises:
        AutocompressError: any of its kinds.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_mapping(recipe)
    given = {"model": recipe.model, "weights": recipe.weights, "data": recipe.data}
    _check_single(recipe)
    if faults := [f"{key}: leave it out; it is passed from Python" for key, value in given.items() if value]:
        raise RecipeError(faults)
    if (model is None) != ("nas" in recipe.stages):
        raise RecipeError("model: give a network, or None where the recipe has stage nas, which finds one")
    with recipe_threads(recipe):
        if not isinstance(data, Data):
            train, test = data
            data = from_datasets(train, test, seed=recipe.seed)

        if model is None:
            prepared = prepare_nas(data, recipe)
        else:
            prepared = prepare_own({type(model).__name__: copy.deepcopy(model)}, data, recipe)
        path = Path(run_dir) if run_dir else RunDirectory.next_free(Path("runs"), recipe.name)
        with RunDirectory.open_or_create(path, recipe) as directory:
            return run_stages(stages.Run(prepared, directory, on_event, workers))


def load_compressed(model: nn.Module | None, run_dir: Path | str) -> nn.Module:
    """The compressed network of a finished run; of Brevitas layers where activations are integers.

    Args:
        model: the original architecture, with any weights; not changed. None where stage nas found it.
        run_dir: folder of the run.

    Raises:
        RunDirectoryError: the run has not finished.
        CheckpointError: the weights do not belong to this architecture.
    """
    path = Path(run_dir)
    if not (path / "result.json").exists():
        raise RunDirectoryError(f"{path} holds no result.json: the run has not finished; resume it first")
    result = Result.from_json((path / "result.json").read_text(encoding="utf-8"))
    if model is None:
        model = found_network(path, result)
    traced = trace(model, result.provenance["input_shape"])
    weights, quantisers = path / "model.safetensors", path / "quantisers.json"
    try:
        small = shrink(model, traced, keep_first(traced, result.plan.channels))
        if quantisers.exists():
            structure = json.loads(quantisers.read_text(encoding="utf-8"))
            small = unfilled(small, result.plan, structure, read_safetensors(weights)[0])
    except (ValueError, KeyError, UnsupportedModelError) as fault:
        raise CheckpointError(f"{path} was made from another network: {fault}") from fault
    if weights.exists() or not (path / PACKED).exists():
        load_weights(small, weights)
        return small.eval()
    try:
        small.load_state_dict(read_packed(path / PACKED))
    except RuntimeError as fault:
        raise CheckpointError(f"{path} was made from another network: {fault}") from fault
    return small.eval()


def found_network(run_dir: Path, result: Result) -> nn.Module:
    """The network that stage nas of a run found, with fresh weights.

    Raises:
        RunDirectoryError: the run has no such stage.
    """
    if not result.plan.arch:
        raise RunDirectoryError(f"{run_dir} compressed a network that was given to it; pass that network")
    recipe = Recipe.load(run_dir / "recipe.yaml")
    shape, num_classes = result.provenance["input_shape"], result.provenance["num_classes"]
    space = (
        joint_space_of(recipe, shape, num_classes).space
        if recipe.is_joint
        else space_of(recipe.nas, shape, num_classes)
    )
    return space.build(result.plan.arch, seed=0)


def absolute_paths(recipe: Recipe) -> Recipe:
    """Files by absolute path, so that the run can be resumed from any folder."""
    changes: dict[str, Any] = {}
    if recipe.weights is not None:
        changes["weights"] = str(Path(recipe.weights).resolve())
    if recipe.data is not None and recipe.data.root is not None:
        root = str(Path(recipe.data.root).resolve())
        changes["data"] = recipe.data.model_copy(update={"root": root})
    return recipe.model_copy(update=changes) if changes else recipe


def _check_single(recipe: Recipe) -> None:
    if recipe.is_series:
        raise RecipeError(
            f"{recipe.name}: its budgets have several limits, which make several networks; "
            "use run_series or resume_series, or give one limit"
        )


@contextmanager
def recipe_threads(recipe: Recipe) -> Iterator[None]:
    """The number of threads changes the last bits of training, so it is part of the recipe."""
    before = torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_inputs(run: stages.Run) -> None:
    """A resumed run goes on with the networks and data it was started with, or not at all."""
    now, then = inputs_of(run.prepared), run.directory.read_json("inputs.json")
    if then is None:
        run.directory.write_json("inputs.json", now)
    elif then != now:
        changed = ", ".join(sorted(key for key in {*now, *then} if now.get(key) != then.get(key)))
        raise RunDirectoryError(
            f"{run.directory.path} was started with other inputs ({changed}); give it those, or choose "
            "another run directory"
        )


def run_stages(run: stages.Run) -> Result:
    """Every stage of a run, and what they leave in its folder."""
    check_inputs(run)
    anchor(run)
    recipe = run.prepared.recipe
    if run.prepared.architectures:
        found = search_architecture(run, run.prepared.architectures)
        run.prepared = replace(run.prepared, candidates=(found,))
    elif run.prepared.joint:
        found, run.decided = search_jointly(run, run.prepared.joint)
        run.prepared = replace(run.prepared, candidates=(found,))
    candidate = stages.train(run)
    plan, model = Plan(), candidate.model
    steps = [Step("train" if "train" in recipe.stages else "given", model, plan)]
    if "prune" in recipe.stages:
        plan, model = search_channels(run, candidate)
        steps.append(Step("prune", model, plan))
    if "finetune" in recipe.stages:
        model = stages.finetune(run, candidate, model)
        steps.append(Step("finetune", model, plan))
    check_prediction(candidate.costs(plan), model, run.prepared.data.input_shape)
    score, floating = None, model
    if "quantise" in recipe.stages:
        plan, score = search_bits(run, candidate, model, plan)
    elif "bits" in recipe.search.knobs:
        plan, score = Plan(bits=run.decided.bits), calibrated(run, model)
    if score is not None:
        if "qat" in recipe.stages:
            steps.append(Step("quantise", score.tables.network(plan), plan))
        model = stages.qat(run, score, plan, model)
        steps.append(Step("qat" if "qat" in recipe.stages else "quantise", model, plan))
    exported = export(run, candidate, model, plan, floating=floating)
    run.directory.write_json("layers.json", layer_table(candidate, plan))
    run.directory.write_json("training.json", run.training)
    with run.timed("test"):
        chain = [step.figures(candidate, evaluate(step.model, run.prepared.data.test)) for step in steps]
    compared = compare_alone(run, candidate, run_stages) if recipe.alone else {}
    result = outcome(run, candidate, plan, chain=chain, alone=compared, exported=exported)
    run.directory.write("result.json", result.to_json())
    write_report(run.directory.path)
    return result
