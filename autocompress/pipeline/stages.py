"""The stages that train; each can be repeated after a kill and then goes on where it was."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from autocompress.agents import ALONE, Workers
from autocompress.core import Plan, Trial
from autocompress.hardware_sim import MacsModel
from autocompress.pipeline.bit_score import BitScore
from autocompress.pipeline.prepare import Prepared
from autocompress.pipeline.problems import Candidate
from autocompress.pipeline.progress import Event, OnEvent
from autocompress.pipeline.recipe import TrainStage
from autocompress.pipeline.run_directory import RunDirectory
from autocompress.quant import quantize
from autocompress.quant.kmeans import CodebookTables, share_weights
from autocompress.quant.qat import QatNetwork
from autocompress.training import EpochReport, TrainSettings, evaluate, fit


@dataclass
class Run:
    """One run at work: what it was given, where it writes, what it has learnt so far by stage.

    ``workers`` score batches of plans; ``decided`` is what stage nas found. Runs of a series share a
    ``ledger``, and ``earlier`` holds what their searches scored before: problem digest -> trials.
    """

    prepared: Prepared
    directory: RunDirectory
    on_event: OnEvent
    workers: Workers = ALONE
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    trials: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    decided: Plan = field(default_factory=Plan)
    ledger: Path | None = None
    earlier: Mapping[str, Sequence[Trial]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of a block to ``seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def train(run: Run) -> Candidate:
    """Train every candidate that needs it; the best on the search split goes on.

    Of equal accuracies, the one with fewer MACs wins.
    """
    recipe, data = run.prepared.recipe, run.prepared.data
    candidates = run.prepared.candidates
    if "train" in recipe.stages and recipe.weights is None:
        with run.timed("train"):
            for candidate in candidates:
                fit_stage(run, candidate.model, recipe.train, stage=f"train {candidate.name}", teacher=None)
    if len(candidates) == 1:
        return candidates[0]

    def rank(candidate: Candidate) -> tuple[float, float]:
        macs = MacsModel()(candidate.traced.graph)["macs"]
        return evaluate(candidate.model, data.search).accuracy, -macs

    return max(candidates, key=rank)


def fit_stage(
    run: Run, model: nn.Module, settings: TrainStage, *, stage: str, teacher: nn.Module | None
) -> None:
    """Train in place with a checkpoint in the run directory and progress events.

    Args:
        run: the run.
        model: changed.
        settings: of the training.
        stage: its name, one of a kind in the run.
        teacher: a network to learn from, where the settings say so.
    """
    total = settings.epochs

    def on_epoch(report: EpochReport) -> None:
        figures = {"loss": f"{report.loss:.3f}", "accuracy": f"{report.search_accuracy:.2%}"}
        run.on_event(Event(stage, report.epoch + 1, total, figures))

    run.on_event(Event(stage, 0, total))
    reports = fit(
        model,
        run.prepared.data,
        TrainSettings(**settings.model_dump()),
        seed=run.prepared.recipe.seed,
        teacher=teacher,
        checkpoint=run.directory.path / (re.sub(r"[^A-Za-z0-9._]+", "-", stage) + ".checkpoint"),
        on_epoch=on_epoch,
    )
    run.on_event(Event(stage, total, total))
    run.training[stage] = [asdict(report) for report in reports]
    run.directory.write_json("training.json", run.training)


def finetune(run: Run, candidate: Candidate, small: nn.Module) -> nn.Module:
    """A fine-tuned copy of the pruned network, taught by the original one."""
    recipe = run.prepared.recipe
    if "finetune" not in recipe.stages:
        return small
    tuned = copy.deepcopy(small)
    with run.timed("finetune"):
        fit_stage(run, tuned, recipe.finetune, stage="finetune", teacher=candidate.model)
    return tuned


def qat(run: Run, score: BitScore, plan: Plan, model: nn.Module) -> nn.Module:
    """The quantised network of a plan, trained where the recipe says so; the float one is the teacher.

    Args:
        run: the run.
        score: of plans of bits; what it calibrated makes the network.
        plan: with the bits of the layers.
        model: the float network.
    """
    recipe, tables = run.prepared.recipe, score.tables
    trains = "qat" in recipe.stages
    student, teacher = model, model
    if isinstance(tables, CodebookTables):
        student = share_weights(model, tables.codebooks(plan))
    elif trains:
        student = QatNetwork(tables, plan, score.training_images())
        teacher = tables.skeleton.graph_module
    else:
        return quantize(tables, plan).eval()
    if trains:
        with run.timed("qat"):
            fit_stage(run, student, recipe.qat, stage="qat", teacher=teacher)
    return student.brevitas() if isinstance(student, QatNetwork) else _plain(student).eval()


def _plain(shared: nn.Module) -> nn.Module:
    """The network with its shared values written out as weights, in place."""
    for module in shared.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return shared
