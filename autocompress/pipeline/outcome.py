"""What came of a run: its figures, and each layer before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from autocompress.core import Cost, Plan, Result
from autocompress.hardware_sim import HardwareModel
from autocompress.pipeline.costs import content_digest
from autocompress.pipeline.export_stage import Exported
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.provenance import provenance
from autocompress.pipeline.stages import Run
from autocompress.trace import measure
from autocompress.training.evaluate import Scores


@dataclass(frozen=True)
class Step:
    """A network that some stage made.

    Args:
        stage: which; ``given`` for the network the run was started with.
        model: its network.
        plan: all that was done to the original by then.
    """

    stage: str
    model: nn.Module
    plan: Plan

    def figures(self, candidate: Candidate, scores: Scores) -> dict[str, Any]:
        """An entry of :attr:`autocompress.core.Result.chain`."""
        return {"stage": self.stage, "accuracy": scores.accuracy, **_figures(candidate.costs(self.plan))}


def outcome(
    run: Run,
    candidate: Candidate,
    plan: Plan,
    *,
    chain: Sequence[Mapping[str, Any]],
    alone: Mapping[str, Mapping[str, Any]],
    exported: Exported,
) -> Result:
    """The result of a run.

    Args:
        run: the run, its stages done.
        candidate: the network before.
        plan: all that was done to it.
        chain: the figures of every :class:`Step`.
        alone: those of stages that were run without the others.
        exported: the files and their figures.
    """
    recipe, data, costs = run.prepared.recipe, run.prepared.data, candidate.costs
    reached = costs(plan)
    between = {f"accuracy_before_{after['stage']}": step["accuracy"] for step, after in pairwise(chain[1:])}
    return Result(
        name=recipe.name,
        before={"accuracy": chain[0]["accuracy"], **_counts(costs.reference), **exported.before},
        after={"accuracy": chain[-1]["accuracy"], **between, **_counts(reached), **exported.after},
        plan=replace(plan, arch=run.decided.arch, channels={**run.decided.channels, **plan.channels}),
        budgets={b.metric: b.limit for b in costs.resolve([b.budget for b in recipe.budgets])},
        predicted={
            "original": _figures(costs.original),
            "before": _figures(costs.reference),
            "after": _figures(reached),
        },
        expected=recipe.expected.model_dump(exclude_none=True),
        search=dict(run.found),
        chain=[dict(step) for step in chain],
        alone={stage: dict(figures) for stage, figures in alone.items()},
        export=exported.parity,
        files=exported.files,
        provenance=provenance(recipe)
        | {"model": candidate.name, "data": data.name, "input_shape": list(data.input_shape)}
        | {"num_classes": data.num_classes}
        | _machine(costs.target),
        seconds=dict(run.seconds),
        run_dir=run.directory.path,
    )


def _figures(cost: Cost) -> dict[str, float]:
    return {str(metric): value for metric, value in cost.totals.items()}


def _counts(cost: Cost) -> dict[str, float]:
    return {"macs": cost["macs"], "params": cost["params"]}


def _machine(target: HardwareModel | None) -> dict[str, Any]:
    """What the predicted figures come from."""
    if target is None:
        return {}
    return {
        "target": {
            "name": target.name,
            "model": target.kind,
            "mapping": target.mapping,
            "energy_table": target.energy_table,
            "digest": content_digest(target),
        }
    }


def check_prediction(predicted: Cost, model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """What was promised is what is there: counted again on the network after pruning."""
    measured = measure(model, input_shape)
    for metric, value in measured.items():
        if value != predicted[metric]:  # type: ignore[index]
            raise AssertionError(f"predicted {metric} {predicted[metric]} but the network has {value}")  # type: ignore[index]


def layer_table(candidate: Candidate, plan: Plan) -> list[dict[str, Any]]:
    """Each layer before and after, as written to ``layers.json``."""
    before, costs = candidate.traced.graph, candidate.costs
    after = plan.apply(costs.graph)
    cost_before, cost_after = costs.reference.layers, costs(plan).layers
    group_of = {name: group for group in before.groups for name in group.producers}
    rows = []
    for old, new in zip(before.layers, after.layers, strict=True):
        group = group_of.get(old.reuses or old.name)
        rows.append(
            {
                "name": old.name,
                "kind": "depthwise" if old.is_depthwise else old.kind,
                "group": group.name if group else None,
                "locked": group.locked if group else "its channels belong to no group",
                "in_before": old.in_channels,
                "in_after": new.in_channels,
                "out_before": old.out_channels,
                "out_after": new.out_channels,
                "macs_before": old.macs,
                "macs_after": new.macs,
                "params_before": old.num_params,
                "params_after": new.num_params,
                "bits_after": [new.bits.weight, new.bits.act],
                "cost_before": dict(cost_before[old.name]),
                "cost_after": dict(cost_after[old.name]),
            }
        )
    return rows
