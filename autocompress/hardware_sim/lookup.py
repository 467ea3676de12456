"""A machine as a table of measurements: layers and blocks are looked up, the rest is regressed or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core.cost import Metric
from autocompress.hardware_sim.lookup_table import MeasuredTable, Regression, entry_features, read_table
from autocompress.hardware_sim.model import HardwareModel, LayerCosts, UnsupportedLayerError, refuse
from autocompress.hardware_sim.table import Floats, Ints, LayerTable

_NONE = -1


@dataclass(frozen=True)
class Lookup(HardwareModel):
    """Latency, and energy if the table has it, from measurements of single layers or of blocks of layers.

    A layer is found by its channels, square window, stride, groups, input size and bits; a block by the
    facts of its consecutive layers, its cost shared out by MACs. The longest block wins; where two of one
    length overlap, the first. Layers that are not in the table are an error, or priced by a regression in the
    logarithms of MACs, activation bits and weight bits, fitted to the whole table.

    A table is as monotone as its measurements: noise can make a larger layer cheaper, and searches that rely
    on the opposite may then miss plans. The published formats are those of ProxylessNAS (Cai et al., ICLR
    2019) and HAQ (Wang et al., CVPR 2019); see :func:`.read_table` and :func:`.bit_table_rows`.

    Args:
        name: of the target.
        table: path of a CSV or JSON file from the working directory; see :func:`.read_table`.
        missing: ``error`` or ``regress``.
        measured_batch: samples of one measurement.
        units_per_ms: what the table's latencies are in; 1 for milliseconds, the clock in kHz for cycles.
        batch: samples priced together, the table's; figures are per sample.

    Raises:
        ValueError: a wrong table, with every wrong row named, or ``missing`` is neither.
    """

    kind: ClassVar[str] = "lookup"
    mapping: ClassVar[str] = "as measured"
    energy_table: ClassVar[str] = "as measured; none if the table has no energies"

    name: str
    table: str
    missing: str = "error"
    measured_batch: int = 1
    units_per_ms: float = 1.0
    batch: int = 1

    def __post_init__(self) -> None:
        if self.missing not in ("error", "regress"):
            raise ValueError(f"missing must be error or regress, got {self.missing!r}")
        _ = self.measurements  # a wrong table shows when the target is loaded, not in the middle of a search

    @cached_property
    def additive(self) -> bool:  # type: ignore[override]
        """Whether the table has single layers only; blocks are found in whole networks."""
        return all(len(entry.layers) == 1 for entry in self.measurements.entries)

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Latency, and energy if it was measured."""
        return ("latency_ms", "energy_mj") if self.measurements.has_energy else ("latency_ms",)

    @cached_property
    def measurements(self) -> MeasuredTable:
        """The table as read from its file."""
        return read_table(self.table)

    def layer_costs(self, table: LayerTable) -> LayerCosts:
        """Costs of the layers of one network; see :meth:`network_costs`."""
        return self.network_costs(table, len(table))

    def network_costs(self, table: LayerTable, num_layers: int) -> LayerCosts:
        """Costs of every layer; ``extra["measured"]`` is 1 for measured and 0 for regressed ones.

        The utilisation is not known and given as 0.

        Raises:
            UnsupportedLayerError: layers that are not in the table where that is an error, or another batch
                than the measured one.
        """
        if self.batch != self.measured_batch:
            raise UnsupportedLayerError(
                f"{self.name} was measured with batch {self.measured_batch}; ask for that, not {self.batch}"
            )
        owner, share = self._matches(table, num_layers)
        found = owner != _NONE
        if self.missing == "error":
            way_out = "measure them, or set missing: regress"
            refuse((~found, f"{self.name} has no measurement of them in {self.table}; {way_out}"))
        units = self._costs(table, owner, share, self._latencies)
        energy = {}
        if self.measurements.has_energy:
            energy["measured"] = self._costs(table, owner, share, self._energies) * (1e9 / self.batch)
        return LayerCosts(
            latency_ms=units / (self.units_per_ms * self.batch),
            energy_pj=energy,
            utilisation=np.zeros(len(table)),
            memory_bound=np.zeros(len(table), dtype=np.bool_),
            extra={"measured": found.astype(np.float64)},
        )

    @cached_property
    def _latencies(self) -> Floats:
        return np.array([entry.latency for entry in self.measurements.entries])

    @cached_property
    def _energies(self) -> Floats:
        return np.array([entry.energy_mj for entry in self.measurements.entries], dtype=np.float64)

    @cached_property
    def _symbols(self) -> dict[tuple[int, ...], int]:
        """Distinct layers of the table -> running number."""
        distinct = dict.fromkeys(facts for entry in self.measurements.entries for facts in entry.layers)
        return {facts: i for i, facts in enumerate(distinct)}

    @cached_property
    def _codes(self) -> dict[int, tuple[Ints, Ints]]:
        """Number of layers -> sorted codes of such entries, and their indices; longest first."""
        by_length: dict[int, list[tuple[int, int]]] = {}
        for index, entry in enumerate(self.measurements.entries):
            code = 0
            for facts in entry.layers:
                code = code * len(self._symbols) + self._symbols[facts]
            by_length.setdefault(len(entry.layers), []).append((code, index))
        pairs = {length: np.array(sorted(by_length[length])) for length in sorted(by_length, reverse=True)}
        return {length: (p[:, 0], p[:, 1]) for length, p in pairs.items()}

    def _matches(self, table: LayerTable, num_layers: int) -> tuple[Ints, Floats]:
        """Index of each layer's entry, or -1, and the layer's share of it; both of shape (N,).

        A block lies within one network of ``num_layers`` layers, never across two.
        """
        symbols = self._symbols_of(table)
        owner = np.full(len(table), _NONE, dtype=np.int64)
        share, macs = np.ones(len(table)), table.macs.astype(np.float64)
        for length, (codes, entries) in self._codes.items():
            if num_layers < length:
                continue
            within = np.arange(len(table) - length + 1) % num_layers <= num_layers - length
            starts, found = self._starts(symbols, owner, within, codes)
            total = sum(macs[starts + k] for k in range(length))
            for k in range(length):
                owner[starts + k] = entries[found]
                share[starts + k] = macs[starts + k] / total
        return owner, share

    def _symbols_of(self, table: LayerTable) -> Ints:
        """Number of each layer in :attr:`_symbols`, or -1; distinct layers are looked up once."""
        even = (table.kernel_h == table.kernel_w) & (table.stride_h == table.stride_w)
        square = even & (table.transposed == 0)
        columns = [
            *(table.in_channels, table.out_channels, table.kernel_h * square, table.stride_h, table.groups),
            *(table.in_h, table.in_w, table.weight_bits, table.act_bits),
        ]
        first, inverse = _distinct(columns)
        rows = np.stack([column[first] for column in columns], axis=1).tolist()
        numbers = np.array([self._symbols.get(tuple(row), _NONE) for row in rows], dtype=np.int64)
        return numbers[inverse]

    def _starts(
        self, symbols: Ints, owner: Ints, within: NDArray[np.bool_], codes: Ints
    ) -> tuple[Ints, Ints]:
        """First layers of the matching entries of one length, and the places of their codes.

        Args:
            symbols, owner: of every layer, shape (N,).
            within: whether an entry may start at the layer, shape (N - length + 1,).
            codes: of the entries of that length, ascending.
        """
        last = len(within)
        length = len(symbols) - last + 1
        windows = [symbols[k : last + k] for k in range(length)]
        free = np.all([(owner[k : last + k] == _NONE) & (windows[k] != _NONE) for k in range(length)], axis=0)
        code = np.zeros(last, dtype=np.int64)
        for window in windows:
            code = code * len(self._symbols) + window
        place = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
        match = within & free & (codes[place] == code)
        before = match.copy()
        for k in range(1, length):
            match[k:] &= ~before[:-k]
        starts = np.flatnonzero(match)
        return starts, place[starts]

    def _costs(self, table: LayerTable, owner: Ints, share: Floats, measured: Floats) -> Floats:
        """Measured costs where there are any, regressed ones elsewhere."""
        costs = measured[owner] * share
        missing = owner == _NONE
        if missing.any():
            known = np.array([entry_features(entry) for entry in self.measurements.entries])
            costs[missing] = Regression.fit(known, measured).predict(_features(table)[missing])
        return costs


def _distinct(columns: Sequence[Ints]) -> tuple[Ints, Ints]:
    """First row of every distinct row of whole numbers >= 0, and which of them each row is.

    Rows become single numbers, renumbered before they overflow; NumPy's own ``unique`` over rows is ten
    times slower on the populations of a search.
    """
    code, span = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        size = int(column.max(initial=0)) + 1
        if span > np.iinfo(np.int64).max // size:
            code = np.unique(code, return_inverse=True)[1].reshape(-1).astype(np.int64)
            span = int(code.max(initial=0)) + 1
        code, span = code * size + column, span * size
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _features(table: LayerTable) -> Floats:
    """MACs, activation bits and weight bits of every layer, shape (N, 3)."""
    values = table.in_channels * table.in_h * table.in_w + table.out_channels * table.out_h * table.out_w
    columns = [table.macs, values * table.act_bits, table.kernel_weights * table.weight_bits]
    return np.stack(columns, axis=1).astype(np.float64)
