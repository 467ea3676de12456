"""Machines as YAML: a model and its constants, each with its source."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from autocompress.core.errors import AutocompressError
from autocompress.core.wording import did_you_mean
from autocompress.hardware_sim.model import HardwareModel

MODELS: dict[str, str] = {
    "systolic": "autocompress.hardware_sim.systolic:Systolic",
    "row_stationary": "autocompress.hardware_sim.row_stationary:RowStationary",
    "roofline": "autocompress.hardware_sim.roofline:Roofline",
    "bit_fusion": "autocompress.hardware_sim.bit_fusion:BitFusion",
    "bit_serial": "autocompress.hardware_sim.bit_serial:BitSerial",
    "finn_dataflow": "autocompress.hardware_sim.finn_dataflow:FinnDataflow",
    "binary_dataflow": "autocompress.hardware_sim.binary_dataflow:BinaryDataflow",
    "cenn": "autocompress.hardware_sim.cenn:CellularNetwork",
    "lookup": "autocompress.hardware_sim.lookup:Lookup",
    "measured": "autocompress.hardware_sim.measured:Measured",
}
"""Model name in target files -> class."""

FOLDER = Path(__file__).resolve().parent / "targets"
MAX_BYTES = 1_000_000
MEASURED = "this-cpu"
"""The target that is not shipped but measured, by ``autocompress profile``."""


class TargetError(AutocompressError):
    """A target file is wrong; every fault is listed."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


def bundled_targets() -> list[Path]:
    """The target files that come with the package, by name."""
    return sorted(FOLDER.glob("*.yaml"))


def load_target(name_or_path: str | Path, *, batch: int = 1) -> HardwareModel:
    """The cost model of a machine.

    Args:
        name_or_path: a YAML file, the name of one in the working directory, or a bundled target's name.
        batch: samples priced together; figures are per sample.

    Raises:
        TargetError: no such target, or its file is wrong: unknown model or key, a constant that is missing,
            not positive, of the wrong type or without a source. All faults at once.

    Example:
        >>> load_target("systolic-16x16").kind
        'systolic'
    """
    if batch < 1:
        raise TargetError([f"batch must be >= 1, got {batch}"])
    path = _find(str(name_or_path))
    return replace(parse_target(_read(path), source=str(path)), batch=batch)  # type: ignore[type-var]


def _find(name: str) -> Path:
    """A file, a target measured into the working directory, or a bundled one."""
    for path in (Path(name), Path(f"{name}.yaml"), FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    if name == MEASURED:
        raise TargetError(
            [f"no {MEASURED}.yaml here: every machine measures its own; run `autocompress profile`"]
        )
    known = [file.stem for file in bundled_targets()]
    raise TargetError([f"no target {name!r}{did_you_mean(name, known)}; bundled are {', '.join(known)}"])


def parse_target(data: Any, *, source: str) -> HardwareModel:
    """The cost model a target's mapping describes; see :func:`load_target`."""
    if not isinstance(data, Mapping):
        raise TargetError([f"{source}: a target file is a mapping with name, model, about and constants"])
    faults = [
        f"{source}: unknown key {key!r}{did_you_mean(str(key), ['name', 'model', 'about', 'constants'])}"
        for key in data
        if key not in {"name", "model", "about", "constants"}
    ]
    faults += [
        f"{source}: {key}: required, a text" for key in ("name", "model", "about") if not _text(data, key)
    ]
    kind, constants = data.get("model"), data.get("constants", {})
    if isinstance(kind, str) and kind not in MODELS:
        faults.append(f"{source}: model: no model {kind!r}{did_you_mean(kind, list(MODELS))}")
    if not isinstance(constants, Mapping):
        faults.append(f"{source}: constants: must be a mapping of name to {{value, source}}")
    if not isinstance(kind, str) or kind not in MODELS or not isinstance(constants, Mapping):
        raise TargetError(faults)
    module, name = MODELS[kind].split(":")
    cls: type[HardwareModel] = getattr(importlib.import_module(module), name)
    values = _constants(cls, constants, source, faults)
    if faults:
        raise TargetError(faults)
    try:
        return cls(name=data["name"], **values)  # type: ignore[call-arg]
    except ValueError as fault:
        raise TargetError([f"{source}: {fault}"]) from fault


def _constants(
    cls: type[HardwareModel], constants: Mapping[str, Any], source: str, faults: list[str]
) -> dict[str, Any]:
    """Check every constant against the fields of the model's dataclass."""
    known = {f.name: f for f in fields(cls) if f.name not in {"name", "batch"}}  # type: ignore[arg-type]
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, entry in constants.items():
        where = f"{source}: constants.{key}"
        if key not in known:
            faults.append(f"{where}: unknown constant{did_you_mean(str(key), list(known))}")
        elif not isinstance(entry, Mapping) or set(entry) - {"value", "source"} or "value" not in entry:
            faults.append(f"{where}: must be {{value: ..., source: ...}}")
        elif not _text(entry, "source"):
            faults.append(f"{where}: source: required, a text that says where the figure comes from")
        else:
            values[key] = _value(entry["value"], types[key], where, faults)
    faults += [
        f"{source}: constants.{name}: required"
        for name, f in known.items()
        if name not in constants and f.default is MISSING and f.default_factory is MISSING
    ]
    return values


def _value(value: Any, wanted: Any, where: str, faults: list[str]) -> Any:
    if isinstance(value, bool) or wanted is bool:
        if not (isinstance(value, bool) and wanted is bool):
            faults.append(f"{where}: must be {getattr(wanted, '__name__', wanted)}, got {value!r}")
        return value
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or value <= 0:
            faults.append(f"{where}: must be a number > 0, got {value}")
        elif wanted is int and value != int(value):
            faults.append(f"{where}: must be a whole number, got {value}")
        elif wanted is str:
            faults.append(f"{where}: must be a text, got {value}")
        return int(value) if wanted is int else value
    if wanted in (int, float):
        faults.append(f"{where}: must be a number, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _read(path: Path) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise TargetError([f"{path}: larger than {MAX_BYTES:,} bytes, so not a target file"])
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = False
    try:
        return yaml.load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, OSError) as fault:
        raise TargetError([f"{path}: cannot be read as YAML: {' '.join(str(fault).split())}"]) from fault


def _text(data: Mapping[str, Any], key: str) -> bool:
    return isinstance(data.get(key), str) and bool(data[key].strip())
