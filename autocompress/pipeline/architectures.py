"""The networks that stage nas chooses among: a space, its prices, and its members as candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Budget, Plan, Problem
from autocompress.core.errors import InfeasibleBudgetError, RecipeError
from autocompress.core.wording import did_you_mean
from autocompress.hardware_sim import UnsupportedLayerError, load_target
from autocompress.nas import METHODS, SPACES, Space, arch_problem, operation_costs
from autocompress.nas.supernet import Method
from autocompress.pipeline.costs import Costs, Counted, bits_of, share_for_first
from autocompress.pipeline.problems import Candidate, bit_problem_of, problems_of
from autocompress.pipeline.quick_score import channel_problem
from autocompress.pipeline.recipe import NasSettings, Recipe
from autocompress.trace import trace
from autocompress.training import Data
from autocompress.zoo.own import call_factory

CHECKPOINT = "nas.checkpoint"
"""The supernet, in the folder of its run."""
FOUND = "architecture.json"
"""What stage nas found, likewise."""
_STEPS = np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 141)])
_SHRINK = 0.9
_FROM_DATA = ("input_shape", "num_classes", "name")


@dataclass(frozen=True)
class Architectures:
    """A space as a recipe sees it.

    Args:
        space: the networks.
        problem: prices them; it is within the budgets of stage nas. It cannot score.
        largest: the member that relative budgets refer to.
    """

    space: Space
    problem: Problem
    largest: Candidate

    def candidate(self, arch: Mapping[str, str], recipe: Recipe) -> Candidate:
        """A member with fresh weights, ready for the stages that follow."""
        return _member(self.space, arch, recipe, original=self.largest)

    def within(self, probabilities: Mapping[str, NDArray[np.float64]], budgets: tuple[Budget, ...]) -> Plan:
        """The member a distribution stands for, made cheaper as little as the budgets ask for.

        Probabilities are multiplied by ``exp(-k * cost / limit)`` with the smallest k of a fixed series for
        which the derived member is within the budgets.

        Raises:
            InfeasibleBudgetError: not even the largest k gives one.
        """
        shares = {name: np.zeros(len(ops)) for name, ops in self.space.decisions.items()}
        for budget in budgets:
            for name, cost in self._operation_costs(budget).items():
                shares[name] = shares[name] + (cost - cost.min()) / budget.limit
        for k in _STEPS:
            logits = {
                name: np.log(np.maximum(p, 1e-300)) - k * shares[name] for name, p in probabilities.items()
            }
            arch = self.space.derive({name: np.exp(v - v.max()) for name, v in logits.items()})
            if all(budget.met_by(self.problem.price(Plan(arch=arch))) for budget in budgets):
                return Plan(arch=arch)
        raise InfeasibleBudgetError(
            f"no member of {self.space.name} that the search can derive is within "
            f"{', '.join(map(str, budgets))}; raise the limit or take a space with fewer layers"
        )

    def _operation_costs(self, budget: Budget) -> Mapping[str, NDArray[np.float64]]:
        bits, target = self.largest.costs.bits, self.largest.costs.target
        return operation_costs(self.space, Counted(target), budget.metric, bits=bits).table


def architectures_of(recipe: Recipe, data: Data) -> Architectures:
    """The space of a recipe, priced and within the part of the budgets that stage nas gets.

    Raises:
        RecipeError: no such space, or the target cannot run its networks.
        InfeasibleBudgetError: the cheapest member with the fewest channels and bits is over budget.
    """
    space = space_of(recipe.nas, data.input_shape, data.num_classes)
    target = load_target(recipe.target) if recipe.target else None
    free = _problem(space, recipe, Counted(target))
    largest = _member(space, free.plan([knob.choices[-1] for knob in free.knobs]).arch, recipe)
    cheapest = _member(
        space, free.plan([knob.choices[0] for knob in free.knobs]).arch, recipe, original=largest
    )
    problems_of(cheapest, recipe)
    problem = replace(free, budgets=_budgets(recipe, free, largest))
    problem.reachable()
    return Architectures(space, problem, largest)


def can_go_on(candidate: Candidate, recipe: Recipe) -> bool:
    """Whether the stages after nas can bring a member within the recipe's budgets."""
    try:
        problems_of(candidate, recipe)
    except InfeasibleBudgetError:
        return False
    return True


def representative(found: Architectures, recipe: Recipe) -> Candidate:
    """A member near the budgets of stage nas from which the stages after it can go on.

    Raises:
        InfeasibleBudgetError: there is none.
    """
    largest = [knob.choices[-1] for knob in found.problem.knobs]
    problem = found.problem
    while True:
        candidate = found.candidate(problem.plan(problem.bounded(largest)).arch, recipe)
        if can_go_on(candidate, recipe):
            return candidate
        problem = tightened(problem)
        problem.reachable()


