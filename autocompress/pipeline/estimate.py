"""How long a run will take, from measured pieces of it."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.data import Subset

from autocompress.pipeline.prepare import Candidate, Prepared, problem_of
from autocompress.pipeline.quick_score import QuickScore
from autocompress.pipeline.recipe import FinetuneStage, TrainStage
from autocompress.training import Data, Samples, TrainSettings, fit

STEPS = 4
"""Training steps that are timed."""


@dataclass(frozen=True)
class Estimate:
    """Seconds per stage, and what one evaluation of a plan took.

    Args:
        stages: stage -> seconds.
        evaluation: seconds of one measured evaluation.
    """

    stages: dict[str, float]
    evaluation: float

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.stages.values())


def estimate(prepared: Prepared, candidate: Candidate) -> Estimate:
    """Time one evaluation and a few training steps, and scale them up.

    Args:
        prepared: a checked recipe.
        candidate: the network to time.
    """
    recipe = prepared.recipe
    evaluation = _evaluation_seconds(prepared, candidate)
    searches = [name for name in (recipe.search.algorithm, *recipe.search.baselines) if name != "uniform"]
    stages = {}
    if "train" in recipe.stages and recipe.weights is None:
        stages["train"] = _training_seconds(prepared, candidate.model, recipe.train) * len(
            prepared.candidates
        )
    stages["prune"] = evaluation * recipe.search.num_plans * len(searches)
    if "finetune" in recipe.stages:
        stages["finetune"] = _training_seconds(prepared, candidate.model, recipe.finetune)
    return Estimate(stages, evaluation)


def _evaluation_seconds(prepared: Prepared, candidate: Candidate) -> float:
    """One evaluation of a plan about half-way through every knob, within the budgets."""
    problem = problem_of(candidate, prepared.recipe)
    score = QuickScore(
        candidate.model, candidate.traced, prepared.data, settings=prepared.recipe.prune, seed=0
    )
    plan = problem.plan(problem.bounded([knob.at(0.5) for knob in problem.knobs]))
    start = time.perf_counter()
    score(plan)
    return time.perf_counter() - start


def _training_seconds(prepared: Prepared, model: nn.Module, settings: TrainStage | FinetuneStage) -> float:
    data = prepared.data
    images = min(STEPS * settings.batch_size, len(data.train))
    short = replace(TrainSettings(**settings.model_dump()), epochs=1, warmup_epochs=0)
    small = Data(
        data.name,
        _first(data.train, images),
        _first(data.search, 8),
        data.test,
        data.num_classes,
        data.input_shape,
    )
    copy_ = copy.deepcopy(model)
    with torch.random.fork_rng():
        start = time.perf_counter()
        fit(copy_, small, short, seed=0, teacher=model)
        seconds = time.perf_counter() - start
    return seconds / images * len(data.train) * settings.epochs


def _first(samples: Samples, count: int) -> Samples:
    return Subset(samples, range(min(count, len(samples))))  # type: ignore[arg-type]
