"""What a finished run left in its folder, read back and checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from autocompress.core import Cost, Metric, Plan, Result, Trial
from autocompress.core.errors import RunDirectoryError

_Content = TypeVar("_Content")
_EPOCH_FIGURES = ("epoch", "loss", "train_accuracy", "search_accuracy")

Searches = Mapping[str, tuple[Trial, ...]]
Training = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after, as in ``layers.json``.

    Args:
        locked: why its channels could not be changed, or None.
        bits_after: of weights and of the activations it reads; 32 is floating point.
        cost_before, cost_after: its part of what can be counted and of what the target says.
    """

    name: str
    kind: str
    group: str | None
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    macs_before: float
    macs_after: float
    params_before: int
    params_after: int
    locked: str | None
    bits_after: tuple[int, int] = (32, 32)
    cost_before: Mapping[Metric, float] = field(default_factory=dict)
    cost_after: Mapping[Metric, float] = field(default_factory=dict)


@dataclass(frozen=True)
class UniformPoint:
    """The network with the same bits in every layer that may have them, before training."""

    bits: int
    score: float
    cost: Mapping[Metric, float]


@dataclass(frozen=True)
class FoundArchitecture:
    """What stage nas found, as in ``architecture.json``.

    Args:
        space: name of the space.
        arch: decision -> operation.
        decisions: decision -> the operations it offers.
        probabilities: decision -> probability of each of them at the end.
        cost, largest, smallest: of the member found, and of the space's ends, by metric.
        budgets: of the stage.
        epochs: of the supernet's training; none where it was borrowed.
    """

    space: str
    arch: Mapping[str, str]
    decisions: Mapping[str, Sequence[str]]
    probabilities: Mapping[str, Sequence[float]]
    cost: Mapping[Metric, float]
    largest: Mapping[Metric, float]
    smallest: Mapping[Metric, float]
    budgets: Mapping[Metric, float]
    epochs: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunFiles:
    """The files of a finished run; None where one is missing.

    Args:
        result: what came of it.
        layers: before and after, in execution order.
        searches: stage -> search -> its trials; the stage's own search first.
        uniform: the same bits everywhere, by bits; only of runs that choose bits.
        training: stage -> epochs, training before what follows it.
        architecture: of runs with stage nas.
        recipe: its text.
    """

    result: Result
    layers: tuple[LayerChange, ...] | None
    searches: Mapping[str, Searches] | None
    uniform: tuple[UniformPoint, ...] | None
    training: Training | None
    architecture: FoundArchitecture | None
    recipe: str | None

    @classmethod
    def read(cls, run_dir: Path) -> RunFiles:
        """Read them.

        Raises:
            RunDirectoryError: the run has not finished, or a file is damaged.
        """
        source = run_dir / "result.json"
        if not source.exists():
            raise RunDirectoryError(
                f"{run_dir} holds no result.json: the run has not finished. "
                f"Go on with `autocompress run --resume {run_dir}` and report again."
            )
        result = _read(source, Result.from_json)
        searches = _read_optional(run_dir / "trials.json", _parse_searches)
        return cls(
            result,
            _read_optional(run_dir / "layers.json", _parse_layers),
            {stage: _own_first(result, stage, found) for stage, found in searches.items()}
            if searches is not None
            else None,
            _read_optional(run_dir / "uniform.json", _parse_uniform),
            _read_optional(run_dir / "training.json", _parse_training),
            _read_optional(run_dir / "architecture.json", _parse_architecture),
            _read_optional(run_dir / "recipe.yaml", str),
        )


def _own_first(result: Result, stage: str, searches: Searches) -> Searches:
    own = result.search.get(stage, {}).get("algorithm")
    return dict(sorted(searches.items(), key=lambda item: item[0] != own))


def _read(path: Path, parse: Callable[[str], _Content]) -> _Content:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
        raise RunDirectoryError(
            f"{path} is damaged ({type(fault).__name__}: {fault}); delete it and finish the run again with "
            f"`autocompress run --resume {path.parent}`"
        ) from fault


def _read_optional(path: Path, parse: Callable[[str], _Content]) -> _Content | None:
    return _read(path, parse) if path.exists() else None


def _parse_layers(text: str) -> tuple[LayerChange, ...]:
    return tuple(LayerChange(**layer) for layer in _load(text))


def _parse_searches(text: str) -> dict[str, Searches]:
    return {
        stage: {name: tuple(map(_trial, entries)) for name, entries in searches.items() if entries}
        for stage, searches in _load(text).items()
    }


def _trial(entry: Mapping[str, Any]) -> Trial:
    return Trial(
        Plan.from_json(json.dumps(entry["plan"])),
        float(entry["score"]),
        Cost(entry["cost"]),
        int(entry["index"]),
        float(entry["seconds"]),
        str(entry["source"]),
    )


def _parse_uniform(text: str) -> tuple[UniformPoint, ...]:
    return tuple(UniformPoint(**point) for point in _load(text))


def _parse_architecture(text: str) -> FoundArchitecture:
    found = _load(text)
    return FoundArchitecture(**{key.name: found[key.name] for key in fields(FoundArchitecture)})


def _parse_training(text: str) -> dict[str, list[dict[str, float]]]:
    """Stage -> epochs, training before what follows it; stages without epochs are left out."""
    stages = {
        name: [{key: float(epoch[key]) for key in _EPOCH_FIGURES} for epoch in epochs]
        for name, epochs in _load(text).items()
        if epochs
    }
    return dict(sorted(stages.items(), key=lambda item: not item[0].startswith("train")))


def _load(text: str) -> Any:
    """JSON without NaN and infinity, which Python's own reader lets through and no axis can show."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a figure")

    return json.loads(text, parse_constant=refuse)