def tightened(problem: Problem) -> Problem:
    """The same problem with every limit a tenth lower."""
    return replace(problem, budgets=tuple(replace(b, limit=b.limit * _SHRINK) for b in problem.budgets))


def method_of(settings: NasSettings) -> Method:
    """The method of learning the distribution.

    Raises:
        RecipeError: a setting that the method does not have, or a value out of range.
    """
    kind = METHODS[settings.method]
    known = [field.name for field in fields(kind) if field.name != "alpha"]  # type: ignore[arg-type]
    if unknown := [key for key in settings.settings if key not in known]:
        raise RecipeError(
            [
                f"nas.settings: method {settings.method} has no setting {key!r}"
                f"{did_you_mean(key, known) or '; known are ' + ', '.join(known)}"
                for key in unknown
            ]
        )
    values: dict[str, Any] = dict(settings.settings)
    if settings.alpha_lr is not None:
        values["alpha"] = replace(kind().alpha, lr=settings.alpha_lr)
    return kind(**values)


def supernet_file(settings: NasSettings) -> Path | None:
    """The supernet that is borrowed from another run.

    Raises:
        RecipeError: that run has none.
    """
    if settings.supernet is None:
        return None
    path = Path(settings.supernet) / CHECKPOINT
    if not path.is_file():
        raise RecipeError(
            f"nas.supernet: {settings.supernet} holds no {CHECKPOINT}; name the folder of a run that has "
            "stage nas"
        )
    return path


def space_of(settings: NasSettings, input_shape: Sequence[int], num_classes: int) -> Space:
    """The space that a recipe names, for images and classes.

    Args:
        settings: the recipe's section.
        input_shape: of one image, (channels, height, width).
        num_classes: number of outputs.

    Raises:
        RecipeError: no such space or setting, or the images do not fit it.
    """
    name, own = settings.space, dict(settings.space_settings)
    channels, height, width = input_shape
    shape = (channels, height, width)
    if ":" in name:
        made = call_factory(name, input_shape=shape, num_classes=num_classes, **own)
        if not isinstance(made, Space):
            raise RecipeError(f"nas.space: {name!r} must give a Space, got {type(made).__name__}")
        return made
    if name not in SPACES:
        others = f"; there are {', '.join(SPACES)}, or package.module:factory"
        raise RecipeError(f"nas.space: no space named {name!r}{did_you_mean(name, list(SPACES)) or others}")
    known = [key for key in signature(SPACES[name]).parameters if key not in _FROM_DATA]
    if unknown := [key for key in own if key not in known]:
        raise RecipeError(
            [
                f"nas.space_settings: space {name} has no setting {key!r}"
                f"{did_you_mean(key, known) or '; known are ' + ', '.join(known)}"
                for key in unknown
            ]
        )
    return SPACES[name](shape, num_classes, **own)


def _member(
    space: Space, arch: Mapping[str, str], recipe: Recipe, *, original: Candidate | None = None
) -> Candidate:
    model = space.build(arch, seed=recipe.seed)
    traced = trace(model, space.input_shape)
    graph = original.traced.graph if original else None
    costs = Costs.of(recipe, traced.graph, original=graph)
    return Candidate(space.name, model.to(recipe.device), traced, costs)


def _problem(space: Space, recipe: Recipe, model: Counted) -> Problem:
    def not_scored(plan: Plan) -> float:
        raise NotImplementedError

    try:
        problem = arch_problem(
            space, model, (), evaluate=not_scored, bits=bits_of(recipe), order=recipe.budgets[0].metric
        )
        problem.reachable()
    except UnsupportedLayerError as fault:
        raise RecipeError(
            f"target {model.name} cannot run the networks of {space.name}: {fault}. Where that is for want "
            "of integers, set bits: {weight: 8, act: 8} in the recipe."
        ) from fault
    return problem


def _budgets(recipe: Recipe, free: Problem, largest: Candidate) -> tuple[Budget, ...]:
    """Absolute limits of stage nas: its own, or its part of the way to the recipe's."""
    own = recipe.nas.budgets or recipe.budgets
    limits = largest.costs.resolve([settings.budget for settings in own])
    if recipe.nas.budgets:
        return limits
    reach = [free.smallest]
    if "prune" in recipe.stages:
        channels = channel_problem(
            largest.model, largest.traced, None, settings=recipe.prune, costs=largest.costs
        )
        reach.append(channels.smallest)
    if "quantise" in recipe.stages:
        reach.append(bit_problem_of(largest, recipe).smallest)
    return tuple(
        replace(
            limit,
            limit=share_for_first(
                limit.limit,
                start=free.largest[limit.metric],
                smallest=[cost[limit.metric] for cost in reach],
            ),
        )
        for limit in limits
    )
