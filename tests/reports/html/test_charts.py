"""Charts: scales, labels and marks fit the values that they show."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest

from quantkit.reports.html.charts import (
    Axis,
    Bar,
    Cell,
    Point,
    Strip,
    bars,
    heat,
    pareto_front,
    scatter,
    strips,
)
from quantkit.reports.html.svg import Box, Scale, element, label_places, number, shortened


def point(x: float, y: float, name: str = "p") -> Point:
    return Point(name, x, y, y * 0.9, y * 1.1, "artifact")


def test_the_front_is_what_nothing_beats() -> None:
    points = [point(x, y) for x, y in [(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 2)]]
    assert [(p.x, p.y) for p in pareto_front(points)] == [(1, 5), (2, 3), (4, 1)]
    for a, b in itertools.product(pareto_front(points), points):
        assert not (b.x <= a.x and b.y <= a.y and (b.x, b.y) != (a.x, a.y))


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([1.7, 1.8], False),
        ([0, 0], False),
        ([5.0], True),
        ([3e-9, 0.2], True),
        ([0.00061, 0.00145], True),
        ([0, math.nan, 2], True),
        ([], True),
    ],
)
def test_scales_hold_their_values_and_have_round_ticks(values: list[float], log: bool) -> None:
    scale = Scale.around(values, 10, 110, log=log)
    for value in values:
        assert math.isnan(value) or 10 <= scale(value) <= 110
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9 and ticks == sorted(ticks)
    assert 10 <= scale(ticks[0]) < scale(ticks[-1]) <= 110
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in ticks)


def test_numbers_are_as_people_write_them() -> None:
    assert [number(v) for v in (0, 0.0001, 12000, 1e-5, 3e-7, 2e9)] == [
        *("0", "0.0001", "12,000", "10⁻⁵", "3·10⁻⁷", "2·10⁹")
    ]


def test_labels_keep_apart_and_inside() -> None:
    frame = Box(0, 0, 400, 260)
    spots = [(100.0, 100.0), (108.0, 104.0), (395.0, 5.0), (200.0, 255.0)]
    names = ["first-model", "second-model", "third-model", "fourth-model"]
    places = label_places(spots, names, frame, [])
    boxes = [Box(x, y - 10, x + 6 * len(n), y) for (x, y), n in zip(places, names, strict=True)]
    assert all(a.shared(b) == 0 for a, b in itertools.combinations(boxes, 2))
    assert all(b.left >= 0 and b.top >= 0 and b.right <= 400 and b.bottom <= 260 for b in boxes)


def test_markup_in_a_name_stays_text() -> None:
    assert (
        element("text", "<b>&", class_='"x"') == '<text class="&#34;x&#34;">&lt;b&gt;&amp;</text>'
    )


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("a", 10.0, "10", "artifact"), Bar("b", 5.0, "5", "fail"), Bar("c", None, "–", "x")]
    widths = [float(rect.attrib["width"]) for rect in ET.fromstring(bars("t", rows)).iter("rect")]
    assert len(widths) == 2 and widths[0] == pytest.approx(2 * widths[1], rel=1e-3)


def test_heat_is_stronger_for_larger_errors_and_survives_zero() -> None:
    cells = [Cell("q", 0, 0.0), Cell("q", 1, 0.001), Cell("q", 2, 0.1)]
    shades = [
        float(rect.attrib["fill-opacity"])
        for rect in ET.fromstring(heat("t", cells, (0.001, 0.1))).iter("rect")
    ]
    assert shades[0] == shades[1] < shades[2] == 1
    ET.fromstring(heat("t", cells[1:2], (0.001, 0.001)))


def test_charts_hold_one_point_and_thousands() -> None:
    ET.fromstring(scatter("t", [point(1, 1)], Axis("x"), Axis("y", log=True), None))
    many = tuple(0.001 * (1 + i % 97) for i in range(5000))
    drawn = strips("t", [Strip("a", many, 0.05, 0.04, 0.06, "0.05", "artifact")], Axis("x", True))
    assert len(list(ET.fromstring(drawn).iter("circle"))) == 301


@pytest.mark.parametrize(
    "names",
    [
        ["a-recipe-of-a-long-name-with-4-bits", "a-recipe-of-a-long-name-with-8-bits"],
        ["monday/a-directory-of-a-long-name", "tuesday/a-directory-of-a-long-name"],
        ["experiments-with-a-long-name/seed-1/out", "experiments-with-a-long-name/seed-2/out"],
    ],
)
def test_names_stay_different_when_they_are_cut(names: list[str]) -> None:
    cut = shortened(names, 126)
    assert len(set(cut)) == 2 and all(len(name) <= 18 and "…" in name for name in cut)
    assert shortened(["short", names[0]], 126)[0] == "short"
