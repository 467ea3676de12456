from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.pipeline.plots import (
    Axis,
    Row,
    Rule,
    Series,
    kept_bars,
    paired_bars,
    percent,
    si,
    ticks,
    xy_chart,
)

X = Axis("macs", (0.0, 50.0, 100.0))
Y = Axis("score", (0.0, 0.5, 1.0), share=True)
BOUNDS = st.floats(-1e6, 1e6).map(lambda v: round(v, 3))


def _frame(chart: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the grid of a chart over X and Y."""
    lines = [line.attrib for line in chart.findall("{*}line") if line.attrib["class"] == "grid"]
    heights = [float(line["y1"]) for line in lines]
    return float(lines[0]["x1"]), float(lines[0]["x2"]), min(heights), max(heights)


def _circles(chart: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in chart.findall("{*}circle")]


def test_the_ends_of_the_axes_are_the_corners_of_the_frame() -> None:
    points = ((0.0, 0.0), (100.0, 1.0), (50.0, 0.5))
    chart = ElementTree.fromstring(xy_chart([Series("a", points, 0, "dots")], x=X, y=Y))
    left, right, top, bottom = _frame(chart)
    assert _circles(chart) == [(left, bottom), (right, top), ((left + right) / 2, (top + bottom) / 2)]


def test_a_step_holds_each_value_until_the_next() -> None:
    points = ((0.0, 0.0), (50.0, 0.5), (100.0, 1.0))
    chart = ElementTree.fromstring(xy_chart([Series("a", points, 0, "step")], x=X, y=Y))
    left, right, top, bottom = _frame(chart)
    middle, half = (left + right) / 2, (top + bottom) / 2
    line = chart.find("{*}polyline")
    assert line is not None
    places = [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
    assert places == [(left, bottom), (middle, bottom), (middle, half), (right, half), (right, top)]


def test_a_line_of_one_point_shows_as_a_dot() -> None:
    chart = ElementTree.fromstring(xy_chart([Series("a", ((50.0, 0.5),), 3, "line")], x=X, y=Y))
    assert [c.attrib["class"] for c in chart.findall("{*}circle")] == ["c3 dots"]


@pytest.mark.parametrize(("at", "anchor"), [(90.0, "end"), (10.0, "start")])
def test_a_rule_stands_at_its_value_and_its_label_inside_the_frame(at: float, anchor: str) -> None:
    chart = ElementTree.fromstring(xy_chart([], x=X, y=Y, rule=Rule(at, "budget")))
    left, right, _, _ = _frame(chart)
    (rule,) = [line for line in chart.findall("{*}line") if line.attrib["class"] == "rule"]
    assert float(rule.attrib["x1"]) == pytest.approx(left + at / 100 * (right - left), abs=0.01)
    (label,) = [text for text in chart.findall("{*}text") if text.text == "budget"]
    assert label.attrib["text-anchor"] == anchor


def test_paired_bars_are_to_one_scale_from_zero() -> None:
    rows = [Row("a", 400.0, 100.0, "", ""), Row("b", 200.0, 0.0, "", "")]
    chart = ElementTree.fromstring(paired_bars(rows, label="MACs"))
    widths = [
        float(bar.attrib["width"]) for group in chart.findall("{*}g") for bar in group.findall("{*}rect")
    ]
    assert widths == pytest.approx([widths[0], widths[0] / 4, widths[0] / 2, 0], abs=0.01)


def test_kept_bars_are_shares_of_each_layers_own_width() -> None:
    rows = [Row("a", 512, 128, "", ""), Row("b", 16, 4, "", ""), Row("c", 10, 10, "", "", locked=True)]
    chart = ElementTree.fromstring(kept_bars(rows, label="kept"))
    bars = [group.findall("{*}rect") for group in chart.findall("{*}g")]
    shares = [float(kept.attrib["width"]) / float(track.attrib["width"]) for track, kept in bars]
    assert shares == pytest.approx([0.25, 0.25, 1.0], abs=1e-4)
    assert [kept.attrib["class"] for _, kept in bars] == ["bar c0", "bar c0", "bar locked"]


def test_a_hundred_layers_do_not_overlap() -> None:
    rows = [Row(f"layer{i}", 1, 1, "", "") for i in range(100)]
    chart = ElementTree.fromstring(kept_bars(rows, label="kept"))
    tops = [float(group.find("{*}text").attrib["y"]) for group in chart.findall("{*}g")]  # type: ignore[union-attr]
    assert min(b - a for a, b in pairwise(tops)) >= 15  # the text is 12 high
    assert tops[-1] < float(chart.attrib["viewBox"].split()[3])


def test_a_long_name_keeps_both_ends_and_stands_whole_in_the_tooltip() -> None:
    name = "features.stage3.block11.depthwise.convolution.weight"
    chart = ElementTree.fromstring(kept_bars([Row(name, 2, 1, "1 / 2", name)], label="kept"))
    group = chart.find("{*}g")
    assert group is not None
    shown = group.findtext("{*}text") or ""
    start, end = shown.split("…")
    assert len(shown) <= 30
    assert name.startswith(start)
    assert name.endswith(end)
    assert group.findtext("{*}title") == name


def test_labels_are_escaped() -> None:
    svg = kept_bars([Row("<b>&", 2, 1, "<i>", '"<u>')], label="<s>")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert {"<b>&", "<i>", '"<u>', "<s>"} <= set(texts)


@given(BOUNDS, BOUNDS, st.booleans())
def test_ticks_cover_the_range_evenly_with_few_round_steps(a: float, b: float, whole: bool) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, whole=whole)
    step = found[1] - found[0]
    slack = 1e-6 * step
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 6
    assert all(y - x == pytest.approx(step) for x, y in pairwise(found))
    assert f"{step:.6e}"[:4] in ("1.00", "2.00", "2.50", "5.00")
    assert not whole or all(t == round(t) for t in found)


def test_a_maximum_that_is_a_round_number_is_the_last_tick() -> None:
    assert ticks(0, 300, whole=True) == (0, 100, 200, 300)
    assert ticks(0, 1) == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (41_200_000, "41.2 M"),
        (999_999, "1 M"),
        (-1500, "-1.5 k"),
        (0.25, "0.25"),
    ],
)
def test_si_keeps_three_digits_and_rolls_over_to_the_next_prefix(value: float, text: str) -> None:
    assert si(value) == text


def test_shares_are_written_as_percentages() -> None:
    assert percent(0.49709) == "49.7 %"
    assert Y.text(0.5) == "50 %"
