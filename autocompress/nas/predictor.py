"""A small network that predicts the score of a plan from its choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.core import Knob, Plan, Scored
from autocompress.core.errors import DivergenceError, RecipeError
from autocompress.nas.spaces.space import seeded

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PredictorSettings:
    """How a predictor is built and fitted (Adam, squared error of standardised scores).

    Args:
        hidden: units per hidden layer; APQ's are three of 400.
        steps: gradient steps of a fit.
        batch_size: pairs per step; all where there are fewer.
        lr: learning rate at the start; falls to 0 by half a cosine.
        weight_decay: decoupled, on all weights.

    Raises:
        RecipeError: values out of range, all at once.
    """

    hidden: tuple[int, ...] = (400, 400, 400)
    steps: int = 400
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        rules = (
            ("hidden", "must be one or more numbers >= 1", bool(self.hidden) and min(self.hidden) >= 1),
            ("steps", "must be >= 1", self.steps >= 1),
            ("batch_size", "must be >= 1", self.batch_size >= 1),
            ("lr", "must be > 0 and finite", 0 < self.lr < math.inf),
            ("weight_decay", "must be >= 0 and finite", 0 <= self.weight_decay < math.inf),
        )
        faults = [f"{name} {rule}, got {getattr(self, name)}" for name, rule, holds in rules if not holds]
        if faults:
            raise RecipeError([f"predictor: {fault}" for fault in faults])


class Encoding:
    """Plans as one-hot vectors: one entry per choice of every knob, those of bits apart from the others.

    What a plan does not name (channels and bits of a skipped block) is all zeros, so plans that make equal
    networks have equal vectors, and so do the problems of all targets with equal knobs.

    Args:
        knobs: the decisions.

    Attributes:
        num_float: entries of architecture and channels.
        num_bits: entries of bits.
    """

    def __init__(self, knobs: Sequence[Knob]) -> None:
        self.knobs = tuple(knobs)
        self._starts: list[int] = []
        sizes = [0, 0]
        for knob in self.knobs:
            self._starts.append(sizes[knob.is_bits])
            sizes[knob.is_bits] += len(knob.choices)
        self.num_float, self.num_bits = sizes

    def __call__(self, plans: Sequence[Plan]) -> tuple[Floats, Floats]:
        """Arrays of shape (plans, num_float) and (plans, num_bits).

        Raises:
            ValueError: a plan has a choice that its knob does not offer.
        """
        found = (
            np.zeros((len(plans), self.num_float), np.float32),
            np.zeros((len(plans), self.num_bits), np.float32),
        )
        for row, plan in enumerate(plans):
            for bits, column in self._columns(plan):
                found[bits][row, column] = 1.0
        return found

    def _columns(self, plan: Plan) -> Iterator[tuple[bool, int]]:
        for knob, start in zip(self.knobs, self._starts, strict=True):
            value: int | str | None
            if knob.kind == "arch":
                value = plan.arch.get(knob.name)
            elif knob.kind == "channels":
                value = plan.channels.get(knob.name)
            else:
                chosen = plan.bits.get(knob.bit_layers[0])
                value = None if chosen is None else getattr(chosen, knob.kind.removesuffix("_bits"))
            if value is None:
                continue
            if value not in knob.choices:
                raise ValueError(f"{knob.kind} of {knob.name!r} is {value!r}, not one of {knob.choices}")
            yield knob.is_bits, start + knob.choices.index(value)


class AccuracyPredictor:
    """Scores of plans, learnt from some that were evaluated: a cheap ``Problem.evaluate``.

    A multilayer perceptron on the one-hot choices. :meth:`fit` learns float networks, from architecture and
    channels alone; :meth:`transfer` adds a branch for the bits, which starts at zero beside the float
    weights, and goes on with a few quantised networks.

    Wang et al., "APQ", CVPR 2020, sections 3.2 and 3.3.

    Args:
        encoding: of plans.
        network: maps (plans, num_float) and (plans, num_bits) to standardised scores (plans,).
        mean, std: of the scores it was fitted to.
        settings: of the fit.

    Example:
        >>> from autocompress.nas import AccuracyPredictor, joint_chain
        >>> joint = joint_chain((1, 8, 8), 10)
        >>> rng = np.random.default_rng(0)
        >>> plans = [joint.random(rng) for _ in range(20)]
        >>> scores = [sum(plan.channels.values()) / 1000 for plan in plans]
        >>> predictor = AccuracyPredictor.fit(joint.knobs(), plans, scores, seed=0)
        >>> predictor(joint.largest) > predictor(joint.smallest)
        True
    """

    def __init__(
        self,
        encoding: Encoding,
        network: _Branched,
        *,
        mean: float,
        std: float,
        settings: PredictorSettings,
    ) -> None:
        self.encoding, self.network, self.settings = encoding, network, settings
        self.mean, self.std = mean, std

    @classmethod
    def fit(
        cls,
        knobs: Sequence[Knob],
        plans: Sequence[Plan],
        scores: Sequence[float],
        *,
        seed: int,
        with_bits: bool = False,
        settings: PredictorSettings | None = None,
    ) -> AccuracyPredictor:
        """Learn from evaluated plans, from scratch.

        Args:
            knobs: all decisions, those about bits included.
            plans, scores: the pairs.
            seed: of weights and batches; the global generator is left as it was.
            with_bits: whether the plans' bits count; else only architecture and channels.
            settings: defaults when absent.

        Raises:
            RecipeError: fewer than two pairs, or as many scores as plans are not there.
            ValueError: a choice that its knob does not offer.
            DivergenceError: a score or a loss is not finite.
        """
        settings, encoding = settings or PredictorSettings(), Encoding(knobs)
        network = seeded(
            lambda: _Branched(encoding.num_float, encoding.num_bits if with_bits else 0, settings.hidden),
            seed,
        )
        assert isinstance(network, _Branched)
        return cls._fitted(encoding, network, (plans, scores), settings, seed)

    def transfer(
        self,
        plans: Sequence[Plan],
        scores: Sequence[float],
        *,
        seed: int,
        settings: PredictorSettings | None = None,
    ) -> AccuracyPredictor:
        """A predictor of quantised plans that starts from this one's weights; this one is not changed.

        Where this one already has a branch for bits, that is kept: it then learns from more pairs.

        Args:
            plans, scores: pairs of plans with bits.
            seed: of batches.
            settings: of the further fit, with the same hidden layers; those of the first when absent.

        Raises:
            RecipeError, ValueError, DivergenceError: as :meth:`fit`, or other hidden layers.
        """
        settings = settings or self.settings
        if settings.hidden != self.settings.hidden:
            raise RecipeError(
                f"a transfer keeps the hidden layers {self.settings.hidden}, got {settings.hidden}; fit anew"
            )
        network = _Branched(self.encoding.num_float, self.encoding.num_bits, settings.hidden)
        with torch.no_grad():
            if network.of_bits is not None:
                network.of_bits.weight.zero_()
        network.load_state_dict(self.network.state_dict(), strict=False)
        return self._fitted(self.encoding, network, (plans, scores), settings, seed)

    @classmethod
    def _fitted(
        cls,
        encoding: Encoding,
        network: _Branched,
        pairs: tuple[Sequence[Plan], Sequence[float]],
        settings: PredictorSettings,
        seed: int,
    ) -> AccuracyPredictor:
        plans, scores = pairs
        if len(plans) != len(scores) or len(plans) < 2:
            raise RecipeError(
                f"a predictor learns from two pairs or more, got {len(plans)} plans and {len(scores)} scores"
            )
        targets = np.array(scores, dtype=np.float64)
        if not np.isfinite(targets).all():
            raise DivergenceError("scores to learn from must be finite; evaluate the plans anew")
        mean, std = float(targets.mean()), float(targets.std()) or 1.0
        y = torch.from_numpy(((targets - mean) / std).astype(np.float32))
        x = [torch.from_numpy(part) for part in encoding(plans)]
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        for rows in _rows(len(y), settings, generator):
            loss = F.mse_loss(network(x[0][rows], x[1][rows]), y[rows])
            if not bool(torch.isfinite(loss)):
                raise DivergenceError(f"the predictor's loss is {float(loss)}; lower lr (now {settings.lr})")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return cls(encoding, network.eval(), mean=mean, std=std, settings=settings)

    def predict(self, plans: Sequence[Plan]) -> NDArray[np.float64]:
        """Predicted scores, shape (plans,).

        Raises:
            ValueError: a choice that its knob does not offer.
        """
        x = [torch.from_numpy(part) for part in self.encoding(plans)]
        with torch.inference_mode():
            standardised = self.network(*x).double().numpy()
        return np.asarray(self.mean + self.std * standardised)

    def score_many(self, plans: Sequence[Plan]) -> list[Scored]:
        """Predicted scores as a ``Problem.evaluate_many``."""
        return [Scored(float(score), 0.0) for score in self.predict(plans)]

    def __call__(self, plan: Plan) -> float:
        """The predicted score of one plan."""
        return float(self.predict([plan])[0])


class _Branched(nn.Module):
    """A perceptron whose first layer has one branch for the float choices and one for those of bits."""

    def __init__(self, num_float: int, num_bits: int, hidden: Sequence[int]) -> None:
        super().__init__()
        # An input of nothing still leaves the bias.
        self.of_choices = nn.Linear(max(num_float, 1), hidden[0])
        rest: list[nn.Module] = [nn.ReLU()]
        for inputs, outputs in pairwise(hidden):
            rest += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.rest = nn.Sequential(*rest, nn.Linear(hidden[-1], 1))
        self.of_bits = nn.Linear(num_bits, hidden[0], bias=False) if num_bits else None

    def forward(self, choices: Tensor, bits: Tensor) -> Tensor:
        """(N, num_float) and (N, num_bits) to (N,)."""
        if not choices.shape[1]:
            choices = choices.new_zeros(len(choices), 1)
        x: Tensor = self.of_choices(choices)
        if self.of_bits is not None:
            x = x + self.of_bits(bits)
        out: Tensor = self.rest(x)
        return out[:, 0]


def _rows(number: int, settings: PredictorSettings, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the pairs of every step: shuffled passes over all of them, the last batch cut short."""
    size, step = min(settings.batch_size, number), 0
    while True:
        for rows in torch.split(torch.randperm(number, generator=generator), size):
            if step == settings.steps:
                return
            yield rows
            step += 1
