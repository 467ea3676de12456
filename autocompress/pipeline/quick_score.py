"""The score a search sees: a pruned copy, repaired but not fine-tuned, on the search split."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from autocompress.core import Plan, Problem
from autocompress.core.errors import RecipeError
from autocompress.pipeline.costs import Costs, channel_step
from autocompress.pipeline.recipe import PruneSettings
from autocompress.prune import Reconstruction, channel_knobs, compress_channels, unit_scores
from autocompress.trace import Trace
from autocompress.training import Data, batches, evaluate, recalibrate_batchnorm, weights_digest
from autocompress.training.batches import spread

log = logging.getLogger(__name__)

CALIBRATION_BATCH = 128
SCORE_BATCH = 100
"""Images per forward pass: activations of most small networks then stay in the processor's cache."""
DIGESTED = 64
"""Images of the search split that tell one data set from another."""


class QuickScore:
    """Builds and scores pruned copies of one network.

    A copy is physically shrunk, its layers are refitted by least squares, its BatchNorm statistics are
    measured anew, and its accuracy is taken on images evenly spaced over the search split, the same for
    every plan. Nothing is fine-tuned.

    Args:
        model: the trained network; not changed.
        traced: its trace.
        data: calibration images come from ``data.train``, the score from ``data.search``.
        settings: the recipe's ``prune`` section.
        seed: of the choice of calibration images.
    """

    def __init__(
        self, model: nn.Module, traced: Trace, data: Data, *, settings: PruneSettings, seed: int
    ) -> None:
        self._model, self._traced, self._data, self._settings = model, traced, data, settings
        device = next(model.parameters()).device
        stored = list(calibration_batches(data, settings.calibration_images, seed))
        self.data_digest = data_digest(stored, data)
        self._calibration = [(x.to(device), y.to(device)) for x, y in stored]
        self._images = [x for x, _ in self._calibration]
        self._scores = unit_scores(
            model, traced, settings.importance, self._calibration if settings.importance == "taylor" else None
        )
        self._reconstruction = None
        if settings.reconstruct:
            count = sum(len(x) for x in self._images)
            self._reconstruction = Reconstruction(model, traced, self._images, num_images=count, seed=seed)

    @property
    def is_partial(self) -> bool:
        """Whether plans are scored on a part of the search split."""
        return takes_part(self._settings.score_images, self._data)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._settings.mixed_precision else torch.float32

    def build(self, plan: Plan) -> nn.Module:
        """The pruned and repaired copy a plan makes; deterministic."""
        small = compress_channels(
            self._model, plan, traced=self._traced, scores=self._scores, reconstruction=self._reconstruction
        )
        if self._settings.recalibrate_batches:
            images = self._images[: self._settings.recalibrate_batches]
            recalibrate_batchnorm(small, images, dtype=self._dtype)
        return small

    def __call__(self, plan: Plan, *, fully: bool = False) -> float:
        """Accuracy in [0, 1] on the search split, on all of it if ``fully``."""
        return evaluate(
            self.build(plan),
            self._data.search,
            batch_size=SCORE_BATCH,
            limit=None if fully else self._settings.score_images,
            dtype=self._dtype,
        ).accuracy


def channel_problem(
    model: nn.Module,
    traced: Trace,
    score: QuickScore | None,
    *,
    settings: PruneSettings,
    costs: Costs,
) -> Problem:
    """The search problem of pruning a network.

    Args:
        model: the trained network, part of the problem's identity.
        traced: its trace.
        score: how plans are scored; None makes a problem that can be priced but not evaluated.
        settings: the recipe's ``prune`` section.
        costs: what plans cost.

    Returns:
        A problem that has no budgets yet.

    Raises:
        RecipeError: a ``keep`` pattern matches nothing, nothing is left to prune, or the target cannot run
            the network.
    """
    try:
        knobs = channel_knobs(
            traced.graph,
            round_to=settings.round_to or channel_step(costs.target),
            min_keep=settings.min_keep,
            keep=settings.keep,
        )
    except ValueError as fault:
        raise RecipeError(f"prune: {fault}") from fault
    if not knobs:
        reasons = "; ".join(f"{g.name}: {g.locked}" for g in traced.graph.groups if g.locked)
        raise RecipeError(f"nothing in this network can be pruned ({reasons or 'every layer is kept'})")

    return Problem(
        knobs=knobs,
        budgets=(),
        price=costs.tabulated(knobs),
        evaluate=score or unscored,
        evaluate_fully=partial(score, fully=True) if score and score.is_partial else None,
        identity=f"{weights_digest(model)} {score.data_digest if score else ''} {settings.model_dump_json()} "
        + costs.identity,
    )


def takes_part(score_images: int | None, data: Data) -> bool:
    """Whether so many images are fewer than the search split has."""
    return score_images is not None and score_images < len(data.search)


def unscored(plan: Plan) -> float:
    """In place of a score where a problem is only priced.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"plan {plan.digest} can be priced but not scored: no score was given")


def calibration_batches(data: Data, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``count`` random training images; not augmented but by transforms of the data set's own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)[:count]
    return batches(Subset(data.train, order.tolist()), CALIBRATION_BATCH)  # type: ignore[arg-type]


def data_digest(calibration: list[tuple[Tensor, Tensor]], data: Data) -> str:
    """Hash of the calibration images and of some of the search split."""
    digest = hashlib.sha256()
    for x, y in (*calibration, *spread(data.search, DIGESTED, limit=min(DIGESTED, len(data.search)))):
        digest.update(x.contiguous().numpy().tobytes() + y.numpy().tobytes())
    return digest.hexdigest()[:16]
