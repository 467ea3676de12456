"""The stages of a run; each can be repeated after a kill and then goes on where it was."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from autocompress.agents import make_search
from autocompress.core import Ledger, Plan, Problem, SearchResult, Trial
from autocompress.export import check_parity, export_onnx, measure_latency
from autocompress.hardware_sim import MacsModel
from autocompress.pipeline.prepare import Candidate, Prepared, problem_of
from autocompress.pipeline.progress import Event, OnEvent
from autocompress.pipeline.quick_score import QuickScore
from autocompress.pipeline.recipe import FinetuneStage, TrainStage
from autocompress.pipeline.run_directory import RunDirectory
from autocompress.training import EpochReport, TrainSettings, batches, evaluate, fit
from autocompress.zoo import save_weights


@dataclass
class Run:
    """One run at work: what it was given, where it writes, what it has learnt so far."""

    prepared: Prepared
    directory: RunDirectory
    on_event: OnEvent
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

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
                _fit(run, candidate.model, recipe.train, stage=f"train {candidate.name}", teacher=None)
    if len(candidates) == 1:
        return candidates[0]

    def rank(candidate: Candidate) -> tuple[float, float]:
        macs = MacsModel()(candidate.traced.graph)["macs"]
        return evaluate(candidate.model, data.search).accuracy, -macs

    return max(candidates, key=rank)


def _fit(
    run: Run, model: nn.Module, settings: TrainStage | FinetuneStage, *, stage: str, teacher: nn.Module | None
) -> None:
    """Train in place with a checkpoint in the run directory and progress events."""
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


@dataclass(frozen=True)
class Found:
    """What the search stage hands on."""

    plan: Plan
    score: QuickScore
    figures: Mapping[str, Any]


def search(run: Run, candidate: Candidate) -> Found:
    """Search for the plan, and run the baselines with as many plans; the best plan of all is used.

    Every evaluated plan is in the ledger before the next begins, so a repeated call fast-forwards.
    """
    recipe = run.prepared.recipe
    results: dict[str, SearchResult] = {}
    seconds: dict[str, float] = {}
    with run.timed("prune"):
        run.on_event(Event("analyse channels", 0, 1))
        score = QuickScore(
            candidate.model, candidate.traced, run.prepared.data, settings=recipe.prune, seed=recipe.seed
        )
        run.on_event(Event("analyse channels", 1, 1))
        problem = problem_of(candidate, recipe, score)
        with Ledger(run.directory.path / "ledger.sqlite") as ledger:
            recorded = ledger.in_front_of(problem)
            for name in (recipe.search.algorithm, *recipe.search.baselines):
                start = time.perf_counter()
                results[name] = _search_one(run, name, recorded)
                seconds[name] = time.perf_counter() - start
                run.directory.write_json("trials.json", {k: _trials(v) for k, v in results.items()})
    algorithm = recipe.search.algorithm
    winner = max(results, key=lambda name: (results[name].best.score, name == algorithm))
    best = results[winner].best
    run.directory.write("plan.json", best.plan.to_json() + "\n")
    figures = {
        "algorithm": algorithm,
        "num_plans": recipe.search.num_plans,
        "best_score": results[algorithm].best.score,
        "found_by": winner,
        "seconds": seconds[algorithm],
        "baselines": {name: r.best.score for name, r in results.items() if name != algorithm},
    }
    return Found(best.plan, score, figures)


def _search_one(run: Run, name: str, problem: Problem) -> SearchResult:
    recipe = run.prepared.recipe
    chosen = recipe.search.settings if name == recipe.search.algorithm else {}
    total = recipe.search.num_plans
    budget = problem.budgets[0]
    best: list[Trial] = []

    def on_trial(trial: Trial) -> None:
        if not best or trial.score > best[0].score:
            best[:] = [trial]
        used = trial.cost[budget.metric] / budget.limit
        figures = {
            "score": f"{trial.score:.2%}",
            "best": f"{best[0].score:.2%}",
            "budget used": f"{used:.0%} of {budget.metric}",
        }
        run.on_event(Event(f"search {name}", trial.index + 1, total, figures))

    run.on_event(Event(f"search {name}", 0, total))
    result = make_search(name, chosen)(problem, num_plans=total, seed=recipe.seed, callbacks=(on_trial,))
    run.on_event(Event(f"search {name}", total, total, {"best": f"{result.best.score:.2%}"}))
    return result


def _trials(result: SearchResult) -> list[dict[str, Any]]:
    return [
        {
            "index": trial.index,
            "score": trial.score,
            "cost": dict(trial.cost.totals),
            "source": trial.source,
            "seconds": trial.seconds,
            "plan": json.loads(trial.plan.to_json()),
        }
        for trial in result.trials
    ]


def finetune(run: Run, candidate: Candidate, small: nn.Module) -> nn.Module:
    """A fine-tuned copy of the pruned network, taught by the original one."""
    recipe = run.prepared.recipe
    if "finetune" not in recipe.stages:
        return small
    tuned = copy.deepcopy(small)
    with run.timed("finetune"):
        _fit(run, tuned, recipe.finetune, stage="finetune", teacher=candidate.model)
    return tuned


def export(
    run: Run, original: nn.Module, compressed: nn.Module
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Write both networks as ONNX, check them against PyTorch, and measure size and latency.

    Returns:
        ``{"before": {...}, "after": {...}}`` with file_bytes and latency_ms, and the parity figures.

    Raises:
        ExportError: a file disagrees with PyTorch.
    """
    recipe, data, folder = run.prepared.recipe, run.prepared.data, run.directory.path
    shape = data.input_shape
    save_weights(compressed, folder / "model.safetensors")
    if "export" not in recipe.stages:
        return {"before": {}, "after": {}}, {}
    with run.timed("export"):
        run.on_event(Event("export", 0, 3))
        files = {"before": folder / "original.onnx", "after": folder / "model.onnx"}
        for index, (name, model) in enumerate({"before": original, "after": compressed}.items(), start=1):
            export_onnx(model, files[name], input_shape=shape, opset=recipe.export.opset)
            run.on_event(Event("export", index, 3))
        wanted = recipe.export.parity_images
        images = torch.cat([x for x, _ in islice(batches(data.search, wanted), 1)])
        parity = check_parity(compressed, files["after"], images)
        latency = measure_latency(files, input_shape=shape, runs=recipe.export.latency_runs)
        run.on_event(Event("export", 3, 3))
    measured = {
        name: {"file_bytes": float(path.stat().st_size), "latency_ms": latency[name].median_ms}
        for name, path in files.items()
    }
    return measured, {key: float(value) for key, value in asdict(parity).items()}


def layer_table(candidate: Candidate, plan: Plan) -> list[dict[str, Any]]:
    """Each layer before and after, as written to ``layers.json``."""
    before, costs = candidate.traced.graph, candidate.costs
    after = plan.apply(before)
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
                "cost_before": dict(cost_before[old.name]),
                "cost_after": dict(cost_after[old.name]),
            }
        )
    return rows
