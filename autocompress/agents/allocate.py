"""Exact allocation of bits when losses and costs add up over layers: one integer program."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from autocompress.core import Metric
from autocompress.core.errors import InfeasibleBudgetError

Floats = NDArray[np.float64]
Decisions = tuple[Hashable, ...]

_ABSOLUTE_GAP = 1e-6  # HiGHS stops there, with the largest loss as the unit
_SLACK = 1e-12  # as Budget.met_by
_NUM_TIGHTENINGS = 10


def allocate_bits(
    sensitivity: Sequence[Floats],
    cost: Mapping[Metric, Sequence[Floats]],
    limits: Mapping[Metric, float],
    *,
    decisions: Sequence[Decisions] | None = None,
    gap: float = 1e-6,
) -> list[tuple[int, ...]]:
    """The choices with the least total loss within every limit, by integer linear programming (HiGHS).

    Nothing is evaluated, so another limit costs another call: some tenths of a second for 53 layers with 49
    pairs of bits each.

    Args:
        sensitivity: per layer, the loss of each choice: shape (choices,), or (weight choices, activation
            choices) when both are decided. Any common scale.
        cost: metric -> per layer, the cost of each choice, in the same shapes.
        limits: metric -> what these costs may sum to; each has a ``cost``.
        decisions: per layer, a name for each axis of its array. Axes of one name take the same choice, as
            tied layers must. All different by default.
        gap: relative distance to the optimum at which the solver may stop.

    Returns:
        Per layer, the index of the choice along each axis.

    Raises:
        InfeasibleBudgetError: no choices meet every limit.
        ValueError: no layers, arrays that do not match, numbers that are not finite, or a limit without cost.

    Example:
        >>> loss = [np.array([4.0, 0.0]), np.array([1.0, 0.0])]
        >>> size = [np.array([4.0, 8.0]), np.array([4.0, 8.0])]
        >>> allocate_bits(loss, {"weight_bytes": size}, {"weight_bytes": 12.0})
        [(1,), (0,)]

    Source: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021, section 3.3. Differs from
    the paper in deciding activations as well, and in offering any number of widths.
    """
    losses = [np.asarray(array, np.float64) for array in sensitivity]
    tables = {name: [np.asarray(array, np.float64) for array in cost.get(name, ())] for name in limits}
    axes = list(decisions) if decisions is not None else _all_different(losses)
    _check(losses, tables, limits, axes)
    objective = _above_least(losses)
    program = _Program(objective, _equalities(losses, axes), *_limit_rows(tables, limits, len(objective)))
    chosen, most = program.solve(np.inf, gap), float(objective.max())
    while chosen is not None and _ABSOLUTE_GAP * most > gap * (value := float(objective @ chosen)):
        # Choices that lose more than a whole known solution are out, and the rest is solved more precisely.
        if value >= most / 2:
            break
        chosen, most = program.solve(value, gap), value
    if chosen is None:
        raise InfeasibleBudgetError(
            "no choices of bits meet every limit: "
            + ", ".join(f"{name} <= {limit:.6g}" for name, limit in limits.items())
        )
    return _indices(chosen, losses)


@dataclass(frozen=True)
class _Program:
    """One choice per layer, as an integer program over the choices of all layers.

    Args:
        objective: loss of every choice beyond the least of its layer.
        equal: each layer takes one choice, tied ones the same.
        rows, rooms: cost of every choice as shares of the limits, and how much fits.
    """

    objective: Floats
    equal: LinearConstraint
    rows: Floats
    rooms: Floats

    def solve(self, most: float, gap: float) -> Floats | None:
        """The best choices as zeros and ones, without any that loses more than ``most``; None if none fit."""
        possible = self.objective <= most
        for row, room in zip(self.rows, self.rooms, strict=True):
            possible &= row <= room + _SLACK
        scale = float(self.objective[possible].max(initial=0.0)) or 1.0
        tightened = self.rooms
        for _ in range(_NUM_TIGHTENINGS):
            limits = [LinearConstraint(self.rows, -np.inf, tightened)] if len(self.rows) else []
            with _silent():
                found = milp(
                    self.objective / scale,
                    constraints=[self.equal, *limits],
                    integrality=np.ones(len(possible)),
                    bounds=Bounds(0, possible.astype(np.float64)),
                    options={"mip_rel_gap": gap},
                )
            if found.x is None:
                return None
            chosen: Floats = np.round(found.x)
            over = self.rows @ chosen - self.rooms
            if (over <= _SLACK).all():
                return chosen
            # The solver allows itself 1e-6 beyond a limit, a budget does not.
            tightened = tightened - 1.01 * np.maximum(over, 0.0)
        return None


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps a left-over debugging line of HiGHS 1.8 to 1.12 (HiGHS.jl issue 312) off the standard output."""
    try:
        libc, saved = ctypes.CDLL(None), os.dup(1)
    except (OSError, TypeError):  # without a standard output, or without the C library of POSIX systems
        yield
        return
    libc.fflush(None)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)


