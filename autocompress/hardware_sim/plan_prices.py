"""Prices of plans over the choices of a search's knobs: looked up where layers add up, computed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Cost, CostModel, Metric
from autocompress.core.graph import Bits, LayerGraph
from autocompress.core.plan import Plan
from autocompress.core.problem import Knob
from autocompress.hardware_sim.choice_tables import Choices
from autocompress.hardware_sim.layerwise import LayerwiseModel
from autocompress.hardware_sim.table import Floats, Ints

MAX_ENTRIES = 4_000_000
"""Costs of layers that are tabulated at most; with more, plans are priced by formula."""


class PlanPricer:
    """What plans cost, quickly: a ``Problem.price`` for searches.

    Each layer is priced once for every combination of widths and bits that its knobs allow. A plan's totals
    then combine table entries and equal what the model says of the plan's graph. The model itself is asked
    for plans outside the knobs' choices, for layers that it refuses, where it does not add up over layers
    (``additive`` is false), and for knobs with more than :data:`MAX_ENTRIES` combinations.

    Args:
        model: prices graphs.
        graph: the uncompressed network.
        knobs: of kinds ``channels``, ``weight_bits`` and ``act_bits``.

    Attributes:
        looks_up: whether there are tables.
        num_entries: costs in them.

    Raises:
        ValueError: an architecture knob, whose choices are different graphs; a knob for a group or layer the
            graph lacks, or for a later call of a reused layer. All faults at once.

    Example:
        >>> from autocompress.core import LayerSpec
        >>> from autocompress.hardware_sim import MacsModel
        >>> graph = LayerGraph((LayerSpec("fc", "linear", 64, 10),))
        >>> price = PlanPricer(MacsModel(), graph, [Knob("weight_bits", "fc", (4, 8))])
        >>> price(Plan(bits={"fc": Bits(4)}))["weight_bytes"]
        320.0
    """

    def __init__(self, model: CostModel, graph: LayerGraph, knobs: Sequence[Knob]) -> None:
        if faults := _faults(graph, knobs):
            raise ValueError("; ".join(faults))
        self._model, self._graph, self._knobs = model, graph, tuple(knobs)
        self._tables = None
        if isinstance(model, LayerwiseModel):
            self._tables = model.tables(graph, _choices(graph, knobs), max_entries=MAX_ENTRIES)
        self.looks_up = self._tables is not None
        self.num_entries = 0 if self._tables is None else self._tables.num_entries

    def __call__(self, plan: Plan) -> Cost:
        """The totals of one plan, without shares of layers.

        Raises:
            ValueError: the plan does not fit the graph.
            UnsupportedLayerError: layers that the model refuses, by name.
        """
        if self._tables is not None and isinstance(self._model, LayerwiseModel):
            try:
                totals = self._model.combined(*self._tables.of_plan(plan))
            except KeyError:  # the plan leaves the tables
                totals = {}
            found = {metric: float(values[0]) for metric, values in totals.items()}
            if found and not any(map(math.isnan, found.values())):
                return Cost(found)
        return Cost(self._model(plan.apply(self._graph)).totals)

    def price_choices(self, choices: NDArray[np.integer[Any]]) -> dict[Metric, Floats]:
        """Totals of P plans, shape (P,).

        Args:
            choices: number of the choice of every knob, from 0, shape (P, knobs).

        Raises:
            ValueError: another shape, or a number without a choice.
            UnsupportedLayerError: layers that the model refuses, by name.
        """
        counts = np.array([len(knob.choices) for knob in self._knobs])
        if choices.ndim != 2 or choices.shape[1] != len(counts):
            raise ValueError(f"choices must have shape (plans, {len(counts)}), got {choices.shape}")
        if ((choices < 0) | (choices >= counts)).any():
            raise ValueError("choices are numbers from 0 to below the number of each knob's choices")
        given = self._values(choices)
        if not isinstance(self._model, LayerwiseModel):
            costs = [self(plan) for plan in _plans(given)]
            return {m: np.array([cost[m] for cost in costs]) for m in (costs[0].totals if costs else ())}
        if self._tables is not None:
            totals = self._model.looked_up(self._graph, self._tables, given)
            if not any(np.isnan(values).any() for values in totals.values()):
                return totals
        return self._model.price_plans(self._graph, **given)

    def _values(self, choices: NDArray[np.integer[Any]]) -> dict[str, dict[str, Ints]]:
        """Arguments of :meth:`.LayerwiseModel.price_plans`."""
        given: dict[str, dict[str, Ints]] = {"sizes": {}, "weight_bits": {}, "act_bits": {}}
        for number, knob in enumerate(self._knobs):
            values = np.array(knob.choices, dtype=np.int64).take(choices[:, number])
            given["sizes" if knob.kind == "channels" else knob.kind][knob.name] = values
        for side, other in (("weight_bits", "act_bits"), ("act_bits", "weight_bits")):
            for name in given[other].keys() - given[side].keys():
                # A plan with bits for one side of a layer leaves the other in floating point.
                given[side][name] = np.full(len(choices), getattr(Bits(), side.removesuffix("_bits")))
        return given


def _plans(given: Mapping[str, Mapping[str, Ints]]) -> list[Plan]:
    """The plans that arrays of sizes and bits are."""
    num_plans = next(len(values) for group in given.values() for values in group.values())
    return [
        Plan(
            channels={name: int(values[p]) for name, values in given["sizes"].items()},
            bits={
                name: Bits(int(values[p]), int(given["act_bits"][name][p]))
                for name, values in given["weight_bits"].items()
            },
        )
        for p in range(num_plans)
    ]


def _choices(graph: LayerGraph, knobs: Sequence[Knob]) -> Choices:
    """What plans of the knobs can set, and what the graph has where a plan does not name a knob."""
    found: dict[str, dict[str, set[int]]] = {"channels": {}, "weight_bits": {}, "act_bits": {}}
    for knob in knobs:
        found[knob.kind][knob.name] = {int(choice) for choice in knob.choices}
    for name, sizes in found["channels"].items():
        sizes.add(graph.sizes[name])
    own = {layer.name: layer.bits for layer in graph.layers}
    for name in {**found["weight_bits"], **found["act_bits"]}:
        for side in ("weight", "act"):
            # A plan with bits for one side of a layer leaves the other in floating point.
            bits = found[f"{side}_bits"].setdefault(name, {getattr(Bits(), side)})
            bits.add(getattr(own[name], side))
    arrays = [{name: np.array(sorted(v)) for name, v in group.items()} for group in found.values()]
    return Choices(*arrays)


def _faults(graph: LayerGraph, knobs: Sequence[Knob]) -> list[str]:
    """What is wrong with the knobs."""
    first_calls = {layer.name for layer in graph.layers if layer.reuses is None}
    faults = []
    for knob in knobs:
        if knob.kind == "arch":
            faults.append(
                f"knob {knob.name!r} chooses an architecture, which is another graph; price each with its own"
            )
        elif knob.kind == "channels":
            faults += _size_faults(graph, knob)
        elif knob.name not in first_calls:
            faults.append(f"knob {knob.name!r}: no such layer, or a later call, which has the first's bits")
    return faults


def _size_faults(graph: LayerGraph, knob: Knob) -> list[str]:
    if knob.name not in graph.sizes:
        return [f"knob {knob.name!r}: no such channel group"]
    size, locked = graph.sizes[knob.name], graph.group(knob.name).locked
    least = 1 if locked is None else size
    if all(least <= int(choice) <= size for choice in knob.choices):
        return []
    reason = "" if locked is None else f" ({locked})"
    return [f"knob {knob.name!r}: sizes must be from {least} to {size}{reason}, got {knob.choices}"]
