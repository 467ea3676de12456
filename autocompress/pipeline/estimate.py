"""How long a run will take, from measured pieces of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.data import Subset

from autocompress.core import Plan
from autocompress.nas import ElasticSupernet, SupernetSearch, fit_elastic
from autocompress.nas import SearchSettings as SupernetSettings
from autocompress.pipeline.architectures import Architectures, method_of
from autocompress.pipeline.bit_score import BitScore
from autocompress.pipeline.joint import JointArchitectures, joint_score
from autocompress.pipeline.prepare import Prepared
from autocompress.pipeline.problems import Candidate, problems_of, searches_of
from autocompress.pipeline.quick_score import QuickScore
from autocompress.pipeline.recipe import Recipe, Stage, TrainStage
from autocompress.training import Samples, TrainSettings, fit

STEPS = 4
"""Training steps that are timed."""


QAT_FACTOR = 1.3
"""How much longer training takes with rounding: ResNet-20 ran at 237 against 281 images/s on one thread."""


@dataclass(frozen=True)
class Estimate:
    """Seconds per stage, and what one evaluation of a plan took.

    Args:
        stages: stage -> seconds.
        evaluations: stage that searches -> seconds of one measured evaluation.
    """

    stages: dict[str, float]
    evaluations: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.stages.values())


def estimate(prepared: Prepared, candidate: Candidate) -> Estimate:
    """Time one evaluation per search and a few training steps, and scale them up.

    The networks of a series share their training, and all else comes once for each.
    What follows pruning is timed on the network before pruning, so it is rather too long.

    Args:
        prepared: a checked recipe.
        candidate: the network to time.
    """
    recipe, evaluations = prepared.recipe, _evaluation_seconds(prepared, candidate)
    stages: dict[str, float] = {}
    for stage in recipe.stages:
        if stage == "nas" and prepared.architectures:
            stages[stage] = _supernet_seconds(prepared, prepared.architectures)
        elif stage == "nas" and prepared.joint:
            stages[stage] = _joint_seconds(prepared, prepared.joint)
        elif stage == "train" and recipe.weights is None:
            once = _training_seconds(prepared, candidate.model, recipe.train)
            stages[stage] = once * len(prepared.candidates)
        elif stage in evaluations:
            stages[stage] = evaluations[stage] * _num_evaluations(recipe, stage)
        elif stage == "finetune":
            stages[stage] = _training_seconds(prepared, candidate.model, recipe.finetune)
        elif stage == "qat":
            stages[stage] = QAT_FACTOR * _training_seconds(prepared, candidate.model, recipe.qat)
    again = len(recipe.members())
    times = {stage: seconds * (1 if stage == "train" else again) for stage, seconds in stages.items()}
    return Estimate(times, evaluations)


def _num_evaluations(recipe: Recipe, stage: Stage) -> int:
    settings = searches_of(recipe)[stage]
    names = [name for name in (settings.algorithm, *settings.baselines) if name != "uniform"]
    uniform = len(recipe.quantise.weight_bits) if stage == "quantise" else 0
    return settings.num_plans * len(names) + uniform


def _evaluation_seconds(prepared: Prepared, candidate: Candidate) -> dict[str, float]:
    """One evaluation of a plan about half-way through every knob, within the budgets, per searching stage."""
    recipe, data = prepared.recipe, prepared.data
    seconds: dict[str, float] = {}
    scores: dict[str, Callable[[], Callable[[Plan], float]]] = {
        "prune": lambda: QuickScore(candidate.model, candidate.traced, data, settings=recipe.prune, seed=0),
        "quantise": lambda: BitScore(candidate.model, data, settings=recipe.quantise, seed=0),
    }
    for stage, problem in problems_of(candidate, recipe).items():
        score = scores[stage]()
        plan = problem.plan(problem.bounded([knob.at(0.5) for knob in problem.knobs]))
        start = time.perf_counter()
        score(plan)
        seconds[stage] = time.perf_counter() - start
    return seconds


def _supernet_seconds(prepared: Prepared, architectures: Architectures) -> float:
    """A few steps of the supernet, scaled up; nothing where it is borrowed."""
    recipe, data = prepared.recipe, prepared.data
    settings = recipe.nas
    if settings.supernet is not None:
        return 0.0
    images = min(STEPS * settings.batch_size, len(data.train))
    small = replace(data, train=_first(data.train, images))
    search = SupernetSearch(method_of(settings), SupernetSettings(epochs=1, batch_size=settings.batch_size))
    start = time.perf_counter()
    search(architectures.space, small, seed=recipe.seed, device=recipe.device)
    return (time.perf_counter() - start) / images * len(data.train) * settings.epochs


def _joint_seconds(prepared: Prepared, architectures: JointArchitectures) -> float:
    """A few steps of the supernet and one evaluation, scaled up."""
    recipe, data, nas = prepared.recipe, prepared.data, prepared.recipe.nas
    images = min(STEPS * nas.batch_size, len(data.train))
    small = replace(data, train=_first(data.train, images), search=_first(data.search, 8))
    supernet = ElasticSupernet(architectures.joint, seed=recipe.seed).to(recipe.device)
    start = time.perf_counter()
    fit_elastic(supernet, small, TrainSettings(epochs=1, batch_size=nas.batch_size, lr=nas.lr), seed=0)
    training = (time.perf_counter() - start) / images * len(data.train) * nas.epochs
    score = joint_score(recipe, data, supernet)
    problem, start = architectures.problem, time.perf_counter()
    score(problem.plan(problem.bounded([knob.at(0.5) for knob in problem.knobs])))
    searching = (time.perf_counter() - start) * _num_evaluations(recipe, "nas")
    return searching + (0.0 if nas.supernet else training)


def _training_seconds(prepared: Prepared, model: nn.Module, settings: TrainStage) -> float:
    data = prepared.data
    images = min(STEPS * settings.batch_size, len(data.train))
    short = replace(TrainSettings(**settings.model_dump()), epochs=1, warmup_epochs=0)
    small = replace(data, train=_first(data.train, images), search=_first(data.search, 8))
    copy_ = copy.deepcopy(model)
    with torch.random.fork_rng():
        start = time.perf_counter()
        fit(copy_, small, short, seed=0, teacher=model)
        seconds = time.perf_counter() - start
    return seconds / images * len(data.train) * settings.epochs


def _first(samples: Samples, count: int) -> Samples:
    return Subset(samples, range(min(count, len(samples))))  # type: ignore[arg-type]
