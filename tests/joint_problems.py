"""A small joint space, and scores of its plans that no network is needed for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from autocompress.core import Bits, Budget, Plan
from autocompress.hardware_sim import load_target
from autocompress.nas import JointProblem, JointSpace, joint_problem
from autocompress.nas.spaces import Layout, MBConvChain, Stage

LAYOUT = Layout(8, 1, 8, (Stage(8, 2, 1), Stage(16, 1, 2)), 16)
"""Three blocks: the first two can be skipped, the third halves the size."""


def tiny_space(bits: tuple[int, ...] = (4, 8)) -> JointSpace:
    """Kernels 3 and 5, hidden widths 8 to 32 of 8 channels."""
    chain = MBConvChain(LAYOUT, (1, 8, 8), 10, kernels=(3, 5), expansions=(4,))
    return JointSpace(chain, min_expand=1, weight_bits=bits, act_bits=bits)


def made_up_score(joint: JointSpace, seed: int) -> Callable[[Plan], float]:
    """A score in (0, 1): blocks gain by kernel times width, layers lose by four to the minus bits."""
    rng = np.random.default_rng(seed)
    gains = {
        b.name: dict(zip(b.operations, np.sort(rng.uniform(0, 1, 8)), strict=False)) for b in joint.blocks
    }
    slopes = {b.group: rng.uniform(0.3, 1.5) for b in joint.blocks}
    layers = [layer.name for layer in joint.graph(joint.largest).layers]
    losses = {name: rng.lognormal(0, 1) for name in layers}

    def score(plan: Plan) -> float:
        total = 0.0
        for block in joint.blocks:
            gain = gains[block.name][plan.arch[block.name]]
            width = plan.channels.get(block.group, 0)
            total += gain + slopes[block.group] * (0.5 + gain) * np.log2(1 + width / block.widths[-1])
        for name, bits in plan.bits.items():
            total -= 0.6 * losses[name] * (4.0 ** (2 - bits.weight) + 4.0 ** (2 - bits.act))
        return float(1 / (1 + np.exp(1.5 - total)))

    return score


def made_up_problem(
    target: str | None, *budgets: Budget, seed: int = 0, joint: JointSpace | None = None
) -> JointProblem:
    """The small space on a machine with a made-up score."""
    joint = joint or tiny_space()
    machine = load_target(target) if target else None
    return joint_problem(joint, machine, budgets, evaluate=made_up_score(joint, seed), identity=str(seed))


def few_knobs(problem: JointProblem) -> JointProblem:
    """Of each block the operation, the narrowest or widest group, and the bits of pointwise weights."""
    from dataclasses import replace

    knobs = []
    for knob in problem.knobs:
        if knob.kind == "channels":
            knobs.append(replace(knob, choices=(knob.choices[0], knob.choices[-1])))
        elif knob.kind == "arch" or (knob.kind == "weight_bits" and knob.name.endswith("pointwise")):
            knobs.append(knob)
    return replace(problem, knobs=tuple(knobs))


def wishes(problem: JointProblem, number: int, seed: int = 0) -> list[list[int | str]]:
    """Random assignments, whatever the budgets."""
    rng = np.random.default_rng(seed)
    return [[k.choices[int(rng.integers(len(k.choices)))] for k in problem.knobs] for _ in range(number)]


def at_bits(layers: Sequence[str], bits: int) -> dict[str, Bits]:
    """The same bits for some layers."""
    return dict.fromkeys(layers, Bits(bits, bits))
