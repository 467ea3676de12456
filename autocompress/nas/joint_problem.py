"""The problem of finding architecture, channels and bits together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from autocompress.core import Budget, CostModel, Plan, Problem, Value
from autocompress.hardware_sim import MacsModel
from autocompress.nas.joint import PARTS, JointSpace, Part
from autocompress.nas.joint_price import JointPricer


@dataclass(frozen=True)
class JointProblem(Problem):
    """A problem whose plans name only what their own architecture has.

    This is the one place where choices of a skipped block are dropped: prices, scores, ledgers and whoever
    builds the network see plans that fit their member, and assignments that make equal networks give equal
    plans.

    Args:
        effective: a plan of any choices -> the plan of equal effect.
    """

    effective: Callable[[Plan], Plan] = field(kw_only=True)

    def plan(self, values: Sequence[Value]) -> Plan:
        """As :meth:`Problem.plan`, without what has no effect."""
        return self.effective(super().plan(values))


def joint_problem(
    joint: JointSpace,
    target: CostModel | None,
    budgets: Sequence[Budget],
    *,
    evaluate: Callable[[Plan], float],
    identity: str = "",
    decide: Sequence[Part] = PARTS,
    fixed: Plan | None = None,
) -> JointProblem:
    """The problem of a joint space on a machine; counts (MACs, bytes, ...) are priced beside it.

    Serves any search. One supernet and one predictor serve any number of such problems: another target or
    another budget is another problem and nothing else.

    Args:
        joint: the space.
        target: the machine; None to count only.
        budgets: relative ones refer to the largest member at the space's reference bits.
        evaluate: plan -> score, such as a :class:`~autocompress.nas.JointScore` or an
            :class:`~autocompress.nas.AccuracyPredictor`.
        identity: text that tells the scores and the target from others; see ``Problem``.
        decide: what is searched; the rest stays as ``fixed`` says.
        fixed: choices made before; where it names nothing, a plan has the largest member's operations and
            widths and the reference bits. What it names and ``decide`` searches is searched again.

    Raises:
        RecipeError: nothing to decide.
        UnsupportedLayerError: the target cannot run the largest member at the reference bits.
        ValueError: ``fixed`` names what no member has.

    Example:
        >>> from autocompress.hardware_sim import load_target
        >>> from autocompress.nas import joint_chain
        >>> joint = joint_chain((1, 8, 8), 10)
        >>> target, budget = load_target("bitfusion"), Budget("latency_ms", 0.4)
        >>> problem = joint_problem(joint, target, [budget], evaluate=lambda plan: 0.0)
        >>> values = problem.bounded([knob.choices[-1] for knob in problem.knobs])
        >>> problem.meets_budgets(problem.price(problem.plan(values)))
        True
    """
    price = JointPricer(joint, [MacsModel()] if target is None else [MacsModel(), target])
    reference = price(joint.reference)
    fixed = fixed or Plan()
    base = replace(
        joint.reference,
        arch={**joint.reference.arch, **fixed.arch},
        channels={**joint.reference.channels, **fixed.channels},
        bits={**joint.reference.bits, **fixed.bits},
    )
    price(joint.effective(base))  # refuses names and sizes that no member has
    knobs = joint.knobs(decide)
    if "arch" not in decide:  # then what is skipped stays skipped, and leaves nothing to decide
        there = joint.effective(base)
        knobs = tuple(k for k in knobs if k.name in there.channels or there.bits.keys() & set(k.bit_layers))
    return JointProblem(
        knobs=knobs,
        budgets=tuple(budget.resolve(reference) for budget in budgets),
        price=price,
        evaluate=evaluate,
        identity=identity,
        base=base,
        effective=joint.effective,
    )
