"""The score a bit search sees: the network with rounded weights and activations, on the search split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core import Bits, Budget, Knob, LayerGraph, Plan, Problem
from autocompress.core.errors import RecipeError
from autocompress.pipeline.costs import Costs
from autocompress.pipeline.quick_score import (
    SCORE_BATCH,
    calibration_batches,
    data_digest,
    takes_part,
    unscored,
)
from autocompress.pipeline.recipe_sections import QuantiseSettings
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton
from autocompress.quant.kmeans import CodebookTables
from autocompress.quant.knobs import bit_knobs, reference_bits
from autocompress.quant.qat import QatNetwork
from autocompress.quant.sensitivity import sensitivity
from autocompress.training import (
    Data,
    TrainSettings,
    evaluate,
    fit,
    subset,
    training_images,
    weights_digest,
)

STATISTICS_IMAGES = 2048
"""Images that BatchNorm's statistics are taken over before training with rounding."""

Tables = QuantTables | CodebookTables


class BitScore:
    """Builds and scores quantised versions of one network.

    Weights are rounded, or clustered, once per layer and bit-width, activations by scales calibrated on
    training images, and the score is taken on images evenly spaced over the search split, the same for every
    plan. Nothing is trained.

    Args:
        model: the trained (and perhaps pruned) network; not changed.
        data: calibration images come from ``data.train``, the score from ``data.search``.
        settings: the recipe's ``quantise`` section.
        seed: of the choice of calibration images.

    Raises:
        UnsupportedModelError: the network holds what cannot be quantised.
        DataError: calibration images are not finite or constant.
    """

    def __init__(self, model: nn.Module, data: Data, *, settings: QuantiseSettings, seed: int) -> None:
        self._data, self._settings, self._seed = data, settings, seed
        device = next(model.parameters()).device
        stored = list(calibration_batches(data, settings.calibration_images, seed))
        self.calibration_images: list[tuple[Tensor, Tensor]] = [
            (x.to(device), y.to(device)) for x, y in stored
        ]
        self.tables = self._tables_of(model)
        self.identity = (
            f"{weights_digest(model)} {data_digest(stored, data)} {settings.model_dump_json()} "
            f"threads={torch.get_num_threads()}"
        )

    def training_images(self) -> list[Tensor]:
        """Images as training sees them, for the statistics of what trains with rounding."""
        device = self.calibration_images[0][0].device
        found = training_images(self._data.train, STATISTICS_IMAGES, seed=self._seed)
        return [images.to(device) for images in found]

    def _tables_of(self, model: nn.Module) -> Tables:
        settings = self._settings
        if settings.method == "kmeans":
            return CodebookTables(model)
        skeleton = Skeleton(model)
        calibration = Calibration(
            skeleton,
            (x for x, _ in self.calibration_images),
            quant_settings(settings),
        )
        return QuantTables(skeleton, calibration)

    @property
    def is_partial(self) -> bool:
        """Whether plans are scored on a part of the search split."""
        return takes_part(self._settings.score_images, self._data)

    def __call__(self, plan: Plan, *, fully: bool = False) -> float:
        """``QuantiseSettings.score`` in [0, 1] on the search split, on all of it if ``fully``."""
        return self._scored(self.tables.network(plan), None if fully else self._settings.score_images)

    def _scored(self, network: nn.Module, limit: int | None) -> float:
        scores = evaluate(network, self._data.search, batch_size=SCORE_BATCH, limit=limit)
        return scores.accuracy if self._settings.score == "accuracy" else math.exp(-scores.loss)

    def after_training(self, plan: Plan, settings: TrainSettings, steps: int) -> float:
        """The score on all of the search split after some steps of training with rounding.

        Rounding alone is a poor judge of plans that will be trained: a layer of two bits loses little more by
        rounding than its neighbours and cannot be trained back, where four bits can. HAQ's released code
        trains every plan for an epoch before it is scored; here that is for finalists.

        Args:
            plan: of bits.
            settings: of training; the learning rate falls to 0 within the steps.
            steps: batches to train on.
        """
        tables = self.tables
        if isinstance(tables, CodebookTables):
            return self(plan, fully=True)
        order = torch.randperm(len(self._data.train), generator=torch.Generator().manual_seed(self._seed))
        some = subset(self._data.train, order[: steps * settings.batch_size].numpy())
        student = QatNetwork(tables, plan, self.training_images())
        fit(
            student,
            replace(self._data, train=some),
            replace(settings, epochs=1, warmup_epochs=0),
            seed=self._seed,
            teacher=tables.skeleton.graph_module,
        )
        return self._scored(student, None)

    def sensitivities(
        self, knobs: Sequence[Knob], reference: Plan
    ) -> Callable[[], Sequence[NDArray[np.float64]]] | None:
        """What ``Problem.sensitivities`` is; None where the recipe does not ask for predictions."""
        method, tables = self._settings.sensitivity, self.tables
        if method is None or not isinstance(tables, QuantTables):
            return None

        def predict() -> Sequence[NDArray[np.float64]]:
            images = self.calibration_images
            found = sensitivity(tables, knobs, images, method=method, reference=reference, seed=self._seed)
            return found.per_knob(knobs)

        return predict


