"""What the operations of a space cost on a machine, and the problems made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Bits, Budget, Cost, CostModel, Knob, LayerGraph, Metric, Plan, Problem
from autocompress.core.errors import InfeasibleBudgetError
from autocompress.hardware_sim import MacsModel
from autocompress.nas.spaces.operations import Place
from autocompress.nas.spaces.space import ABSENT, Arch, Space

_ADDS_UP = 1e-6


@dataclass(frozen=True)
class OperationCosts:
    """What every operation of every decision adds to a network's cost.

    Where a machine's cost is a sum over layers, a member costs ``fixed`` plus the entries of its operations.
    Two exceptions: operations that leave dead edges behind cost less, and where machines do not add up over
    layers the entries are differences to the largest member, an approximation.

    Args:
        metric: what is counted.
        table: decision -> cost of each operation, shape (operations,), in the metric's unit.
        fixed: cost of what is not searched.
    """

    metric: Metric
    table: Mapping[str, NDArray[np.float64]]
    fixed: float


def operation_costs(
    space: Space, model: CostModel, metric: Metric, *, bits: Bits | None = None
) -> OperationCosts:
    """The costs of a space's operations on a machine.

    Args:
        space: the networks.
        model: any cost model or target.
        metric: one of the model's that adds up or nearly does, such as ``latency_ms``.
        bits: of every layer, for machines that have no floating point.

    Raises:
        UnsupportedLayerError: the machine cannot run some operation.
        ValueError: the model does not give the metric.
    """
    # The last operation of every decision leaves nothing out, so no edge of the reference is dead.
    largest = {name: ops[-1] for name, ops in space.decisions.items()}
    reference = model(member_graph(space, largest, bits))
    if _is_sum(reference, metric):
        table = _shares(space, model, metric, bits)
    else:
        table = {}
        for name, ops in space.decisions.items():
            costs = [model(member_graph(space, {**largest, name: op}, bits))[metric] for op in ops]
            table[name] = np.array(costs) - costs[0]
    searched = sum(float(table[name][-1]) for name in largest)
    return OperationCosts(metric, table, reference[metric] - searched)


def _shares(
    space: Space, model: CostModel, metric: Metric, bits: Bits | None
) -> dict[str, NDArray[np.float64]]:
    """What the layers of each operation cost, from one network per number of an operation."""
    paths: dict[str, list[str]] = {name: [] for name in space.decisions}
    for place in space.places:
        paths[place.decision].append(place.path)
    table = {name: np.zeros(len(ops)) for name, ops in space.decisions.items()}
    for index in range(max(len(ops) for ops in space.decisions.values())):
        chosen = {name: min(index, len(ops) - 1) for name, ops in space.decisions.items()}
        arch = {name: ops[chosen[name]] for name, ops in space.decisions.items()}
        present = {name: op if op not in ABSENT else space.decisions[name][-1] for name, op in arch.items()}
        priced = model(member_graph(space, present, bits))
        for name, op in arch.items():
            if op not in ABSENT:
                table[name][chosen[name]] = _share(priced, metric, paths[name])
    return table


def member_graph(space: Space, arch: Arch, bits: Bits | None = None) -> LayerGraph:
    """A member's graph, with the same bits for every layer when they are given.

    Raises:
        RecipeError: not a member.
    """
    graph = space.graph(arch)
    return graph if bits is None else graph.with_bits({layer.name: bits for layer in graph.layers})


def _is_sum(cost: Cost, metric: Metric) -> bool:
    total = sum(layer.get(metric, 0.0) for layer in cost.layers.values())
    return abs(total - cost[metric]) <= _ADDS_UP * max(abs(cost[metric]), 1e-300)


def _share(cost: Cost, metric: Metric, paths: Sequence[str]) -> float:
    """What the layers under some modules cost together."""
    return sum(
        values.get(metric, 0.0)
        for name, values in cost.layers.items()
        if any(name == path or name.startswith(f"{path}.") for path in paths)
    )


def arch_knobs(
    space: Space, model: CostModel | None = None, metric: Metric = "macs", *, bits: Bits | None = None
) -> tuple[Knob, ...]:
    """One knob per decision, its operations in the order of their cost.

    Operations that cost alike keep the space's order, in which the ones that leave their place out come
    first. The features of a knob are the position of its first place in the network, its input and output
    channels, its input height and its stride, each as a share of the space's largest.

    Args:
        space: the networks.
        model: the machine whose costs order the operations; counts of MACs when absent.
        metric: by which they are ordered.
        bits: see :func:`operation_costs`.
    """
    costs = operation_costs(space, model or MacsModel(), metric, bits=bits)
    places: dict[str, Place] = {}
    for place in space.places:
        places.setdefault(place.decision, place)
    rows = np.array(
        [
            (index, place.in_channels, place.out_channels, place.hw[0], place.stride - 1)
            for index, place in enumerate(places.values())
        ],
        dtype=float,
    )
    largest = np.maximum(rows.max(axis=0), 1e-12)
    return tuple(
        Knob(
            "arch",
            name,
            tuple(space.decisions[name][i] for i in np.argsort(costs.table[name], kind="stable")),
            tuple(float(v) for v in row / largest),
        )
        for name, row in zip(places, rows, strict=True)
    )


def arch_problem(
    space: Space,
    model: CostModel,
    budgets: Sequence[Budget],
    *,
    evaluate: Callable[[Plan], float],
    identity: str = "",
    bits: Bits | None = None,
    order: Metric | None = None,
) -> Problem:
    """The problem of finding a space's best member within some budgets.

    Knobs are ordered by the metric of the first budget, or ``order``. Where a machine's costs do not follow
    that order for every member, ``Problem.clip`` still gives a feasible choice, but not always the largest.

    Args:
        space: the networks.
        model: prices them.
        budgets: relative ones refer to the largest member.
        evaluate: plan -> score, higher is better.
        identity: see :class:`~autocompress.core.Problem`.
        bits: at which members are priced, for machines that have no floating point; a plan's own go first.
        order: metric by which operations are ordered.

    Raises:
        InfeasibleBudgetError: the smallest member is over a budget.
    """
    by = order or (budgets[0].metric if budgets else model.metrics[0])
    knobs = arch_knobs(space, model, by, bits=bits)
    prices: dict[Plan, Cost] = {}

    def price(plan: Plan) -> Cost:
        if plan not in prices:
            prices[plan] = Cost(model(plan.apply(member_graph(space, plan.arch, bits))).totals)
        return prices[plan]

    largest = price(Plan({knob.name: str(knob.choices[-1]) for knob in knobs}))
    resolved = tuple(budget.resolve(largest) for budget in budgets)
    smallest = price(Plan({knob.name: str(knob.choices[0]) for knob in knobs}))
    broken = [
        f"{b} cannot be met: the smallest member of {space.name} needs {smallest[b.metric]:,.6g}"
        for b in resolved
        if not b.met_by(smallest)
    ]
    if broken:
        raise InfeasibleBudgetError(
            "; ".join(broken) + ". Raise the limit, or take a space with narrower or fewer stages."
        )
    return Problem(knobs, resolved, price, evaluate, identity)


def arch_price(costs: OperationCosts, space: Space, arch: Arch) -> float:
    """A member's cost by the table of its operations."""
    chosen = (costs.table[name][ops.index(arch[name])] for name, ops in space.decisions.items())
    return costs.fixed + float(sum(chosen))
