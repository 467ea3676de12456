"""YAML 1.2 read as plain data that remembers where each value stood.

Only what a settings file needs is let through: text, numbers, true, false, null, lists and mappings. Anchors
and aliases (a few lines can expand to gigabytes), tags and repeated keys are faults, and every fault is kept
so that it can be reported together with the faults of the values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from autocompress.core.errors import RecipeError

MAX_BYTES = 1_000_000
Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
# Plain scalars that YAML 1.2's core schema takes as text but ruamel.yaml resolves further.
_TEXT = {_TAG + "str", _TAG + "timestamp", _TAG + "merge", _TAG + "value"}


@dataclass(frozen=True, order=True)
class Mark:
    """A position: ``file:line:column``, or just the source where there are no lines."""

    rank: int
    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Place:
    """Where a value stands and what its author calls it.

    Args:
        name: dotted path as written.
        key, value: marks of the key and of the value; equal for list items.
    """

    name: str
    key: Mark
    value: Mark


@dataclass(frozen=True, order=True)
class Fault:
    """One thing wrong, at one place."""

    mark: Mark
    text: str

    def __str__(self) -> str:
        return f"{self.mark}: {self.text}"


@dataclass
class Document:
    """Plain data, the place of every value in it, and the faults found while reading.

    Args:
        data: the mapping at the root.
        places: path from the root -> place; the root's path is empty.
        faults: what is wrong so far.
    """

    data: dict[str, Any]
    places: dict[Path, Place]
    faults: list[Fault] = field(default_factory=list)

    def nearest(self, path: Path) -> Path:
        """The longest beginning of ``path`` that was written down."""
        while path not in self.places:
            path = path[:-1]
        return path

    def override(self, text: str) -> None:
        """Set one value from ``dotted.path=value``; the value is YAML on one line.

        Lists are indexed by number. Missing mappings on the way are created, so that an unknown path is
        found, with its suggestion, when the whole document is checked.
        """
        mark = Mark(1, 0, 0, f"--set {text}")
        dotted, equals, value = text.partition("=")
        steps = dotted.strip().split(".")
        if not equals or not all(steps):
            self.faults.append(Fault(mark, "an override is written path.to.key=value"))
            return
        try:
            target, path = self._descend(steps[:-1], mark)
            key = _key_in(target, steps[-1])
        except (LookupError, ValueError) as fault:
            self.faults.append(Fault(mark, str(fault.args[0])))
            return
        try:
            root = _compose(value, mark.source)
        except RecipeError:
            self.faults.append(Fault(mark, f"{value!r} is not one YAML value; put quotes around text"))
            return
        reader = _Reader(mark)
        target[key] = None if root is None else reader.value(root, (*path, key))
        self.faults += reader.faults
        self._forget((*path, key))
        for below in _paths(target[key], (*path, key)):
            self.places[below] = Place(".".join(map(str, below)), mark, mark)

    def _descend(self, steps: list[str], mark: Mark) -> tuple[Any, Path]:
        target: Any = self.data
        path: Path = ()
        for step in steps:
            key = _key_in(target, step)
            path = (*path, key)
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
                self.places[path] = Place(".".join(map(str, path)), mark, mark)
            target = target[key]
            if not isinstance(target, dict | list):
                raise ValueError(f"{'.'.join(map(str, path))} is {target!r}, which has nothing inside")
        return target, path

    def _forget(self, path: Path) -> None:
        for known in [p for p in self.places if p[: len(path)] == path]:
            del self.places[known]


def read_document(text: str, source: str) -> Document:
    """Read one YAML document.

    Args:
        text: the document.
        source: what to call it in messages, usually its path.

    Raises:
        RecipeError: not YAML, too large, more than one document, or not a mapping at the root. Faults that
            leave something to check are kept in the document instead.
    """
    start = Mark(0, 1, 1, source)
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise RecipeError(str(Fault(start, f"larger than {MAX_BYTES:,} bytes; that is no recipe")))
    root = _compose(text, source)
    if not isinstance(root, MappingNode):
        raise RecipeError(str(Fault(start, "must be a mapping of `key: value` lines at the top level")))
    reader = _Reader(start)
    data = reader.value(root, ())
    return Document(data, {(): Place("", start, start)} | reader.places, reader.faults)


def document_of(data: Mapping[str, Any], source: str) -> Document:
    """A document made of plain data; every place is just ``source``."""
    plain = _plain(data)
    mark = Mark(0, 0, 0, source)
    return Document(plain, {p: Place(".".join(map(str, p)), mark, mark) for p in _paths(plain, ())})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _paths(value: Any, path: Path) -> Iterator[Path]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _key_in(container: Any, step: str) -> str | int:
    if isinstance(container, dict):
        return step
    if not (step.isdecimal() and int(step) < len(container)):
        raise LookupError(f"{step!r} must be a position from 0 to {len(container) - 1} in this list")
    return int(step)


def _compose(text: str, source: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    try:
        root: Node | None = yaml.compose(text)
    except MarkedYAMLError as fault:
        at = fault.problem_mark or fault.context_mark
        place = f"{source}:{at.line + 1}:{at.column + 1}" if at else source
        raise RecipeError(f"{place}: not valid YAML: {fault.problem or fault.context}") from fault
    except YAMLError as fault:
        raise RecipeError(f"{source}: not valid YAML: {str(fault).splitlines()[0]}") from fault
    except RecursionError as fault:
        raise RecipeError(f"{source}: nested too deeply") from fault
    if yaml.version not in (None, (1, 2)):
        raise RecipeError(f"{source}: recipes are YAML 1.2; remove the %YAML directive")
    return root


class _Reader:
    """Turns composed nodes into plain data, collecting places and faults."""

    def __init__(self, start: Mark) -> None:
        self.start = start
        self.places: dict[Path, Place] = {}
        self.faults: list[Fault] = []
        self._seen: set[int] = set()
        construct = SafeConstructor(loader=YAML(typ="safe", pure=True))
        self._convert: dict[str, Callable[[Any], Any]] = {
            _TAG + "int": construct.construct_yaml_int,
            _TAG + "float": construct.construct_yaml_float,
            _TAG + "bool": construct.construct_yaml_bool,
            _TAG + "null": lambda node: None,
        }

    def value(self, node: Node, path: Path) -> Any:
        if id(node) in self._seen:
            return None
        self._seen.add(id(node))
        if node.anchor:
            self._fault(node, f"&{node.anchor}: anchors and aliases are not allowed; write the value out")
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return self._sequence(node, path)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        self._fault(node, f"tag {node.tag} is not allowed")
        return None

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in _TEXT:
                self._fault(key, "keys must be text; put quotes around it")
                continue
            name = str(key.value)
            if name in data:
                self._fault(key, f"key {name} is repeated; keep one of them")
                continue
            below = (*path, name)
            empty = isinstance(item, ScalarNode) and item.value == ""
            self._place(below, self._mark(key), self._mark(key if empty else item))
            data[name] = self.value(item, below)
        return data

    def _sequence(self, node: SequenceNode, path: Path) -> list[Any]:
        for index, item in enumerate(node.value):
            self._place((*path, index), self._mark(item), self._mark(item))
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def _scalar(self, node: ScalarNode) -> Any:
        tag = str(node.tag)
        if tag in _TEXT:
            return str(node.value)
        convert = self._convert.get(tag)
        if convert is None:
            self._fault(node, f"tag {tag} is not allowed")
            return None
        try:
            return convert(node)
        except (ValueError, LookupError):
            self._fault(node, f"{str(node.value)[:40]!r} is not a valid {tag.removeprefix(_TAG)}")
            return None

    def _mark(self, node: Node) -> Mark:
        if not self.start.line:
            return self.start
        at = node.start_mark
        return Mark(self.start.rank, at.line + 1, at.column + 1, self.start.source)

    def _place(self, path: Path, key: Mark, value: Mark) -> None:
        self.places[path] = Place(".".join(map(str, path)), key, value)

    def _fault(self, node: Node, text: str) -> None:
        self.faults.append(Fault(self._mark(node), text))