def quant_settings(settings: QuantiseSettings) -> QuantSettings:
    """How a recipe rounds tensors."""
    return QuantSettings(
        weight_range=settings.weight_range,
        act_range=settings.act_range,
        per_channel=settings.per_channel,
        asymmetric=settings.asymmetric,
        power_of_two=settings.power_of_two,
        bias_correction=settings.bias_correction,
    )


def bit_problem(
    graph: LayerGraph,
    score: BitScore | None,
    *,
    settings: QuantiseSettings,
    costs: Costs,
    budgets: Sequence[Budget],
    pruned: Plan | None = None,
    training: TrainSettings | None = None,
) -> Problem:
    """The search problem of choosing bits.

    Args:
        graph: the uncompressed network.
        score: how plans are scored; None makes a problem that can be priced but not evaluated.
        settings: the recipe's ``quantise`` section.
        costs: what plans cost.
        budgets: relative or absolute limits.
        pruned: channels that were removed before.
        training: how the plan that is taken will be trained, and finalists for ``settings.finalist_steps``;
            None where it will not.

    Raises:
        RecipeError: a ``keep`` pattern matches nothing, no layer is left to decide, or the target cannot run
            the network.
    """
    channels = pruned.channels if pruned else {}
    small = graph.with_channels(channels) if channels else graph
    try:
        knobs = bit_knobs(small, **_choices(settings), keep=settings.keep)
    except ValueError as fault:
        raise RecipeError(f"quantise: {fault}") from fault
    if not knobs:
        raise RecipeError("quantise: every layer is kept or pinned, so there is nothing to decide")
    base = Plan(channels=channels, bits=reference_bits(small, **_choices(settings)))

    return Problem(
        knobs=knobs,
        budgets=costs.resolve(budgets),
        price=costs.tabulated(knobs, base),
        evaluate=score or unscored,
        evaluate_fully=_final_score(score, training, settings.finalist_steps) if score else None,
        identity=f"bits {score.identity if score else ''} {costs.identity} {training or ''}",
        base=base,
        sensitivities=score.sensitivities(knobs, base) if score else None,
    )


def _final_score(
    score: BitScore, training: TrainSettings | None, steps: int
) -> Callable[[Plan], float] | None:
    if training is not None and steps:
        return partial(score.after_training, settings=training, steps=steps)
    return partial(score, fully=True) if score.is_partial else None


def uniform_plan(graph: LayerGraph, bits: Bits, *, settings: QuantiseSettings) -> Plan:
    """The plan that gives every layer the same bits, but for what the settings pin or keep."""
    chosen = {
        name: [found.weight, found.act] for name, found in reference_bits(graph, **_choices(settings)).items()
    }
    for knob in bit_knobs(graph, **_choices(settings), keep=settings.keep):
        for layer in knob.bit_layers:
            side = 0 if knob.kind == "weight_bits" else 1
            chosen[layer][side] = bits.weight if side == 0 else bits.act
    return Plan(bits={layer: Bits(*sides) for layer, sides in chosen.items()})


def _choices(settings: QuantiseSettings) -> dict[str, Any]:
    return {
        "weight_bits": settings.weight_bits,
        "act_bits": settings.act_bits,
        "first_last": settings.first_last,
    }
