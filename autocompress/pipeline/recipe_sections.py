"""The sections of a recipe: names, defaults and ranges of every setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    ValidationInfo,
    field_validator,
)

from autocompress.core.budget import Budget
from autocompress.core.cost import Metric
from autocompress.core.graph import Bits

Stage = Literal["nas", "train", "prune", "finetune", "quantise", "qat", "export"]
STAGES: tuple[Stage, ...] = get_args(Stage)
PRUNING: tuple[Stage, ...] = ("train", "prune", "finetune", "export")
"""The stages of a recipe that names none."""
Algorithm = Literal[
    "ddpg", "td3", "sac", "random", "uniform", "greedy", "milp", "cma_es", "tpe", "evolution", "predictor"
]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
BitWidth = Annotated[int, Field(ge=1, le=32)]
QuantBits = Annotated[int, Field(ge=1, le=16)]
# `Strict` turns off guesses such as "20" for 20; tuples are exempt because YAML only has lists.
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)]


class Section(BaseModel):
    """Settings that are frozen, refuse unknown keys and guess no types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSettings(Section):
    """Which data set, and how it is split and scaled.

    Args:
        name: a known data set, or ``package.module:factory``.
        root: folder of the files, relative to the working directory.
        download: whether the files may be fetched when they are missing.
        search_size: training images held back for the search, as a count or as a share below 1.
        train_size: use only so many of the remaining training images.
        mean, std: per channel, for scaling; both or neither.
    """

    name: Annotated[str, Field(min_length=1)]
    root: str | None = None
    download: bool = False
    search_size: float | None = Field(default=None, gt=0)
    train_size: Count | None = None
    mean: Annotated[tuple[float, ...], Strict(False)] | None = None
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Strict(False)] | None = Field(
        default=None, validate_default=True
    )

    @field_validator("search_size")
    @classmethod
    def _count_or_share(cls, value: float | None) -> float | None:
        if value is None or value < 1:
            return value
        if value != int(value):
            raise ValueError(f"must be a whole number of images, or a share below 1, got {value}")
        return int(value)

    @field_validator("std")
    @classmethod
    def _one_per_channel(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> object:
        mean = info.data.get("mean")
        if "mean" in info.data and len(mean or ()) != len(value or ()):
            raise ValueError("mean and std go together, with one number per channel in each")
        return value


class BitSettings(Section):
    """Bit-widths of every layer's weights and of the activations it reads; 32 is floating point."""

    weight: BitWidth
    act: BitWidth

    @property
    def bits(self) -> Bits:
        """The same as the rest of the package knows it."""
        return Bits(self.weight, self.act)


class BudgetSettings(Section):
    """An upper limit on the compressed network.

    Args:
        metric: what is limited; what can be counted, or what the recipe's target gives.
        relative: whether ``limit`` is a share of what the original network costs at ``reference_bits``.
        limit: a share in (0, 1], or a figure for one sample in the metric's unit.
        then: tighter limits, the tightest last, for one more compressed network each; the short form is
            ``{macs: [0.75, 0.5, 0.25]}``.
    """

    metric: Metric
    relative: bool = True
    limit: float
    then: Annotated[tuple[float, ...], Strict(False)] = ()

    @field_validator("limit")
    @classmethod
    def _is_a_budget(cls, limit: float, info: ValidationInfo) -> float:
        if {"metric", "relative"} <= info.data.keys():
            Budget(info.data["metric"], limit, info.data["relative"])
        return limit

    @field_validator("then")
    @classmethod
    def _are_tighter(cls, then: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        limits = (info.data.get("limit", math.inf), *then)
        for limit in then:
            cls._is_a_budget(limit, info)
        if any(b >= a for a, b in pairwise(limits)):
            raise ValueError(
                f"limits come from the loosest to the tightest, got {', '.join(map(str, limits))}"
            )
        return then

    @property
    def limits(self) -> tuple[float, ...]:
        """All limits, the tightest last."""
        return (self.limit, *self.then)

    @property
    def budget(self) -> Budget:
        """The same limit as the rest of the package knows it."""
        return Budget(self.metric, self.limit, self.relative)


def for_one_network(value: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
    """The budgets, when each has one limit."""
    if any(budget.then for budget in value):
        raise ValueError("a stage's own budgets have one limit each; name several in budgets of the recipe")
    return value


def one_per_metric(value: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
    """The budgets, when no two are on one metric."""
    metrics = [budget.metric for budget in value]
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"one budget per metric, got {', '.join(metrics)} (flops counts as macs)")
    return value


Budgets = Annotated[tuple[BudgetSettings, ...], Strict(False), AfterValidator(one_per_metric)]
StageBudgets = Annotated[Budgets, AfterValidator(for_one_network)]


class TrainStage(Section):
    """How the original network is trained; the fields of :class:`autocompress.training.TrainSettings`.

    Args:
        epochs: passes over the training split.
        batch_size: images per step.
        lr: peak learning rate.
        momentum, weight_decay: of stochastic gradient descent.
        label_smoothing: share of the target spread over all classes.
        warmup_epochs: epochs of rising learning rate, fewer than ``epochs``.
        mixed_precision: compute in bfloat16 where that is safe.
        distill_weight: share of the loss that follows the uncompressed network.
        distill_temperature: softens both networks' outputs.
        clip_norm: largest norm of the gradient; null for no limit.
    """

    epochs: Count = 20
    batch_size: Count = 128
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    warmup_epochs: int = Field(default=0, ge=0)
    mixed_precision: bool = False
    distill_weight: float = Field(default=0.0, ge=0, le=1)
    distill_temperature: float = Field(default=4.0, gt=0)
    clip_norm: float | None = Field(default=None, gt=0)

    @field_validator("warmup_epochs")
    @classmethod
    def _shorter_than_training(cls, value: int, info: ValidationInfo) -> int:
        if value >= info.data.get("epochs", value + 1):
            raise ValueError(f"must be < epochs ({info.data['epochs']}), got {value}")
        return value


class FinetuneStage(TrainStage):
    """How the compressed network is trained; the original one is the teacher."""

    epochs: Count = 10
    lr: float = Field(default=0.02, gt=0)
    distill_weight: float = Field(default=0.5, ge=0, le=1)


class QatStage(FinetuneStage):
    """How the quantised network is trained; the same network in floating point is the teacher."""

    epochs: Count = 10
    lr: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)


class NasSettings(Section):
    """How the network is found, where no ``model`` is given.

    A supernet that holds every network of the space is trained, with a distribution over the operations of
    each decision. The network that is taken is the one the distribution stands for, made cheaper where it is
    over the stage's budgets; with ``num_plans``, the best of it and so many others by the accuracy that they
    have with the supernet's weights.

    Where ``search.knobs`` names ``arch``, there is no distribution: the supernet is trained for all kernels,
    depths and widths alike, and ``search`` looks among them by scores with its weights, rounded as
    ``quantise`` says. ``method``, ``settings``, ``alpha_lr``, ``cost_weight``, ``num_plans`` and
    ``score_images`` are not used then.

    Args:
        space: a known space, or ``package.module:factory`` of (input shape, number of classes).
        space_settings: options of the space itself, such as ``{width: 0.5}``.
        method: how the distribution is learnt.
        settings: options of the method itself.
        epochs: passes over the training split, warm-up included.
        warmup_epochs: epochs at the start in which only weights are trained.
        batch_size: images per step, of weights and of the distribution.
        lr: learning rate at the start; it falls to ``min_lr`` along half a cosine.
        min_lr: learning rate at the end.
        weight_decay: on the supernet's weights.
        alpha_lr: learning rate of the distribution's logits; null for the method's own, which is meant for
            tens of thousands of steps.
        cost_weight: how much the expected cost counts where it is over the stage's budget: the loss grows by
            this much per budget overspent.
        budgets: limits of this stage; none for the part of the recipe's budgets that
            :func:`autocompress.pipeline.costs.share_for_first` gives it.
        supernet: folder of a run whose supernet is used instead of training one: another target or budget
            then costs ``num_plans`` evaluations.
        num_plans: networks scored with the supernet's weights, by evolution; 0 for none.
        score_images: images of the search split that score one; null for all.
    """

    space: Annotated[str, Field(min_length=1)] = "mbconv_chain"
    space_settings: dict[str, JsonValue] = Field(default_factory=dict)
    method: Literal["proxyless", "darts", "gdas"] = "proxyless"
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    epochs: Count = 30
    warmup_epochs: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, ge=2)
    lr: float = Field(default=0.05, gt=0)
    min_lr: float = Field(default=0.001, ge=0)
    weight_decay: float = Field(default=3e-4, ge=0)
    alpha_lr: float | None = Field(default=None, gt=0)
    cost_weight: float = Field(default=1.0, ge=0)
    budgets: StageBudgets = ()
    supernet: Annotated[str, Field(min_length=1)] | None = None
    num_plans: int = Field(default=0, ge=0)
    score_images: Annotated[int, Field(ge=2)] | None = None

    @field_validator("warmup_epochs")
    @classmethod
    def _shorter_than_search(cls, value: int, info: ValidationInfo) -> int:
        if value >= info.data.get("epochs", value + 1):
            raise ValueError(f"must be < epochs ({info.data['epochs']}), got {value}")
        return value


class PruneSettings(Section):
    """How channels are chosen and how plans are scored.

    Args:
        budgets: limits of this stage where stage quantise follows; none for the part of the recipe's budgets
            that :func:`autocompress.pipeline.costs.share_for_first` gives it.
        importance: which channels go first.
        round_to: kept channels are a multiple of this where the layer is wide enough; null for the channels
            that the target works on at once where it says so (``this-cpu``: 16), else 8; 8 in joint searches.
        min_keep: smallest share of its channels a layer keeps.
        reconstruct: whether remaining weights are refitted by least squares.
        recalibrate_batches: batches of calibration images that renew a candidate's BatchNorm statistics, as
            far as there are so many; 0 for none.
        calibration_images: training images used for importance, reconstruction and recalibration.
        score_images: images of the search split that score a plan; null for all.
        mixed_precision: score plans in bfloat16; faster where the processor supports it.
        keep: layers or channel groups that stay whole, as shell patterns.
    """

    budgets: StageBudgets = ()
    importance: Literal["l1", "l2", "taylor", "geometric_median"] = "l2"
    round_to: Count | None = None
    min_keep: Share = 0.2
    reconstruct: bool = True
    recalibrate_batches: int = Field(default=8, ge=0)
    calibration_images: Count = 512
    score_images: Count | None = None
    mixed_precision: bool = False
    keep: Names = ()


class SearchSettings(Section):
    """Who looks for the plan, and for how long.

    Args:
        knobs: what is decided together. ``channels`` in stage prune; with ``arch``, stage nas decides the
            architecture and all else named here in one search over a supernet that shares its weights.
        algorithm: the search.
        num_plans: plans it may score; each baseline may score as many.
        settings: options of the algorithm itself.
        baselines: searches run beside it for comparison; the algorithm itself is left out.
        finalists: so many of the best plans, and the best of each search, are scored once more before one is
            taken, on all of the search split and, where they are of bits that stage qat trains, after some
            training (``quantise.finalist_steps``); 0 for none. The best of many quick scores is partly luck,
            and rounding alone does not tell what training will mend.
    """

    knobs: Annotated[tuple[Literal["arch", "channels", "bits"], ...], Strict(False)] = ("channels",)
    algorithm: Algorithm = "ddpg"
    num_plans: Count = 100
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    baselines: Annotated[tuple[Algorithm, ...], Strict(False)] = Field(
        default=("uniform", "random"), validate_default=True
    )
    finalists: int = Field(default=5, ge=0)

    @field_validator("baselines")
    @classmethod
    def _each_once(cls, value: tuple[Algorithm, ...], info: ValidationInfo) -> tuple[Algorithm, ...]:
        return tuple(name for name in dict.fromkeys(value) if name != info.data.get("algorithm"))


def check_channels(search: SearchSettings, stages: Sequence[str]) -> None:
    """Raise unless a search is for the channels of stage prune.

    Raises:
        ValueError: it is for other knobs, or there is no such stage.
    """
    if search.knobs != ("channels",):
        raise ValueError(f"knobs must be [channels], or name arch, got [{', '.join(search.knobs)}]")
    if "predictor" in (search.algorithm, *search.baselines):
        raise ValueError("predictor needs knobs that name arch, such as [arch, channels, bits]")
    if search != SearchSettings() and "prune" not in stages:
        raise ValueError("looks for channels, and stages leaves out prune; move it to quantise.search")
    if "qat" in stages and "quantise" not in stages:
        raise ValueError("stages: qat trains what quantise makes; add quantise or leave qat out")


def check_joint(search: SearchSettings, stages: Sequence[str]) -> None:
    """Raise unless a search of architectures fits the stages.

    Raises:
        ValueError: a stage is missing, or decides again what the search decides.
    """
    if "nas" not in stages:
        raise ValueError("knobs name arch, which stage nas decides; add nas to stages")
    if len(set(search.knobs)) < len(search.knobs):
        raise ValueError(f"knobs are named once each, got [{', '.join(search.knobs)}]")
    again = {"prune"} | ({"quantise"} if "bits" in search.knobs else set())
    if twice := [stage for stage in stages if stage in again]:
        raise ValueError(f"with arch, one search decides all; leave {' and '.join(twice)} out of stages")
    if "bits" not in search.knobs and "qat" in stages and "quantise" not in stages:
        raise ValueError("stages: qat trains what quantise makes; add quantise, or bits to search.knobs")


class BitSearchSettings(SearchSettings):
    """Who looks for bits, and for how long.

    ``milp`` by default: on ResNet-20, in the mean of three seeds, its plans ended with more accuracy than
    uniform bits of equal latency on BISMO, with half of the evaluations of DDPG; on BitFusion it returned the
    uniform plan, and DDPG found none better (benchmarks/resnet20_bits.py).
    """

    algorithm: Algorithm = "milp"
    baselines: Annotated[tuple[Algorithm, ...], Strict(False)] = Field(
        default=("uniform",), validate_default=True
    )


class QuantiseSettings(Section):
    """How weights and activations are rounded, and how plans of bits are scored.

    Args:
        method: ``linear`` rounds weights and activations to evenly spaced values. ``kmeans`` lets the weights
            of a layer share a few values and leaves activations alone: for budgets on ``weight_bytes`` only.
        weight_bits, act_bits: what a layer's weights and the activations it reads may have, ascending; the
            last is the reference. No ``act_bits`` leave activations in floating point.
        first_last: ``pin`` keeps the first and the last layer at 8 bits, ``input`` only what the first layer
            reads, ``free`` lets the search decide all.
        weight_range, act_range: where tensors are clipped before rounding.
        per_channel: one weight scale per output channel instead of one per layer.
        asymmetric: give activations that can be negative a zero point instead of a sign.
        power_of_two: scales are powers of two; hls4ml needs them, with ``per_channel: false``.
        bias_correction: shift biases by the mean error of rounded weights.
        calibration_images: training images that decide where activations are clipped.
        score: what a plan's score is: ``accuracy``, or ``likelihood``, the geometric mean of the right
            class's probability, which still tells plans apart when all are nearly right.
        score_images: images of the search split that score a plan; null for all.
        sensitivity: how the loss of each choice is predicted for searches that ask (milp); null for not.
        keep: layers that keep the reference bits, as shell patterns.
        finalist_steps: steps that each of the search's finalists is trained with rounding, as stage qat
            trains, before it is scored once more on all of the search split; 0 for none.
        search: who looks for the bits.
    """

    method: Literal["linear", "kmeans"] = "linear"
    weight_bits: Annotated[tuple[QuantBits, ...], Strict(False)] = (2, 3, 4, 5, 6, 7, 8)
    act_bits: Annotated[tuple[QuantBits, ...], Strict(False)] = Field(
        default=(2, 3, 4, 5, 6, 7, 8), validate_default=True
    )
    first_last: Literal["pin", "input", "free"] = "pin"
    weight_range: Literal["max", "percentile", "mse", "kl", "haq"] = "mse"
    act_range: Literal["max", "percentile", "mse", "kl", "haq"] = "mse"
    per_channel: bool = True
    asymmetric: bool = False
    power_of_two: bool = False
    bias_correction: bool = True
    calibration_images: Count = 512
    score: Literal["accuracy", "likelihood"] = "accuracy"
    score_images: Count | None = None
    sensitivity: Literal["measured", "hessian", "fisher"] | None = None
    keep: Names = ()
    finalist_steps: int = Field(default=100, ge=0)
    search: BitSearchSettings = BitSearchSettings()

    @property
    def reference(self) -> Bits:
        """The most bits of both."""
        return Bits(self.weight_bits[-1], self.act_bits[-1] if self.act_bits else 32)

    @field_validator("weight_bits", "act_bits")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b <= a for a, b in pairwise(value)):
            raise ValueError(f"must be bit-widths in ascending order, got {list(value)}")
        return value

    @field_validator("weight_bits")
    @classmethod
    def _some_weights(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        most = 8 if info.data.get("method") == "kmeans" else 16
        if not value or value[-1] > most:
            raise ValueError(f"must hold one or more bit-widths up to {most}, got {list(value)}")
        return value

    @field_validator("act_bits")
    @classmethod
    def _no_activations(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if value and info.data.get("method") == "kmeans":
            raise ValueError("method kmeans leaves activations in floating point; set act_bits: []")
        return value

    @field_validator("sensitivity")
    @classmethod
    def _of_rounding(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and info.data.get("method") == "kmeans":
            raise ValueError("is known for method linear only; leave it out")
        return value

    @field_validator("power_of_two")
    @classmethod
    def _no_zero_points(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("asymmetric"):
            raise ValueError("power_of_two and asymmetric exclude each other; choose one")
        return value


class ExportSettings(Section):
    """How the ONNX file is written and measured.

    Args:
        opset: ONNX operator set, 18 or later; null for 18, or 21 where layers are integers.
        parity_images: images of the search split on which ONNX Runtime must agree with PyTorch.
        latency_runs: timed runs of each file.
        qonnx: also write QONNX, which tools that build hardware read, and FINN's folding where the target is
            a FINN pipeline; needs the extra ``fpga``.
    """

    opset: int | None = Field(default=None, ge=18)
    parity_images: int = Field(default=64, ge=2)
    latency_runs: Count = 50
    qonnx: bool = False


class ExpectedSettings(Section):
    """Accuracies the recipe is known to reach; a run that ends below them says so.

    Args:
        accuracy_before, accuracy_after: on the test split, of the original and the compressed network.
        tolerance: how far below still counts as reached.
    """

    accuracy_before: Share | None = None
    accuracy_after: Share | None = None
    tolerance: float = Field(default=0.01, ge=0, le=1)


SECTIONS: dict[str, type[BaseModel]] = {
    "nas": NasSettings,
    "nas.budgets": BudgetSettings,
    "prune.budgets": BudgetSettings,
    "quantise.search": BitSearchSettings,
    "data": DataSettings,
    "bits": BitSettings,
    "budgets": BudgetSettings,
    "train": TrainStage,
    "prune": PruneSettings,
    "quantise": QuantiseSettings,
    "search": SearchSettings,
    "finetune": FinetuneStage,
    "qat": QatStage,
    "export": ExportSettings,
    "expected": ExpectedSettings,
}
