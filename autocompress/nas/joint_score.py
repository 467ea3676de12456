"""The score of a joint plan without training: inherited weights, measured BatchNorm, rounded values."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from autocompress.core import Plan
from autocompress.core.errors import RecipeError
from autocompress.nas.elastic import ElasticSupernet
from autocompress.quant import Calibration, QuantSettings, QuantTables, Skeleton
from autocompress.training import Data, batches, evaluate, recalibrate_batchnorm, subset, weights_digest
from autocompress.training.batches import spread
from autocompress.training.evaluate import device_of

Score = Literal["accuracy", "likelihood"]
_BATCH = 100  # images per forward pass
_MOST_MEMBERS = 8  # whose rounded weights are kept
_DIGESTED = 100  # images of the search split that stand for it


@dataclass(frozen=True)
class JointScoreSettings:
    """How plans are scored.

    Args:
        calibration_images: of the training split, for BatchNorm's statistics and for activations' scales.
        score_images: of the search split, evenly spaced; all when absent.
        score: ``accuracy``, or ``likelihood``, the exponential of the negated mean loss, which tells apart
            plans that are right equally often.
        quant: how tensors are rounded.

    Raises:
        RecipeError: values out of range, all at once.
    """

    calibration_images: int = 200
    score_images: int | None = None
    score: Score = "likelihood"
    quant: QuantSettings = field(default_factory=QuantSettings)

    def __post_init__(self) -> None:
        faults = []
        if self.calibration_images < 2:
            faults.append(f"calibration_images must be >= 2, got {self.calibration_images}")
        if self.score_images is not None and self.score_images < 1:
            faults.append(f"score_images must be >= 1, or absent, got {self.score_images}")
        if self.score not in get_args(Score):
            faults.append(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        if faults:
            raise RecipeError(faults)


class JointScore:
    """Builds and scores the networks of joint plans with the weights of one supernet; the costly truth.

    A member takes its weights from the supernet, BatchNorm is measured anew on training images, weights and
    activations are rounded to the plan's bits, and the score is taken on the search split. Nothing is
    trained. A plan without bits gives the float network. No plan is evaluated twice, whichever problem asks:
    targets share what was paid for.

    Args:
        supernet: trained; not changed. Its weights must stay what they are.
        data: calibration images come from ``data.train``, scores from ``data.search``.
        seed: of the choice of calibration images.
        settings: defaults when absent.

    Attributes:
        num_evaluated: plans that were evaluated so far, each counted once.

    Raises:
        RecipeError: fewer training images than are asked for.
    """

    def __init__(
        self, supernet: ElasticSupernet, data: Data, *, seed: int, settings: JointScoreSettings | None = None
    ) -> None:
        self.supernet, self.settings = supernet, settings or JointScoreSettings()
        number = self.settings.calibration_images
        if number > len(data.train):
            raise RecipeError(f"calibration_images is {number}, but there are {len(data.train)} to train on")
        self._search, device = data.search, device_of(supernet)
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:number]
        images, _ = next(batches(subset(data.train, order.numpy(), augmented=False), number))
        # Of equal size to one image, for BatchNorm's statistics are averaged over batches.
        parts = torch.tensor_split(images.to(device), math.ceil(number / _BATCH))
        self.calibration_images: list[Tensor] = list(parts)
        self.num_evaluated = 0
        self._scores: dict[tuple[str, bool], float] = {}
        self._tables: OrderedDict[str, QuantTables] = OrderedDict()
        self.identity = self._digest()

    def _digest(self) -> str:
        """Text that tells these scores from others, for ``Problem.identity``."""
        data = hashlib.sha256()
        for images in self.calibration_images:
            data.update(images.cpu().contiguous().numpy().tobytes())
        limit = min(_DIGESTED, len(self._search))
        for x, y in spread(self._search, limit, limit=limit):
            data.update(x.contiguous().numpy().tobytes() + y.numpy().tobytes())
        return (
            f"{weights_digest(self.supernet)} {data.hexdigest()[:16]} {len(self._search)} {self.settings} "
            f"threads={torch.get_num_threads()}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what workers had better compute anew."""
        return self.__dict__ | {"_scores": {}, "_tables": OrderedDict()}

    def member(self, plan: Plan) -> nn.Module:
        """The float network of a plan's architecture and channels, BatchNorm measured, in evaluation mode.

        Raises:
            RecipeError: the plan's architecture is not a member.
            ValueError: the plan names channels that no block of its member has, or out of range.
        """
        network = self.supernet.member(plan)
        recalibrate_batchnorm(network, self.calibration_images)
        return network.eval()

    def tables(self, plan: Plan) -> QuantTables:
        """The member ready for any bits: what :class:`~autocompress.quant.qat.QatNetwork` starts from.

        Raises:
            RecipeError, ValueError: as :meth:`member`.
        """
        plan = self.supernet.joint.effective(Plan(plan.arch, plan.channels))
        if plan.digest not in self._tables:
            skeleton = Skeleton(self.member(plan))
            calibration = Calibration(skeleton, self.calibration_images, self.settings.quant)
            self._tables[plan.digest] = QuantTables(skeleton, calibration)
            if len(self._tables) > _MOST_MEMBERS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(plan.digest)
        return self._tables[plan.digest]

    def network(self, plan: Plan) -> nn.Module | fx.GraphModule:
        """The network that is scored: quantised where the plan has bits, else float."""
        plan = self.supernet.joint.effective(plan)
        return self.tables(plan).network(plan) if plan.bits else self.member(plan)

    @property
    def is_partial(self) -> bool:
        """Whether plans are scored on a part of the search split."""
        limit = self.settings.score_images
        return limit is not None and limit < len(self._search)

    def __call__(self, plan: Plan, *, fully: bool = False) -> float:
        """The score in [0, 1] on the search split, on all of it if ``fully``.

        Raises:
            RecipeError: the plan's architecture is not a member.
            ValueError: the plan names what its member lacks, or a number out of range.
        """
        plan = self.supernet.joint.effective(plan)
        key = plan.digest, fully and self.is_partial
        if key not in self._scores:
            limit = None if fully else self.settings.score_images
            scores = evaluate(self.network(plan), self._search, batch_size=_BATCH, limit=limit)
            likelihood = self.settings.score == "likelihood"
            self._scores[key] = math.exp(-scores.loss) if likelihood else scores.accuracy
            self.num_evaluated += 1
        return self._scores[key]
