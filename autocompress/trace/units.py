"""Units of channels: which are one and the same, which must stay, and where each is found.

A unit is what can be removed on its own. Following a network (see :mod:`autocompress.trace.follow`) makes
units where channels are made, joins those that an operation ties together, and locks those that cannot go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["in", "out"]
Place = tuple[str, Side | int]
"""Where channels are found: a side of a module, or an axis of a parameter or buffer."""
Labels = NDArray[np.int64]
"""Unit of every index of an axis, -1 for an index that never goes."""
FIXED = -1


@dataclass(frozen=True)
class Resolved:
    """What following a network found out.

    Args:
        units: place -> unit of every index, -1 for an index that never goes. Units are numbered in the order
            in which they were made.
        locks: unit -> why it cannot be removed, the first reason found.
    """

    units: dict[Place, Labels]
    locks: dict[int, str]


class Units:
    """Statements about units, collected in any order and resolved once."""

    def __init__(self) -> None:
        self.count = 0
        self.places: dict[Place, Labels] = {}
        self._fixed: dict[Place, NDArray[np.bool_]] = {}
        self._joined: list[tuple[Labels, Labels]] = []
        self._locked: list[tuple[Labels, str]] = []

    def new(self, count: int) -> Labels:
        """So many units that nothing is known about yet."""
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def made_at(self, place: Place, size: int) -> Labels:
        """The units of a place that makes channels; the same ones every time."""
        if place not in self.places:
            self.places[place] = self.new(size)
        return self.places[place]

    def read_at(self, place: Place, labels: Labels | None, size: int, reason: str) -> None:
        """A place reads these channels; ``reason`` locks those that meet indices which never go."""
        labels = np.full(size, FIXED) if labels is None else labels
        if place not in self.places:
            self.places[place], self._fixed[place] = labels.copy(), labels == FIXED
            return
        known = self.places[place]
        fixed = self._fixed[place] | (labels == FIXED)
        self.join(np.where(fixed, FIXED, known), np.where(fixed, FIXED, labels), reason)
        self.lock(np.concatenate([known[fixed], labels[fixed]]), reason)
        self._fixed[place] = fixed
        self.places[place] = np.where(known == FIXED, labels, known)

    def join(self, a: Labels, b: Labels, reason: str) -> None:
        """Units at the same positions are one; ``reason`` locks those that meet an index which never goes."""
        a, b = np.broadcast_arrays(a, b)
        both = (a != FIXED) & (b != FIXED)
        self._joined.append((a[both], b[both]))
        self.lock(np.concatenate([a[~both], b[~both]]), reason)

    def lock(self, labels: Labels | None, reason: str) -> None:
        """These units cannot be removed."""
        if labels is not None and (labels != FIXED).any():
            self._locked.append((labels[labels != FIXED].ravel(), reason))

    def resolve(self) -> Resolved:
        """All statements taken together."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        a, b = (np.concatenate([np.zeros(0, np.int64), *(pair[i] for pair in self._joined)]) for i in (0, 1))
        shape = (max(self.count, 1), max(self.count, 1))
        links = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=shape)
        _, component = connected_components(links, directed=False)
        _, first = np.unique(component, return_index=True)
        root = np.append(first[component], FIXED)  # the last entry answers for index -1
        locks: dict[int, str] = {}
        for labels, reason in self._locked:
            for unit in np.unique(root[labels]):
                locks.setdefault(int(unit), reason)
        return Resolved({place: root[labels] for place, labels in self.places.items()}, locks)
