"""The recipe: everything a run depends on, read from YAML and checked whole."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationInfo, field_validator
from ruamel.yaml import YAML

from autocompress.core.errors import RecipeError
from autocompress.core.wording import did_you_mean
from autocompress.pipeline.recipe_check import checked
from autocompress.pipeline.recipe_sections import (
    PRUNING,
    STAGES,
    Algorithm,
    BitSettings,
    Budgets,
    BudgetSettings,
    Count,
    DataSettings,
    ExpectedSettings,
    ExportSettings,
    FinetuneStage,
    Names,
    NasSettings,
    PruneSettings,
    QatStage,
    QuantiseSettings,
    SearchSettings,
    Section,
    Stage,
    TrainStage,
    check_channels,
    check_joint,
)
from autocompress.pipeline.yaml_marks import document_of, read_document

__all__ = [
    "STAGES",
    "Algorithm",
    "BudgetSettings",
    "DataSettings",
    "ExportSettings",
    "FinetuneStage",
    "NasSettings",
    "PruneSettings",
    "QatStage",
    "QuantiseSettings",
    "Recipe",
    "SearchSettings",
    "Stage",
    "TrainStage",
    "bundled_recipes",
    "find_recipe",
]


class Recipe(Section):
    """Everything a run depends on.

    Build one with :meth:`load`, :meth:`parse` or :meth:`from_mapping`, which accept the short forms
    ``model: name``, ``data: name`` and ``budgets: {macs: 0.4}`` and report every fault at once.

    Args:
        name: of the run; letters, digits, ``.``, ``_`` and ``-``.
        model: networks by name or ``package.module:factory``. Of several, the one with the best accuracy
            on the search split after training is compressed (of equals, the one with fewer MACs). None where
            stage nas finds one.
        weights: checkpoint to start from instead of training; a file beside the recipe, or a path from the
            working directory.
        data: the data set.
        seed: decides everything random in the run.
        device: where PyTorch computes.
        threads: PyTorch threads; they change the last bits of training. null leaves them alone.
        target: the machine that limits on latency, energy and resources are about: a bundled target's name,
            or a target file beside the recipe or at a path from the working directory.
        bits: what layers are computed with where no stage decides that. null for the reference bits of stage
            quantise where there is one, else for floating point, which targets that multiply integers refuse.
        reference_bits: of the original network that relative budgets refer to, or of the largest one of the
            space where stage nas finds it; null for those of ``bits``, or 32 where there are none.
        budgets: limits that must all hold. Several limits on a metric, ``{macs: [0.75, 0.5, 0.25]}``, make a
            series: one compressed network for each, from one training.
        stages: what is done, in the order nas, train, prune, finetune, quantise, qat, export; at least one of
            nas, prune and quantise. The budgets are for what comes out in the end: each stage gets a part of
            the way there, measured anew after the stage before.
        alone: stages that are also run without the others, within the same budgets and with as many epochs in
            all, for comparison.
        nas, train, prune, search, finetune, quantise, qat, export: settings of the stages; ``search`` is who
            looks for channels, or for all ``search.knobs`` at once; ``quantise.search`` looks for bits.
        expected: accuracies the recipe is known to reach.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    model: Names = ()
    weights: Annotated[str, Field(min_length=1)] | None = None
    data: DataSettings | None = None
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Count | None = 2
    target: Annotated[str, Field(min_length=1)] | None = None
    bits: BitSettings | None = None
    reference_bits: Literal[8, 32] | None = None
    budgets: Budgets
    stages: Annotated[tuple[Stage, ...], Strict(False)] = PRUNING
    alone: Annotated[tuple[Literal["nas", "prune", "quantise"], ...], Strict(False)] = ()
    nas: NasSettings = NasSettings()
    train: TrainStage = TrainStage()
    prune: PruneSettings = PruneSettings()
    search: SearchSettings = Field(default=SearchSettings(), validate_default=True)
    finetune: FinetuneStage = FinetuneStage()
    quantise: QuantiseSettings = QuantiseSettings()
    qat: QatStage = QatStage()
    export: ExportSettings = ExportSettings()
    expected: ExpectedSettings = ExpectedSettings()

    @field_validator("model")
    @classmethod
    def _different_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names each network once, got {', '.join(value)}")
        return value

    @field_validator("weights")
    @classmethod
    def _one_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and len(info.data.get("model", ())) > 1:
            raise ValueError("belongs to one network; name a single model")
        return value

    @field_validator("budgets")
    @classmethod
    def _not_empty(cls, value: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
        if not value:
            raise ValueError("must hold at least one budget, e.g. {macs: 0.5}")
        return value

    @field_validator("budgets")
    @classmethod
    def _of_equal_number(cls, value: tuple[BudgetSettings, ...]) -> tuple[BudgetSettings, ...]:
        if len({len(budget.then) for budget in value if budget.then}) > 1:
            counts = ", ".join(f"{len(b.limits)} on {b.metric}" for b in value)
            raise ValueError(f"budgets have one limit or equally many, got {counts}")
        return value

    @field_validator("stages")
    @classmethod
    def _in_order(cls, value: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        if value != tuple(stage for stage in STAGES if stage in value):
            raise ValueError(f"come once each, in the order {', '.join(STAGES)}, got {', '.join(value)}")
        if not {"nas", "prune", "quantise"} & set(value):
            raise ValueError(f"must hold nas, prune or quantise, got {', '.join(value) or 'none'}")
        for stage, needed in (("finetune", "prune"), ("qat", "quantise")):
            decided = stage == "qat" and "nas" in value  # perhaps by search.knobs, which is not read yet
            if stage in value and needed not in value and not decided:
                raise ValueError(f"{stage} trains what {needed} makes; add {needed} or leave {stage} out")
        if "nas" in value and "train" not in value:
            raise ValueError("nas finds a network that is not trained yet; add train")
        if "nas" in value and any(budget.then for budget in info.data.get("budgets", ())):
            raise ValueError(
                "a series of budgets starts from one network, and nas finds one for each; give one limit, "
                "and for the others borrow the supernet with nas.supernet"
            )
        return value

    @field_validator("alone")
    @classmethod
    def _some_of_the_stages(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        stages = info.data.get("stages", value)
        if missing := [stage for stage in value if stage not in stages]:
            raise ValueError(f"compares stages of the run with the whole; stages lacks {', '.join(missing)}")
        if value and len({"nas", "prune", "quantise"} & set(stages)) < 2:
            raise ValueError("needs a run of two or more of nas, prune and quantise; leave it out")
        return tuple(dict.fromkeys(value))

    @field_validator("train")
    @classmethod
    def _no_teacher_yet(cls, value: TrainStage) -> TrainStage:
        if value.distill_weight:
            raise ValueError("distill_weight needs a teacher and the original network has none; set it to 0")
        return value

    @field_validator("prune")
    @classmethod
    def _own_budgets_need_quantise(cls, value: PruneSettings, info: ValidationInfo) -> PruneSettings:
        if value.budgets and "quantise" not in info.data.get("stages", ("quantise",)):
            raise ValueError("budgets of its own are for recipes with stage quantise; move them to budgets")
        return value

    @field_validator("search")
    @classmethod
    def _for_its_knobs(cls, value: SearchSettings, info: ValidationInfo) -> SearchSettings:
        if "stages" not in info.data:
            return value
        stages = info.data["stages"]
        if "milp" in (value.algorithm, *value.baselines):
            raise ValueError("milp decides bits only; name it in quantise.search, and another one here")
        if "arch" in value.knobs:
            check_joint(value, stages)
        else:
            check_channels(value, stages)
            borrowed = info.data.get("nas", NasSettings())
            if borrowed.supernet and not borrowed.num_plans:
                raise ValueError(
                    "nas.num_plans must be >= 1 with nas.supernet, whose distribution is for another run"
                )
        return value

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a file.

        Args:
            path: a YAML file, or the name of a bundled recipe.
            overrides: ``search.num_plans=50`` and the like, applied before anything is checked.

        Raises:
            RecipeError: every fault with file, line and column.
        """
        file = find_recipe(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise RecipeError(f"{file}: cannot be read as UTF-8 text: {fault}") from fault
        recipe = checked(cls, read_document(text, str(file)), overrides, folder=file.parent)
        beside = file.parent / (recipe.weights or "")
        if recipe.weights is None or Path(recipe.weights).is_file() or not beside.is_file():
            return recipe
        # Absolute, so that the copy in the run directory still means the same file.
        return recipe.model_copy(update={"weights": str(beside.resolve())})

    @classmethod
    def parse(cls, text: str, *, source: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a text; ``source`` is what messages call it.

        Raises:
            RecipeError: every fault with source, line and column.
        """
        return checked(cls, read_document(text, source), overrides)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe in a dictionary, with the same short forms as a file.

        Raises:
            RecipeError: every fault.
        """
        return checked(cls, document_of(data, "<recipe>"), ())

    def check_complete(self) -> None:
        """Check that the recipe can run on its own, without a model and data passed in from Python.

        Raises:
            RecipeError: it names no model or no data, or the network would be compressed untrained.
        """
        faults = []
        if "nas" in self.stages:
            faults += [
                f"{key}: leave it out; stage nas finds the network"
                for key, given in (("model", self.model), ("weights", self.weights))
                if given
            ]
        elif not self.model:
            faults.append("model: required, a network by name or package.module:factory")
        if self.data is None:
            faults.append("data: required, a data set by name or package.module:factory")
        if self.weights is None and "train" not in self.stages:
            faults.append("weights: required when stages leaves out train; the network would be untrained")
        if faults:
            raise RecipeError([f"{self.name}: {fault}" for fault in faults])

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; :meth:`parse` gives an equal recipe back."""
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # the stub says None
        # Characters such as U+0085 come back only when they are escaped.
        yaml.allow_unicode = False
        yaml.width = 4096
        text = io.StringIO()
        yaml.dump(self.model_dump(mode="json"), text)
        return text.getvalue()

    @property
    def is_series(self) -> bool:
        """Whether a budget has several limits."""
        return any(budget.then for budget in self.budgets)

    def members(self) -> tuple[Recipe, ...]:
        """A recipe for each limit of a series, the tightest last; just this one where there is one."""
        if not self.is_series:
            return (self,)
        count = max(len(budget.limits) for budget in self.budgets)
        members = []
        for number in range(count):
            limits = [b.limits[number] if b.then else b.limit for b in self.budgets]
            budgets = [
                b.model_copy(update={"limit": limit, "then": ()})
                for b, limit in zip(self.budgets, limits, strict=True)
            ]
            shown = "-".join(
                f"{b.metric}-{b.limit:g}" for b, old in zip(budgets, self.budgets, strict=True) if old.then
            )
            members.append(
                self.model_copy(update={"name": f"{self.name}-{shown}", "budgets": tuple(budgets)})
            )
        return tuple(members)

    @property
    def is_joint(self) -> bool:
        """Whether one search decides the architecture and what follows."""
        return "arch" in self.search.knobs

    @property
    def digest(self) -> str:
        """Hash of everything that can change the result, so of all but ``name`` and ``expected``."""
        data = self.model_dump(mode="json", exclude={"name", "expected"})
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def bundled_recipes() -> list[Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_recipes"
    # An editable install has no copy; there the repository's own folder is next to the package.
    folder = shipped if shipped.is_dir() else package.parent / "recipes"
    return sorted(folder.glob("*.yaml"))


def find_recipe(name_or_path: Path | str) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: a file, or the name of a bundled recipe with or without ``.yaml``.

    Raises:
        RecipeError: neither exists; lists the bundled names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = {recipe.stem: recipe for recipe in bundled_recipes()}
    name = str(name_or_path).removesuffix(".yaml")
    if name in bundled:
        return bundled[name]
    guess = did_you_mean(name, list(bundled))
    raise RecipeError(f"no recipe {str(name_or_path)!r}{guess}; bundled are {', '.join(bundled)}")