def _above_least(arrays: Sequence[Floats]) -> Floats:
    return np.concatenate([(array - array.min()).ravel() for array in arrays])


def _limit_rows(
    tables: Mapping[Metric, Sequence[Floats]], limits: Mapping[Metric, float], num_choices: int
) -> tuple[Floats, Floats]:
    """What every choice costs beyond the cheapest of its layer, and how much of that fits, well scaled.

    Raises:
        InfeasibleBudgetError: the cheapest choices of all layers break a limit; names each with its floor.
    """
    rows, rooms, faults = [], [], []
    for name, limit in limits.items():
        floor = sum(float(array.min()) for array in tables[name])
        room = limit - floor
        if room < -_SLACK * abs(limit):
            faults.append(f"{name} <= {limit:.6g} cannot be met: the least is {floor:.6g}")
        row = _above_least(tables[name])
        scale = room if room > _SLACK * abs(limit) else float(row.max()) or 1.0
        rows.append(row / scale)
        rooms.append(max(room, 0.0) / scale)
    if faults:
        raise InfeasibleBudgetError("; ".join(faults) + ". Raise the limit or allow fewer bits.")
    return np.array(rows).reshape(len(rows), num_choices), np.array(rooms)


def _all_different(losses: Sequence[Floats]) -> list[Decisions]:
    return [tuple((layer, axis) for axis in range(array.ndim)) for layer, array in enumerate(losses)]


def _check(
    losses: Sequence[Floats],
    tables: Mapping[Metric, Sequence[Floats]],
    limits: Mapping[Metric, float],
    axes: Sequence[Decisions],
) -> None:
    faults = [] if losses else ["at least one layer is needed"]
    shapes = [array.shape for array in losses]
    if any(array.size == 0 for array in losses):
        faults.append("every layer needs at least one choice")
    arrays_of = {"sensitivity": losses, **{f"cost in {metric}": arrays for metric, arrays in tables.items()}}
    for what, arrays in arrays_of.items():
        if [array.shape for array in arrays] != shapes:
            faults.append(f"{what} needs one array per layer of the shapes of sensitivity")
        if wrong := [str(i) for i, array in enumerate(arrays) if not np.isfinite(array).all()]:
            faults.append(f"{what} must be finite; it is not in layers {', '.join(wrong)}")
    faults += [
        f"limit on {name} must be finite, got {v}" for name, v in limits.items() if not math.isfinite(v)
    ]
    if [len(names) for names in axes] != [len(shape) for shape in shapes]:
        faults.append("decisions need one name per axis of every layer")
    else:
        sizes: dict[Hashable, set[int]] = {}
        for names, shape in zip(axes, shapes, strict=True):
            for name, size in zip(names, shape, strict=True):
                sizes.setdefault(name, set()).add(size)
        faults += [
            f"axes of decision {name!r} must offer as many choices, got {sorted(found)}"
            for name, found in sizes.items()
            if len(found) > 1
        ]
    if faults:
        raise ValueError("; ".join(faults))


def _equalities(losses: Sequence[Floats], axes: Sequence[Decisions]) -> LinearConstraint:
    """Each layer takes one choice, and axes of one name take equal ones."""
    rows: list[tuple[NDArray[np.int64], Floats]] = []
    sums: list[float] = []
    first: dict[Hashable, list[NDArray[np.int64]]] = {}
    num_choices = 0
    for array, names in zip(losses, axes, strict=True):
        place = np.arange(num_choices, num_choices + array.size).reshape(array.shape)
        num_choices += array.size
        rows.append((place.ravel(), np.ones(array.size)))
        sums.append(1.0)
        for axis, name in enumerate(names):
            slices = [part.ravel() for part in np.moveaxis(place, axis, 0)]
            if name not in first:
                first[name] = slices
                continue
            for one, other in zip(first[name], slices, strict=True):
                rows.append((np.concatenate([one, other]), np.repeat([1.0, -1.0], [len(one), len(other)])))
                sums.append(0.0)
    at = np.repeat(np.arange(len(rows)), [len(columns) for columns, _ in rows])
    columns, signs = (np.concatenate(part) for part in zip(*rows, strict=True))
    return LinearConstraint(csr_array((signs, (at, columns)), shape=(len(rows), num_choices)), sums, sums)


def _indices(chosen: Floats, losses: Sequence[Floats]) -> list[tuple[int, ...]]:
    parts = np.split(chosen, np.cumsum([array.size for array in losses])[:-1])
    return [
        tuple(int(i) for i in np.unravel_index(int(part.argmax()), array.shape))
        for part, array in zip(parts, losses, strict=True)
    ]
