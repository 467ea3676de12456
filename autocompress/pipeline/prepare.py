"""Everything that can be checked before a run writes its first file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autocompress.core.errors import DataError, DivergenceError, RecipeError
from autocompress.export import check_opset
from autocompress.pipeline.architectures import (
    Architectures,
    architectures_of,
    method_of,
    representative,
    supernet_file,
)
from autocompress.pipeline.costs import Costs, content_digest
from autocompress.pipeline.joint import JointArchitectures, joint_architectures_of
from autocompress.pipeline.problems import (
    Candidate,
    check_num_plans,
    made_searches,
    problems_of,
    searches_of,
)
from autocompress.pipeline.recipe import Recipe
from autocompress.quant import Skeleton
from autocompress.trace import trace
from autocompress.training import Data, load_data, weights_digest
from autocompress.training.batches import spread
from autocompress.zoo import build, load_weights

SAMPLED = 32
"""Images per split that tell one data set from another."""


@dataclass(frozen=True)
class Prepared:
    """A recipe with its data and networks, checked to be runnable.

    Args:
        recipe: what to do.
        data: what on.
        candidates: the networks; of a recipe with stage nas, one that the stage might find.
        architectures: what stage nas chooses among.
        joint: the same, where one search decides the architecture and what follows.
    """

    recipe: Recipe
    data: Data
    candidates: tuple[Candidate, ...]
    architectures: Architectures | None = None
    joint: JointArchitectures | None = None


def prepare(recipe: Recipe) -> Prepared:
    """Load the data and build the networks a recipe names.

    Raises:
        AutocompressError: any of its kinds; nothing has been written.
    """
    recipe.check_complete()
    settings = recipe.data
    assert settings is not None
    _check_machine(recipe)
    data = load_data(
        settings.name,
        root=Path(settings.root) if settings.root else None,
        download=settings.download,
        search_size=settings.search_size,
        train_size=settings.train_size,
        mean=settings.mean,
        std=settings.std,
        seed=recipe.seed,
    )
    if "nas" in recipe.stages:
        return prepare_nas(data, recipe)
    models = {}
    with torch.random.fork_rng():
        for name in recipe.model:
            torch.manual_seed(recipe.seed)
            models[name] = build(name, num_classes=data.num_classes, in_channels=data.input_shape[0])
            if recipe.weights is not None:
                load_weights(models[name], Path(recipe.weights))
    return prepare_own(models, data, recipe)


def prepare_own(models: Mapping[str, nn.Module], data: Data, recipe: Recipe) -> Prepared:
    """The same for networks and data that already exist.

    Raises:
        AutocompressError: any of its kinds; nothing has been written.
    """
    _check_settings(recipe)
    candidates = []
    for name, model in models.items():
        _check_finite(name, model)
        _check_shape(name, model, data)
        traced = trace(model, data.input_shape)
        costs = Costs.of(recipe, traced.graph)
        candidate = Candidate(name, model.to(recipe.device), traced, costs)
        _check_candidate(candidate, recipe)
        candidates.append(candidate)
    return Prepared(recipe, data, tuple(candidates))


def prepare_nas(data: Data, recipe: Recipe) -> Prepared:
    """The same for networks of a space, of which stage nas is to find one.

    Raises:
        AutocompressError: any of its kinds; nothing has been written.
    """
    _check_settings(recipe)
    supernet_file(recipe.nas)
    if recipe.is_joint:
        return _prepare_joint(data, recipe)
    method_of(recipe.nas)
    architectures = architectures_of(recipe, data)
    example = representative(architectures, recipe)
    _check_candidate(example, recipe)
    return Prepared(recipe, data, (example,), architectures)


def _prepare_joint(data: Data, recipe: Recipe) -> Prepared:
    joint = joint_architectures_of(recipe, data)
    problem = joint.problem
    check_num_plans(recipe, {"nas": problem})
    plan = problem.plan(problem.bounded([knob.choices[-1] for knob in problem.knobs]))
    example = joint.candidate(plan, recipe)
    if plan.bits:
        Skeleton(example.model)
    return Prepared(recipe, data, (example,), joint=joint)


def _check_settings(recipe: Recipe) -> None:
    _check_machine(recipe)
    for settings in searches_of(recipe).values():
        made_searches(settings)
    if "export" in recipe.stages and recipe.export.opset is not None:
        check_opset(recipe.export.opset)


def _check_candidate(candidate: Candidate, recipe: Recipe) -> None:
    if "quantise" in recipe.stages and recipe.quantise.method == "linear":
        Skeleton(candidate.model)  # refuses what cannot be quantised before any work
    check_num_plans(recipe, problems_of(candidate, recipe))


def inputs_of(prepared: Prepared) -> dict[str, str]:
    """Hashes that tell the networks, data and target of a run from others."""
    data = prepared.data
    digest = hashlib.sha256(repr((data.num_classes, data.input_shape)).encode())
    for split in (data.train, data.search, data.test):
        digest.update(str(len(split)).encode())
        for x, y in spread(split, SAMPLED, limit=min(SAMPLED, len(split))):
            digest.update(x.contiguous().numpy().tobytes() + y.numpy().tobytes())
    models = {candidate.name: weights_digest(candidate.model) for candidate in prepared.candidates}
    target = prepared.candidates[0].costs.target
    machine = {"target": content_digest(target)} if target else {}
    space = prepared.architectures or prepared.joint
    if space is not None:
        models = {"space": repr(space.joint if isinstance(space, JointArchitectures) else space.space)}
        if (borrowed := supernet_file(prepared.recipe.nas)) is not None:
            models["supernet"] = hashlib.sha256(borrowed.read_bytes()).hexdigest()[:16]
    return {"data": digest.hexdigest()[:16]} | machine | models


def _check_machine(recipe: Recipe) -> None:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device: cuda is not available on this machine; set device: cpu")


def _check_finite(name: str, model: nn.Module) -> None:
    bad = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise DivergenceError(
            f"weights of {name} are not finite: {', '.join(bad[:8])}; start from other weights"
        )


def _check_shape(name: str, model: nn.Module, data: Data) -> None:
    """One image through the network, so that a mismatch is told before any work."""
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shape = "x".join(map(str, data.input_shape))
    try:
        with torch.inference_mode():
            output = model.eval()(torch.zeros(1, *data.input_shape, device=device))
    except Exception as fault:
        raise DataError(
            f"{name} does not take the images of {data.name!r} (channels x height x width {shape}): "
            f"{' '.join(str(fault).split())[:300]}. Choose data of the size and "
            "channels the network was built for."
        ) from fault
    finally:
        model.train(training)
    if not isinstance(output, torch.Tensor) or output.shape != (1, data.num_classes):
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise DataError(
            f"{name} must return logits of shape (N, {data.num_classes}) for {data.name!r}, "
            f"got {got} for N = 1"
        )
