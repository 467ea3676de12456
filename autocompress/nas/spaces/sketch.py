"""A network's :class:`~autocompress.core.LayerGraph` drawn up from its wiring, without making the network.

A :class:`Sketch` is told the same operations as the module's ``forward`` performs and keeps count of which
channels are tied. What it gives equals what :func:`autocompress.trace.trace` finds in the built network; the
tests hold the two together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autocompress.core.graph import ChannelGroup, LayerGraph, LayerSpec, Width

_OUTPUT_LOCK = "its channels are the network's output"
_Side = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Signal:
    """A feature map: its runs of channels, in order, and its spatial size.

    Args:
        runs: identifiers of runs of channels, empty for the network's input, which is tied to nothing.
        channels: number of channels.
        hw: (height, width).
    """

    runs: tuple[int, ...]
    channels: int
    hw: tuple[int, int]


class _Runs:
    """Union-find over runs of channels; a run that meets a shorter one is split."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self.parent: list[int] = []
        self.parts: dict[int, tuple[int, int]] = {}

    def new(self, size: int) -> int:
        self.size.append(size)
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def whole(self, runs: Sequence[int]) -> list[int]:
        """The unsplit roots that some runs now consist of, in order."""
        found: list[int] = []
        stack = list(reversed(runs))
        while stack:
            run = stack.pop()
            while self.parent[run] != run:
                run = self.parent[run]
            if run in self.parts:
                stack += reversed(self.parts[run])
            else:
                found.append(run)
        return found

    def tie(self, a: Sequence[int], b: Sequence[int]) -> None:
        left, right = self.whole(a)[::-1], self.whole(b)[::-1]
        while left and right:
            x, y = left.pop(), right.pop()
            if x == y:
                continue
            if self.size[x] > self.size[y]:
                (x, y), (left, right) = (y, x), (right, left)
            if self.size[x] < self.size[y]:
                self.parts[y] = (self.new(self.size[x]), self.new(self.size[y] - self.size[x]))
                right.append(self.parts[y][1])
                y = self.parts[y][0]
            self.parent[max(x, y)] = min(x, y)


@dataclass
class Sketch:
    """Collects layers in execution order; :meth:`graph` gives the result.

    Args:
        input_shape: of one sample, (channels, height, width).
    """

    input_shape: tuple[int, int, int]
    _layers: list[LayerSpec] = field(default_factory=list)
    _sides: dict[_Side, tuple[int, ...]] = field(default_factory=dict)
    _norms: list[_Side] = field(default_factory=list)
    _runs: _Runs = field(default_factory=_Runs)

    @property
    def input(self) -> Signal:
        """The images."""
        return Signal((), self.input_shape[0], self.input_shape[1:])

    def conv(
        self,
        name: str,
        x: Signal,
        channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        bias: bool = False,
    ) -> Signal:
        """A square convolution, padded so that stride 1 keeps the size, of any dilation."""
        hw = (-(-x.hw[0] // stride), -(-x.hw[1] // stride))
        runs = x.runs if depthwise else (self._runs.new(channels),)
        self._layers.append(
            LayerSpec(
                name=name,
                kind="conv",
                in_channels=x.channels,
                out_channels=channels,
                kernel=(kernel, kernel),
                stride=(stride, stride),
                groups=channels if depthwise else 1,
                in_hw=x.hw,
                out_hw=hw,
                bias=bias,
            )
        )
        self._sides[name, "in"], self._sides[name, "out"] = x.runs, runs
        return Signal(runs, channels, hw)

    def norm(self, name: str, x: Signal) -> Signal:
        """A BatchNorm with scale and shift."""
        self._norms.append((name, "norm"))
        self._sides[name, "norm"] = x.runs
        return x

    def linear(self, name: str, x: Signal, features: int) -> Signal:
        """A linear layer with bias on a globally pooled feature map."""
        runs = (self._runs.new(features),)
        self._layers.append(LayerSpec(name, "linear", x.channels, features, bias=True))
        self._sides[name, "in"], self._sides[name, "out"] = x.runs, runs
        return Signal(runs, features, (1, 1))

    def pool(self, x: Signal, stride: int) -> Signal:
        """Pooling or slicing to every ``stride``-th position: channels stay what they are."""
        return replace(x, hw=(-(-x.hw[0] // stride), -(-x.hw[1] // stride)))

    def add(self, a: Signal, b: Signal) -> Signal:
        """An element-wise sum, which ties channel by channel."""
        self._runs.tie(a.runs, b.runs)
        return a

    def concat(self, signals: Sequence[Signal]) -> Signal:
        """Channels one after the other."""
        runs = tuple(run for x in signals for run in x.runs)
        return Signal(runs, sum(x.channels for x in signals), signals[0].hw)

    def graph(self) -> LayerGraph:
        """The finished graph."""
        sides = {side: self._runs.whole(runs) for side, runs in self._sides.items()}
        groups, group_of = self._groups(sides)
        names = [group.name for group in groups]

        def width(side: _Side, fixed: int) -> Width:
            counts: Counter[int] = Counter(group_of[run] for run in set(sides[side]))
            times = Counter(group_of[run] for run in sides[side])
            return Width(
                0 if sides[side] else fixed,
                tuple((names[g], times[g] // counts[g]) for g in sorted(counts)),
            )

        layers = tuple(
            replace(
                layer,
                in_width=width((layer.name, "in"), layer.in_channels),
                out_width=width((layer.name, "out"), layer.out_channels),
            )
            for layer in self._layers
        )
        other = Width()
        for side in self._norms:
            other = other + 2 * width(side, 0)
        return LayerGraph(layers, tuple(groups), other, (), self.input_shape)

    def _groups(self, sides: dict[_Side, list[int]]) -> tuple[list[ChannelGroup], dict[int, int]]:
        """Runs that touch the same sides equally often form one group, named by its first producer."""
        place = {layer.name: index for index, layer in enumerate(self._layers)}
        touched: dict[int, Counter[_Side]] = {}
        for side, runs in sides.items():
            for run in runs:
                touched.setdefault(run, Counter())[side] += 1
        members: dict[frozenset[tuple[_Side, int]], list[int]] = {}
        for run in sorted(touched):
            members.setdefault(frozenset(touched[run].items()), []).append(run)

        def first(item: tuple[frozenset[tuple[_Side, int]], list[int]]) -> tuple[int, int]:
            return min(place.get(name, len(place)) for (name, _), _ in item[0]), item[1][0]

        groups: list[ChannelGroup] = []
        group_of: dict[int, int] = {}
        for signature, runs in sorted(members.items(), key=first):
            producers, consumers = (
                tuple(sorted({name for (name, s), _ in signature if s == side}, key=place.__getitem__))
                for side in ("out", "in")
            )
            taken = sum(group.producers[:1] == producers[:1] for group in groups)
            name = producers[0] if not taken else f"{producers[0]}#{taken + 1}"
            group_of |= {run: len(groups) for run in runs}
            locked = None if set(consumers) - set(producers) else _OUTPUT_LOCK
            size = sum(self._runs.size[run] for run in runs)
            groups.append(ChannelGroup(name, size, producers, consumers, locked))
        return groups, group_of
