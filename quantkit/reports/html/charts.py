"""Charts as SVG, from plain values: scatter plot, strips, bars, heat map, rates.

All are 440 pixels wide, so that a phone shows them whole. Marks have labels beside them in place of
a legend. ``kind`` is a class of the style sheet: artifact, fail, unsure or reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from quantkit.reports.html.svg import (
    Box,
    Scale,
    axis_below,
    drawing,
    element,
    label_places,
    line,
    number,
    shortened,
    text,
    tip,
)

WIDTH = 440.0
MOST_DOTS = 300


@dataclass(frozen=True)
class Axis:
    title: str
    log: bool = False


@dataclass(frozen=True)
class Point:
    """A dot, with the interval ``low`` to ``high`` of its y."""

    name: str
    x: float
    y: float
    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Strip:
    """Many values under one name, and their mean with its interval; ``label``: the mean as text."""

    name: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    label: str
    kind: str


@dataclass(frozen=True)
class Bar:
    """One value with its label; None where it is missing, which the label then explains."""

    name: str
    value: float | None
    label: str
    kind: str


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map, by the name of its row and the number of its column."""

    row: str
    column: int
    value: float


@dataclass(frozen=True)
class Rate:
    """A share of cases with its interval, beside the baseline's."""

    name: str
    value: float
    low: float
    high: float
    baseline: float
    label: str
    kind: str


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: the points to which no other is at least equal in both x and y."""
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if point.y < best:
            best = point.y
            kept.append(point)
    return kept


def scatter(
    title: str, points: Sequence[Point], x: Axis, y: Axis, floor: tuple[float, str] | None
) -> Markup:
    """Points with intervals, their Pareto front, and a horizontal line at ``floor`` (y, name)."""
    frame = Box(58, 14, WIDTH - 14, 266 + 16 * max(len(points) - 6, 0))  # room for labels
    across = Scale.around([p.x for p in points], frame.left + 30, frame.right - 30, log=x.log)
    values = [v for p in points for v in (p.y, p.low, p.high)] + ([floor[0]] if floor else [])
    up = Scale.around(values, frame.bottom, frame.top, log=y.log)
    marks = axis_below(across, frame.bottom, x.title)
    marks.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    for value in up.ticks():
        marks.append(line(frame.left, up(value), frame.right, up(value), "grid"))
        marks.append(
            text(frame.left - 6, up(value) + 4, number(value), anchor="end", class_="tick")
        )
    blocked = []  # where labels can't go
    if floor:
        height = up(floor[0])
        marks.append(line(frame.left, height, frame.right, height, "floor"))
        marks.append(text(frame.right, height - 5, floor[1], anchor="end", class_="quiet"))
        blocked.append(Box(frame.right - 6.7 * len(floor[1]), height - 16, frame.right, height))
    edge = pareto_front(points)
    corners = _steps([(across(p.x), up(p.y)) for p in edge], frame)
    path = "M" + "L".join(f"{left:.1f} {height:.1f}" for left, height in corners)
    marks.append(element("path", d=path, class_="front"))
    blocked += [
        Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1)
        for (a, b), (c, d) in pairwise(corners)
    ]
    spots = [(across(p.x), up(p.y)) for p in points]
    names = shortened([point.name for point in points], 170)
    for point, (left, top) in zip(points, spots, strict=True):
        marks.append(line(left, up(point.low), left, up(point.high), f"whisker {point.kind}"))
        class_ = f"dot {point.kind}" + ("" if point in edge else " beaten")
        hint = f"{point.name}: {rounded(point.x)}; {rounded(point.y)}"
        marks.append(element("circle", tip(hint), cx=left, cy=top, r=5.0, class_=class_))
    for name, (left, base) in zip(names, label_places(spots, names, frame, blocked), strict=True):
        marks.append(text(left, base, name, class_="label"))
    marks.append(text(0, 10, y.title, class_="axis-title"))
    return drawing(WIDTH, frame.bottom + 38, title, marks)


def strips(title: str, rows: Sequence[Strip], axis: Axis) -> Markup:
    """One strip of dots a row, with the mean and its interval below the dots."""
    step, left, right = 58.0, 8.0, WIDTH - 8
    scale = Scale.around([v for row in rows for v in row.values], left, right, log=axis.log)
    bottom = step * len(rows) + 6
    marks = [line(scale(value), 4, scale(value), bottom, "grid") for value in scale.ticks()]
    marks.append(line(left, bottom, right, bottom, "axis"))
    names = shortened([row.name for row in rows], 250)
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = index * step
        marks.append(text(left, top + 14, name, class_="label"))
        marks.append(text(right, top + 14, row.label, anchor="end", class_="figure"))
        dots = [
            # The golden ratio spreads neighboring dots, and the same rows get the same picture.
            element("circle", cx=scale(v), cy=top + 24 + 16 * ((i * 0.618034) % 1), r=2.2)
            for i, v in enumerate(_thinned(row.values))
        ]
        marks.append(element("g", *dots, class_=f"dots {row.kind}"))
        marks.append(line(scale(row.low), top + 48, scale(row.high), top + 48, f"span {row.kind}"))
        marks.append(
            element("circle", cx=scale(row.mean), cy=top + 48, r=3.5, class_=f"dot {row.kind}")
        )
    return drawing(WIDTH, bottom + 38, title, marks + axis_below(scale, bottom, axis.title))


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Bars from zero, each with its label; only the label where the value is missing."""
    step, left, right = 24.0, 132.0, WIDTH - 74
    most = max((row.value or 0.0 for row in rows), default=0.0) or 1.0
    marks = []
    names = shortened([row.name for row in rows], left - 6)
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = index * step
        marks.append(element("text", tip(row.name), name, x=0, y=top + 15.5, class_="label"))
        width = (row.value or 0.0) / most * (right - left)
        if row.value is not None:
            box = {"x": left, "y": top + 4, "width": max(width, 1.0), "height": step - 9}
            marks.append(element("rect", **box, rx=1.5, class_=f"bar {row.kind}"))
        class_ = "quiet" if row.value is None else "figure"
        marks.append(text(left + width + 6, top + 15.5, row.label, class_=class_))
    return drawing(WIDTH, step * len(rows) + 2, title, marks)


