"""What plans cost: what can be counted and, beside it, the figures of the recipe's target."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autocompress.core import Bits, Budget, Cost, CostModel, Knob, LayerGraph, Metric, Plan
from autocompress.core.errors import RecipeError
from autocompress.hardware_sim import HardwareModel, MacsModel, PlanPricer, UnsupportedLayerError, load_target
from autocompress.hardware_sim.lookup import Lookup
from autocompress.pipeline.recipe import Recipe

_BITS = "bits: {weight: 8, act: 8}"
_NOTHING = Plan()


class Counted:
    """A cost model of what can be counted and, beside it, of a target's figures.

    Args:
        target: the machine; None to count only.
    """

    def __init__(self, target: HardwareModel | None = None) -> None:
        self.target = target
        self.name = target.name if target else MacsModel.name

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What it prices."""
        return tuple(dict.fromkeys((*MacsModel.metrics, *(self.target.metrics if self.target else ()))))

    def __call__(self, graph: LayerGraph) -> Cost:
        """The cost of one sample.

        Raises:
            UnsupportedLayerError: the target cannot run the network.
        """
        counts = MacsModel()(graph)
        if self.target is None:
            return counts
        figures = self.target(graph)
        layers: dict[str, Mapping[Metric, float]] = {
            name: {**cost, **figures.layers.get(name, {})} for name, cost in counts.layers.items()
        }
        return Cost({**counts.totals, **figures.totals}, layers)

    def price_many(self, graphs: Sequence[LayerGraph]) -> dict[Metric, NDArray[np.float64]]:
        """Totals of many graphs: metric -> array of shape (len(graphs),)."""
        counts = MacsModel().price_many(graphs)
        return {**counts, **self.target.price_many(graphs)} if self.target else counts


class Costs:
    """Prices plans of one network: counts, and a target's figures.

    Args:
        graph: the uncompressed network.
        target: the machine; None to count only.
        bits: of the layers whose bits no plan decides; None for floating point.
        reference_bits: of the network that relative budgets refer to; None for floating point.
        original: the network that relative budgets refer to; ``graph`` when absent.
    """

    def __init__(
        self,
        graph: LayerGraph,
        target: HardwareModel | None = None,
        *,
        bits: Bits | None = None,
        reference_bits: Bits | None = None,
        original: LayerGraph | None = None,
    ) -> None:
        self.target, self.bits = target, bits
        self.graph = _at(graph, bits)
        self._reference = _at(graph, reference_bits)
        self._original = self._reference if original is None else _at(original, reference_bits)

    @classmethod
    def of(cls, recipe: Recipe, graph: LayerGraph, *, original: LayerGraph | None = None) -> Costs:
        """The costs a recipe is about, of one of its networks.

        Raises:
            TargetError: the target's file is gone or wrong.
        """
        reference = Bits(*[recipe.reference_bits] * 2) if recipe.reference_bits else None
        if reference is None and recipe.bits:
            reference = recipe.bits.bits
        target = load_target(recipe.target) if recipe.target else None
        return cls(graph, target, bits=bits_of(recipe), reference_bits=reference, original=original)

    def on(self, target: HardwareModel) -> Costs:
        """The same network's costs on another machine."""
        made = copy.copy(self)
        made.target = target
        for cached in ("reference", "original", "identity"):
            made.__dict__.pop(cached, None)
        return made

    def __call__(self, plan: Plan) -> Cost:
        """The cost of a plan, with the share of each layer.

        Raises:
            RecipeError: the target cannot run the network; names the layers and the way out.
        """
        try:
            return Counted(self.target)(plan.apply(self.graph))
        except UnsupportedLayerError as fault:
            raise self._refused(fault, _BITS) from fault

    def tabulated(self, knobs: Sequence[Knob], base: Plan = _NOTHING) -> Callable[[Plan], Cost]:
        """The same prices, quickly, for plans of some knobs; shares of layers are computed when asked for.

        Args:
            knobs: decisions that differ from plan to plan.
            base: what every plan holds beside them.

        Raises:
            RecipeError: the target cannot run the network; names the layers and the way out.
        """
        graph = base.apply(self.graph)
        single = [replace(k, name=name, layers=()) for k in knobs for name in k.bit_layers or (k.name,)]
        models: list[CostModel] = [MacsModel()]
        if self.target:
            models.append(self.target)
        try:
            pricers = [PlanPricer(model, graph, single) for model in models]
        except UnsupportedLayerError as fault:
            raise self._refused(fault, _BITS) from fault
        decided = {knob.name for knob in single}

        def price(plan: Plan) -> Cost:
            # What every plan holds is in the graph already; naming it again would miss the tables.
            own = Plan(
                channels={name: size for name, size in plan.channels.items() if name in decided},
                bits={name: bits for name, bits in plan.bits.items() if name in decided},
            )
            try:
                totals = {metric: v for pricer in pricers for metric, v in pricer(own).totals.items()}
            except UnsupportedLayerError as fault:
                raise self._refused(fault, _BITS) from fault
            return Cost(totals, _Later(lambda: self(plan).layers))

        return price

    @cached_property
    def reference(self) -> Cost:
        """What the uncompressed network costs at ``reference_bits``, as far as the target can run that."""
        return self._as_far_as_possible(self._reference)

    @cached_property
    def original(self) -> Cost:
        """The same of the network that relative budgets refer to."""
        return self._as_far_as_possible(self._original)

    def _as_far_as_possible(self, graph: LayerGraph) -> Cost:
        try:
            return Counted(self.target)(graph)
        except UnsupportedLayerError:
            return Counted()(graph)

    def resolve(self, budgets: Sequence[Budget]) -> tuple[Budget, ...]:
        """Absolute budgets.

        Raises:
            RecipeError: a budget is a share of what the target cannot run.
        """
        for budget in budgets:
            if budget.relative and budget.metric not in self.original.totals and self.target:
                try:
                    self.target(self._original)
                except UnsupportedLayerError as fault:
                    setting = _BITS if self._original is self.graph else "reference_bits: 8"
                    raise self._refused(fault, setting) from fault
        return tuple(budget.resolve(self.original) for budget in budgets)

    def _refused(self, fault: UnsupportedLayerError, setting: str) -> RecipeError:
        assert self.target is not None
        return RecipeError(
            f"target {self.target.name} cannot run this network: {fault}. Where that is for want of "
            f"integers, set {setting} in the recipe."
        )

    @cached_property
    def identity(self) -> str:
        """Text that tells these costs from others: the target by its content, and the bits."""
        bits = sorted({(layer.bits.weight, layer.bits.act) for layer in self.graph.layers})
        return f"{content_digest(self.target) if self.target else ''} {bits}"


