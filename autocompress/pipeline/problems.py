"""What each stage of a recipe searches, within which budgets, and who searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autocompress.agents import least_plans, make_search
from autocompress.core import Budget, Plan, Problem, Search
from autocompress.core.errors import RecipeError
from autocompress.core.wording import did_you_mean
from autocompress.nas import PredictorSearch
from autocompress.pipeline.bit_score import BitScore, bit_problem
from autocompress.pipeline.costs import Costs, share_for_first
from autocompress.pipeline.quick_score import QuickScore, channel_problem
from autocompress.pipeline.recipe import Recipe, SearchSettings, Stage
from autocompress.trace import Trace
from autocompress.training import TrainSettings


@dataclass(frozen=True)
class Candidate:
    """A network that may be compressed, what tracing found, and what its plans cost."""

    name: str
    model: nn.Module
    traced: Trace
    costs: Costs


def channel_problem_of(candidate: Candidate, recipe: Recipe, score: QuickScore | None = None) -> Problem:
    """What stage prune searches; without a score it is enough to know what is reachable."""
    problem = channel_problem(
        candidate.model, candidate.traced, score, settings=recipe.prune, costs=candidate.costs
    )
    return replace(problem, budgets=_channel_budgets(candidate, recipe, problem))


def _channel_budgets(candidate: Candidate, recipe: Recipe, problem: Problem) -> tuple[Budget, ...]:
    costs, budgets = candidate.costs, recipe.prune.budgets or recipe.budgets
    limits = costs.resolve([settings.budget for settings in budgets])
    if recipe.prune.budgets or "quantise" not in recipe.stages:
        return limits
    start, few_channels = costs(Plan()), problem.smallest
    few_bits = bit_problem_of(candidate, recipe).smallest
    return tuple(
        replace(
            limit,
            limit=share_for_first(
                limit.limit,
                start=start[limit.metric],
                smallest=[few_channels[limit.metric], few_bits[limit.metric]],
            ),
        )
        for limit in limits
    )


def bit_problem_of(
    candidate: Candidate, recipe: Recipe, score: BitScore | None = None, *, pruned: Plan | None = None
) -> Problem:
    """What stage quantise searches, after a plan of channels; without a score as above."""
    return bit_problem(
        candidate.traced.graph,
        score,
        settings=recipe.quantise,
        costs=candidate.costs,
        budgets=[settings.budget for settings in recipe.budgets],
        pruned=pruned,
        training=TrainSettings(**recipe.qat.model_dump()) if "qat" in recipe.stages else None,
    )


def problems_of(candidate: Candidate, recipe: Recipe) -> dict[Stage, Problem]:
    """The problems of a recipe's stages without scores, each as if the one before had left the least.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets; names the layers that hold the cost up.
        RecipeError: nothing can be decided, or the target cannot run the network.
    """
    problems: dict[Stage, Problem] = {}
    pruned = None
    if "prune" in recipe.stages:
        problems["prune"] = problem = channel_problem_of(candidate, recipe)
        problem.reachable()
        pruned = problem.plan([knob.choices[0] for knob in problem.knobs])
    if "quantise" in recipe.stages:
        problems["quantise"] = bit_problem_of(candidate, recipe, pruned=pruned)
        problems["quantise"].reachable()
    return problems


def searches_of(recipe: Recipe) -> dict[Stage, SearchSettings]:
    """Who searches in each stage that does."""
    settings: dict[Stage, SearchSettings] = {
        ("nas" if recipe.is_joint else "prune"): recipe.search,
        "quantise": recipe.quantise.search,
    }
    return {stage: chosen for stage, chosen in settings.items() if stage in recipe.stages}


def check_num_plans(recipe: Recipe, problems: Mapping[Stage, Problem]) -> None:
    """Refuse searches that cannot work with so few plans.

    Raises:
        RecipeError: names each of them.
    """
    faults = []
    for stage, settings in searches_of(recipe).items():
        key = "search" if stage == "prune" else f"{stage}.search"
        num_knobs = len(problems[stage].knobs)
        for name, search in made_searches(settings).items():
            least = least_plans(search, num_knobs)
            if settings.num_plans < least:
                faults.append(
                    f"{key}.num_plans: {name} needs at least {least} for {num_knobs} knobs of stage "
                    f"{stage}, got {settings.num_plans}"
                )
    if faults:
        raise RecipeError(faults)


def made_searches(settings: SearchSettings) -> dict[str, Search]:
    """The searches of one stage by name, the algorithm first.

    Raises:
        RecipeError: a setting that the algorithm does not have.
    """
    searches = {str(settings.algorithm): _made(settings.algorithm, settings.settings)}
    return searches | {name: _made(name, {}) for name in settings.baselines}


def _made(name: str, settings: Mapping[str, Any]) -> Search:
    if name != "predictor":
        return make_search(name, settings)
    known = ("float_share", "sample_share", "rounds", "num_predicted")
    if unknown := [key for key in settings if key not in known]:
        raise RecipeError(
            [
                f"search predictor has no setting {key!r}"
                f"{did_you_mean(key, known) or '; known are ' + ', '.join(known)}"
                for key in unknown
            ]
        )
    return PredictorSearch(**settings)