def heat(title: str, cells: Sequence[Cell], domain: tuple[float, float]) -> Markup:
    """A heat map with a row for each kind of linear and a column for each block.

    The larger a value, the stronger its shade, on a log scale from the first of ``domain`` to the
    second.
    """
    rows = list(dict.fromkeys(cell.row for cell in sorted(cells, key=lambda c: c.column)))
    first, last = min(c.column for c in cells), max(c.column for c in cells)
    left, size = 110.0, 20.0
    width = min((WIDTH - left - 4) / (last - first + 1), 44.0)
    shade = Scale(*_apart(domain), 0.08, 1.0, log=True)
    marks = [
        text(left - 8, i * size + 14, name, anchor="end", class_="tick")
        for i, name in enumerate(shortened(rows, left - 8))
    ]
    for cell in cells:
        marks.append(
            element(
                "rect",
                tip(f"block {cell.column}, {cell.row}: {cell.value:.3g}"),
                x=left + (cell.column - first) * width,
                y=rows.index(cell.row) * size,
                width=max(width - 1.5, 1.0),
                height=size - 1.5,
                fill_opacity=shade(max(cell.value, shade.low)),
                class_="heat",
            )
        )
    bottom = len(rows) * size
    for column in {first, last}:
        middle = left + (column - first + 0.5) * width
        marks.append(text(middle, bottom + 14, str(column), anchor="middle", class_="tick"))
    marks.append(text(left - 8, bottom + 14, "block", anchor="end", class_="quiet"))
    return drawing(WIDTH, bottom + 20, title, marks)


def rates(title: str, rows: Sequence[Rate], axis: Axis, lowest: float) -> Markup:
    """Rates with their intervals, on an axis from ``lowest`` to 1; rings are the baseline's."""
    step, left, right = 24.0, 118.0, WIDTH - 62
    scale = Scale(lowest, 1.0, left + 8, right - 8)
    bottom = step * len(rows) + 4
    marks = [line(scale(value), 0, scale(value), bottom, "grid") for value in scale.ticks(4)]
    marks.append(line(left + 8, bottom, right - 8, bottom, "axis"))
    names = shortened([row.name for row in rows], left - 6)
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = index * step + 13
        marks.append(text(0, y + 4, name, class_="label"))
        marks.append(line(scale(row.low), y, scale(row.high), y, f"span {row.kind}"))
        marks.append(element("circle", cx=scale(row.baseline), cy=y, r=6.5, class_="ring"))
        marks.append(element("circle", cx=scale(row.value), cy=y, r=4.0, class_=f"dot {row.kind}"))
        marks.append(text(WIDTH - 2, y + 4, row.label, anchor="end", class_="figure"))
    return drawing(WIDTH, bottom + 38, title, marks + axis_below(scale, bottom, axis.title, 4))


def rounded(value: float) -> str:
    """A value with three significant digits, for the text around a chart."""
    return number(float(f"{value:.3g}"))


def _steps(spots: Sequence[tuple[float, float]], frame: Box) -> list[tuple[float, float]]:
    """The corners of the front drawn as a staircase, from the frame's top to its right side."""
    corners = [(spots[0][0], frame.top)]
    for left, height in spots:
        corners += [(left, corners[-1][1]), (left, height)]
    return [*corners[1:], (frame.right, corners[-1][1])]


def _thinned(values: Sequence[float]) -> list[float]:
    """All values, or ``MOST_DOTS`` quantiles of them where there are more."""
    if len(values) <= MOST_DOTS:
        return list(values)
    ranked = sorted(values)
    return [ranked[round(i * (len(ranked) - 1) / (MOST_DOTS - 1))] for i in range(MOST_DOTS)]


def _apart(domain: tuple[float, float]) -> tuple[float, float]:
    """``domain``, widened where both ends are equal, since a scale needs some width."""
    low, high = domain
    return (low, high) if high > low else (low / 2, high)