class _Later(Mapping[str, Mapping[Metric, float]]):
    """A mapping that is computed when it is first looked into."""

    def __init__(self, compute: Callable[[], Mapping[str, Mapping[Metric, float]]]) -> None:
        self._compute = compute

    @cached_property
    def _known(self) -> Mapping[str, Mapping[Metric, float]]:
        return self._compute()

    def __getitem__(self, name: str) -> Mapping[Metric, float]:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def bits_of(recipe: Recipe) -> Bits | None:
    """What layers are computed with where no stage decides that; None for floating point."""
    if recipe.bits is not None:
        return recipe.bits.bits
    quantised = "quantise" in recipe.stages or "bits" in recipe.search.knobs
    return recipe.quantise.reference if quantised else None


def share_for_first(limit: float, *, start: float, smallest: Sequence[float]) -> float:
    """The limit of the first of several stages: each goes equally far into its own range.

    In logarithms, as what the stages do multiplies: a stage that can cut the cost to a tenth takes a larger
    part than one that can only halve it.

    Args:
        limit: what the network may cost in the end.
        start: its cost before the first stage.
        smallest: what each stage alone can bring that down to, the first stage first; stages that cannot
            make it cheaper get nothing.
    """
    ranges = [min(math.log(cost / start), 0.0) for cost in smallest]
    if not any(ranges[1:]):
        return limit
    part = math.log(limit / start) / sum(ranges)
    return start * math.exp(ranges[0] * min(max(part, 0.0), 1.0))


def channel_step(target: HardwareModel | None) -> int:
    """Channels that a machine works on at once; a usual number where there is none."""
    return (target or HardwareModel).channel_step


def content_digest(target: HardwareModel) -> str:
    """Hash of what a target's prices depend on: its model, its constants and the table it looks up."""
    values = {field.name: getattr(target, field.name) for field in fields(target)}  # type: ignore[arg-type]
    if isinstance(target, Lookup):
        values["table"] = hashlib.sha256(Path(target.table).read_bytes()).hexdigest()
    return hashlib.sha256(repr((target.kind, sorted(values.items()))).encode()).hexdigest()[:16]


def _at(graph: LayerGraph, bits: Bits | None) -> LayerGraph:
    return graph.with_bits({layer.name: bits for layer in graph.layers}) if bits else graph
