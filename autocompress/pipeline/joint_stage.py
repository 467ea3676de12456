"""The stage that searches architecture, channels and bits together over one supernet."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from autocompress.core import Plan
from autocompress.core.errors import CheckpointError
from autocompress.nas import ElasticSupernet, fit_elastic
from autocompress.pipeline.architectures import CHECKPOINT, FOUND, supernet_file
from autocompress.pipeline.joint import JointArchitectures, joint_score
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.progress import Event
from autocompress.pipeline.search_stage import search_plan
from autocompress.pipeline.stages import Run
from autocompress.training import EpochReport, TrainSettings
from autocompress.zoo import named_tensors, read_safetensors


def search_jointly(run: Run, architectures: JointArchitectures) -> tuple[Candidate, Plan]:
    """The network that was found, with the supernet's weights, and the plan with its bits.

    A repeated call goes on where the last one stopped.
    """
    recipe, data = run.prepared.recipe, run.prepared.data
    with run.timed("nas"):
        supernet = _supernet(run, architectures)
        score = joint_score(recipe, data, supernet)
        problem = replace(
            architectures.problem,
            evaluate=score,
            evaluate_fully=partial(score, fully=True) if score.is_partial else None,
            identity=f"joint {score.identity} {architectures.largest.costs.identity}",
        )
        plan = search_plan(run, "nas", problem)
        candidate = architectures.candidate(plan, recipe)
        candidate.model.load_state_dict(score.member(plan).state_dict())
    joint = architectures.joint
    found = {
        "arch": dict(plan.arch),
        "space": joint.space.name,
        "decisions": {block.name: list(block.operations) for block in joint.blocks},
        "probabilities": {},
        "cost": dict(problem.price(plan).totals),
        "largest": dict(problem.largest.totals),
        "smallest": dict(problem.smallest.totals),
        "budgets": {budget.metric: budget.limit for budget in problem.budgets},
        "epochs": [],
    }
    run.directory.write_json(FOUND, found)
    return candidate, plan


def _supernet(run: Run, architectures: JointArchitectures) -> ElasticSupernet:
    """The trained supernet, or the one of another run."""
    recipe, nas = run.prepared.recipe, run.prepared.recipe.nas
    supernet = ElasticSupernet(architectures.joint, seed=recipe.seed)
    supernet.to(recipe.device)
    if (borrowed := supernet_file(nas)) is not None:
        _fill(supernet, borrowed)
        return supernet

    def on_epoch(report: EpochReport) -> None:
        figures = {"loss": f"{report.loss:.3f}", "largest": f"{report.search_accuracy:.2%}"}
        run.on_event(Event("nas", report.epoch + 1, nas.epochs, figures))

    settings = TrainSettings(
        epochs=nas.epochs,
        warmup_epochs=nas.warmup_epochs,
        batch_size=nas.batch_size,
        lr=nas.lr,
        weight_decay=nas.weight_decay,
        distill_weight=1.0,
        distill_temperature=1.0,
    )
    run.on_event(Event("nas", 0, nas.epochs))
    reports = fit_elastic(
        supernet,
        run.prepared.data,
        settings,
        seed=recipe.seed,
        checkpoint=run.directory.path / CHECKPOINT,
        on_epoch=on_epoch,
    )
    run.on_event(Event("nas", nas.epochs, nas.epochs))
    run.training["nas"] = [asdict(report) for report in reports]
    return supernet


def _fill(supernet: ElasticSupernet, path: Path) -> None:
    stored, _ = read_safetensors(path)
    tensors = named_tensors(supernet)
    for name, tensor in tensors.items():
        if f"model.{name}" not in stored or stored[f"model.{name}"].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is not of a joint search over this space: it lacks or alters {name}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[f"model.{name}"])
