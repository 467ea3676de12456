"""Charts as SVG text: pure functions from numbers to markup, no scripts, no fonts, no network.

Colours come from the page's style sheet through classes (``c0`` to ``c6`` for series, ``before``, ``grid``,
``rule``), so one drawing serves light and dark pages and print. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

NUM_COLOURS = 7

LARGE = (940, 360)
SMALL = (470, 270)

_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 20, 14, 46
_BAR_WIDTH, _LABEL_WIDTH, _NOTE_WIDTH = 940, 240, 140
_ROW = 19
_LABEL_CHARACTERS = 30


def si(value: float, digits: int = 3) -> str:
    """A number with an SI prefix from k to T and at most ``digits`` significant digits.

    Example:
        >>> si(41_200_000), si(0.25), si(-1500)
        ('41.2 M', '0.25', '-1.5 k')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Compare the rounded number, so that 999,999 becomes 1 M and not 1e+03 k.
        if abs(float(f"{value:.{digits}g}")) >= factor:
            return f"{value / factor:.{digits}g} {prefix}"
    return f"{value:.{digits}g}"


def percent(share: float, digits: int = 3) -> str:
    """A share as a percentage with at most ``digits`` significant digits."""
    return f"{100 * share:.{digits}g} %"


def ticks(low: float, high: float, *, most: int = 6, whole: bool = False) -> tuple[float, ...]:
    """At most ``most`` evenly spaced round values; the first is <= ``low``, the last >= ``high``.

    Args:
        low: lower end of the range to cover.
        high: upper end; a range of zero width is widened.
        most: largest number of ticks, at least 3.
        whole: only whole numbers.
    """
    if high <= low:
        pad = max(abs(low) * 0.05, 1.0 if whole else 1e-3)
        low, high = low - pad, high + pad
    power = math.floor(math.log10((high - low) / most))
    power = max(power, 0) if whole else power
    for exponent in range(power, power + 3):
        for step in (f * 10.0**exponent for f in (1, 2, 2.5, 5)):
            if whole and step != round(step):
                continue
            # The margin keeps a bound that is a tick up to rounding from adding another step.
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first < most:
                return tuple(i * step for i in range(first, last + 1))
    raise ValueError(f"ticks need a finite range and most >= 3, got [{low}, {high}] and {most}")


