"""Architecture, channels and bits in one search: what a recipe chooses among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autocompress.core import Plan
from autocompress.core.errors import RecipeError
from autocompress.hardware_sim import UnsupportedLayerError
from autocompress.nas import (
    ElasticSupernet,
    JointProblem,
    JointScore,
    JointScoreSettings,
    JointSpace,
    joint_problem,
)
from autocompress.nas.spaces import MBConvChain
from autocompress.pipeline.architectures import space_of
from autocompress.pipeline.bit_score import quant_settings
from autocompress.pipeline.costs import Costs, channel_step
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.recipe import Recipe
from autocompress.trace import trace
from autocompress.training import Data


@dataclass(frozen=True)
class JointArchitectures:
    """A joint space as a recipe sees it.

    Args:
        joint: the space.
        problem: prices plans within the recipe's budgets; it cannot score.
        largest: the member that relative budgets refer to.
    """

    joint: JointSpace
    problem: JointProblem
    largest: Candidate

    def candidate(self, plan: Plan, recipe: Recipe) -> Candidate:
        """The network of a plan's architecture and channels, with fresh weights."""
        return _member(self.joint, plan, recipe, original=self.largest)


def joint_space_of(recipe: Recipe, input_shape: Sequence[int], num_classes: int) -> JointSpace:
    """The joint space of a recipe, for images and classes.

    Raises:
        RecipeError: the space is no chain of inverted residuals, or a setting is out of range.
    """
    space = space_of(recipe.nas, input_shape, num_classes)
    if not isinstance(space, MBConvChain):
        raise RecipeError(
            f"nas.space: channels of {space.name} cannot be searched jointly; take mbconv_chain"
        )
    widest = replace(space, expansions=space.expansions[-1:])
    quantise, bits = recipe.quantise, "bits" in recipe.search.knobs
    if bits and not quantise.act_bits:
        raise RecipeError("quantise.act_bits: a joint search needs bits of activations as well, got none")
    return JointSpace(
        widest,
        round_to=recipe.prune.round_to or channel_step(None),
        weight_bits=quantise.weight_bits if bits else (8,),
        act_bits=quantise.act_bits if bits else (8,),
        first_last=quantise.first_last,
    )


def joint_architectures_of(recipe: Recipe, data: Data) -> JointArchitectures:
    """The joint space of a recipe, priced, within its budgets.

    Raises:
        InfeasibleBudgetError: the smallest plan of all is over budget.
        RecipeError: see :func:`joint_space_of`, or the target cannot run the networks.
    """
    joint = joint_space_of(recipe, data.input_shape, data.num_classes)
    largest = _member(joint, joint.largest, recipe)
    target = largest.costs.target
    budgets = largest.costs.resolve([settings.budget for settings in recipe.budgets])

    def not_scored(plan: Plan) -> float:
        raise NotImplementedError

    try:
        problem = joint_problem(
            joint,
            target,
            budgets,
            evaluate=not_scored,
            decide=recipe.search.knobs,
            fixed=_fixed(joint, recipe),
        )
        problem.reachable()
    except UnsupportedLayerError as fault:
        raise RecipeError(
            f"target {target.name if target else ''} cannot run the networks of {joint.space.name}: {fault}. "
            "Where that is for want of integers, let bits be decided as well."
        ) from fault
    return JointArchitectures(joint, problem, largest)


def _fixed(joint: JointSpace, recipe: Recipe) -> Plan:
    """What no knob decides: bits where they are not searched."""
    if "bits" in recipe.search.knobs or recipe.bits is None:
        return Plan()
    return Plan(bits=dict.fromkeys(joint.reference.bits, recipe.bits.bits))


def joint_score(recipe: Recipe, data: Data, supernet: ElasticSupernet) -> JointScore:
    """How a recipe scores joint plans with the weights of a supernet."""
    settings = JointScoreSettings(
        calibration_images=min(recipe.quantise.calibration_images, len(data.train)),
        score_images=recipe.quantise.score_images,
        score=recipe.quantise.score,
        quant=quant_settings(recipe.quantise),
    )
    return JointScore(supernet, data, seed=recipe.seed, settings=settings)


def _member(joint: JointSpace, plan: Plan, recipe: Recipe, *, original: Candidate | None = None) -> Candidate:
    model = joint.build(Plan(plan.arch, plan.channels), seed=recipe.seed)
    traced = trace(model, joint.space.input_shape)
    graph = original.traced.graph if original else None
    costs = Costs.of(recipe, traced.graph, original=graph)
    return Candidate(joint.space.name, model.to(recipe.device), traced, costs)