@dataclass(frozen=True)
class Axis:
    """One axis of a chart; it spans its ticks.

    Args:
        label: what it shows, with the unit.
        ticks: at least two, ascending.
        share: write tick values, shares in [0, 1], as percentages.
    """

    label: str
    ticks: tuple[float, ...]
    share: bool = False

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, share: bool = False, whole: bool = False) -> Axis:
        """The axis whose ticks cover the values, at least one."""
        known = list(values)
        return cls(label, ticks(min(known), max(known), whole=whole), share)

    def fraction(self, value: float) -> float:
        """Where a value lies: 0 at the first tick, 1 at the last."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def text(self, tick: float) -> str:
        """A tick as text."""
        return percent(tick, 6) if self.share else si(tick, 6)


@dataclass(frozen=True)
class Series:
    """Points drawn in one colour.

    Args:
        name: for the legend.
        points: (x, y) in data units.
        colour: 0 to ``NUM_COLOURS - 1``.
        mark: ``dots``, ``ring`` (large and open), ``line``, ``step`` (holds each y until the next x),
            ``dashed``, or ``band`` (the points go around a filled area).
        titles: tooltips of dots and rings, one per point; the name where empty.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    mark: Literal["dots", "ring", "line", "step", "dashed", "band"]
    titles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A labelled vertical line at ``x``."""

    x: float
    label: str


@dataclass(frozen=True)
class _Plane:
    """Data units to places in a drawing of ``size`` (width, height)."""

    size: tuple[int, int]
    x_axis: Axis
    y_axis: Axis

    @property
    def right(self) -> int:
        return self.size[0] - _RIGHT

    @property
    def bottom(self) -> int:
        return self.size[1] - _BOTTOM

    def x(self, value: float) -> float:
        return round(_LEFT + self.x_axis.fraction(value) * (self.right - _LEFT), 2)

    def y(self, value: float) -> float:
        return round(self.bottom - self.y_axis.fraction(value) * (self.bottom - _TOP), 2)


def xy_chart(
    series: Sequence[Series], *, x: Axis, y: Axis, rule: Rule | None = None, size: tuple[int, int] = LARGE
) -> Markup:
    """Lines and points over two axes.

    Args:
        series: drawn in order, the last on top.
        x: horizontal axis; points outside it would be drawn outside the frame.
        y: vertical axis, likewise.
        rule: a limit to mark.
        size: width and height in the units of the text's 12; the page scales the drawing.

    Returns:
        One ``<svg>`` element.
    """
    plane = _Plane(size, x, y)
    marks = [_rule(rule, plane)] if rule is not None else []
    marks += [_series(s, plane) for s in series]
    return _svg(*size, f"{y.label} over {x.label}", [_frame(plane), *marks])


def _svg(width: int, height: int, label: str, body: Iterable[Markup]) -> Markup:
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}\n</svg>'
    )
    return Markup(opening).format(width, height, label, Markup("\n").join(body))


def _text(x: float, y: float, text: str, *, anchor: str = "middle", css: str = "tick") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, css, text)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(x1, y1, x2, y2, css)


def _frame(plane: _Plane) -> Markup:
    x, y, right, bottom = plane.x_axis, plane.y_axis, plane.right, plane.bottom
    parts = [_line(_LEFT, plane.y(t), right, plane.y(t), "grid") for t in y.ticks]
    parts += [_line(plane.x(t), bottom, plane.x(t), bottom + 4, "axis") for t in x.ticks]
    parts += [_text(_LEFT - 6, plane.y(t) + 4, y.text(t), anchor="end") for t in y.ticks]
    parts += [_text(plane.x(t), bottom + 17, x.text(t)) for t in x.ticks]
    parts.append(_line(_LEFT, bottom, right, bottom, "axis"))
    parts.append(_text((_LEFT + right) / 2, bottom + 38, x.label, css="label"))
    turned = '<text transform="translate(14 {}) rotate(-90)" text-anchor="middle" class="label">{}</text>'
    parts.append(Markup(turned).format((_TOP + bottom) / 2, y.label))
    return Markup("\n").join(parts)


def _rule(rule: Rule, plane: _Plane) -> Markup:
    at = plane.x(rule.x)
    # The label stands on the side with more room.
    side, anchor = (-5, "end") if plane.x_axis.fraction(rule.x) > 0.5 else (5, "start")
    label = _text(at + side, _TOP + 10, rule.label, anchor=anchor, css="note")
    return _line(at, _TOP, at, plane.bottom, "rule") + label


def _series(series: Series, plane: _Plane) -> Markup:
    places = [(plane.x(a), plane.y(b)) for a, b in series.points]
    css = f"c{series.colour} {series.mark}"
    if len(places) == 1 and series.mark != "ring":  # a line of one point would not show
        css = f"c{series.colour} dots"
    if len(places) == 1 or series.mark in ("dots", "ring"):
        radius = 7 if series.mark == "ring" else 3
        titles = series.titles or (series.name,) * len(places)
        dot = Markup('<circle cx="{}" cy="{}" r="{}" class="{}"><title>{}</title></circle>')
        circles = (dot.format(a, b, radius, css, t) for (a, b), t in zip(places, titles, strict=True))
        return Markup("\n").join(circles)
    if series.mark == "step":
        corners = [place for (_, y0), (x1, y1) in pairwise(places) for place in ((x1, y0), (x1, y1))]
        places = [*places[:1], *corners]
    points = " ".join(f"{a},{b}" for a, b in places)
    shape = "polygon" if series.mark == "band" else "polyline"
    line = Markup('<{0} points="{1}" class="{2}"><title>{3}</title></{0}>')
    return line.format(shape, points, css, series.name)


@dataclass(frozen=True)
class Row:
    """One layer in a bar chart.

    Args:
        label: name of the layer; shortened in the middle when long, whole in the tooltip.
        before, after: the two values, not negative.
        note: text at the right end.
        title: tooltip.
        locked: whether the layer could not be changed; drawn hatched.
    """

    label: str
    before: float
    after: float
    note: str
    title: str
    locked: bool = False


def kept_bars(rows: Sequence[Row], *, label: str) -> Markup:
    """One bar per row: ``after`` as a share of ``before``, over a track of full length.

    Args:
        rows: top to bottom; ``before`` above 0.
        label: of the horizontal axis.
    """
    axis = Axis(label, (0.0, 0.25, 0.5, 0.75, 1.0), share=True)

    def draw(row: Row, top: float) -> Markup:
        css = "locked" if row.locked else "c0"
        track = _bar(axis, top + 3, 12, 1.0, "track")
        return track + _bar(axis, top + 3, 12, row.after / row.before, css)

    return _bars(rows, axis, draw)


def paired_bars(rows: Sequence[Row], *, label: str, colours: tuple[str, str] = ("before", "c0")) -> Markup:
    """Two bars per row, ``before`` above ``after``, on a linear scale from 0.

    Args:
        rows: top to bottom, at least one.
        label: of the horizontal axis, with the unit.
        colours: classes of the upper and the lower bar.
    """
    axis = Axis.over(label, [0.0, *(max(r.before, r.after) for r in rows)])

    def draw(row: Row, top: float) -> Markup:
        upper = _bar(axis, top + 2, 7, row.before, colours[0])
        return upper + _bar(axis, top + 9, 7, row.after, colours[1])

    return _bars(rows, axis, draw)


def _bars(rows: Sequence[Row], axis: Axis, draw: Callable[[Row, float], Markup]) -> Markup:
    bottom = _TOP + len(rows) * _ROW
    ends = [(tick, _bar_x(tick, axis)) for tick in axis.ticks]
    body = [_HATCH, *(_line(at, _TOP, at, bottom, "grid") for _, at in ends)]
    for number, row in enumerate(rows):
        top = _TOP + number * _ROW
        parts = [
            _text(_LABEL_WIDTH - 8, top + 13, _shortened(row.label), anchor="end", css="row"),
            draw(row, top),
            _text(_BAR_WIDTH - 2, top + 13, row.note, anchor="end", css="row"),
            Markup("<title>{}</title>").format(row.title),
        ]
        body.append(Markup("<g>{}</g>").format(Markup("").join(parts)))
    body += [_text(at, bottom + 15, axis.text(tick)) for tick, at in ends]
    body.append(_text((ends[0][1] + ends[-1][1]) / 2, bottom + 34, axis.label, css="label"))
    return _svg(_BAR_WIDTH, bottom + 42, axis.label, body)


# A hatch, so that locked layers differ from others without colour too.
_HATCH = Markup(
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="6" height="6" class="hatch-ground"/>'
    '<line x1="0" y1="0" x2="0" y2="6" class="hatch-line"/></pattern></defs>'
)


def _bar_x(value: float, axis: Axis) -> float:
    return round(_LABEL_WIDTH + axis.fraction(value) * (_BAR_WIDTH - _LABEL_WIDTH - _NOTE_WIDTH), 2)


def _bar(axis: Axis, top: float, height: float, value: float, css: str) -> Markup:
    width = round(_bar_x(value, axis) - _LABEL_WIDTH, 2)
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="bar {}"/>').format(
        _LABEL_WIDTH, top, width, height, css
    )


def _shortened(name: str) -> str:
    """The name, its middle replaced where it is too long: both ends tell layers apart."""
    if len(name) <= _LABEL_CHARACTERS:
        return name
    half = (_LABEL_CHARACTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
