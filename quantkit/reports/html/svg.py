"""What charts are made of: SVG elements, scales with ticks, labels that don't overlap.

Colors, fonts and dark mode are in the style sheet: marks have classes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

FONT_SIZE = 12.0
_CHARACTER = 0.56 * FONT_SIZE  # mean width of a character of the system's sans-serif fonts
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def element(tag: str, *children: str | Markup, **attributes: object) -> Markup:
    """An SVG element. Children that aren't Markup are escaped.

    attributes: ``_`` in a name becomes ``-``, as the last character it is dropped (``class_``);
    those that are None are left out.
    """
    names = (
        (name.removesuffix("_").replace("_", "-"), value)
        for name, value in attributes.items()
        if value is not None
    )
    opening = tag + "".join(f' {name}="{_attribute(value)}"' for name, value in names)
    inside = Markup("").join(children)
    return Markup(f"<{opening}>{inside}</{tag}>") if inside else Markup(f"<{opening}/>")


def drawing(width: float, height: float, title: str, marks: Sequence[Markup]) -> Markup:
    """A whole picture; a screen reader reads ``title``."""
    return element(
        "svg",
        *marks,
        viewBox=Markup(f"0 0 {width:g} {height:g}"),
        role="img",
        aria_label=title,
        preserveAspectRatio="xMinYMin meet",
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str = "") -> Markup:
    """One line of text; ``anchor`` is start, middle or end."""
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def tip(content: str) -> Markup:
    """The tooltip of the element that this is a child of."""
    return element("title", content)


def shortened(names: Sequence[str], width: float) -> list[str]:
    """Names cut to about ``width`` pixels, where possible so that different ones stay different."""
    room = max(int(width / _CHARACTER), 2)
    half = (room - 1) // 2
    cuts: list[Callable[[str], str]] = [
        lambda name: name[: room - 1] + "…",
        lambda name: f"{name[: room - 1 - half]}…{name[len(name) - half :]}",
        lambda name: "…" + name[len(name) - room + 1 :],
    ]
    ways = [[name if len(name) <= room else cut(name) for name in names] for cut in cuts]
    return max(ways, key=lambda way: len(set(way)))  # the first of equals


def number(value: float) -> str:
    """A tick's label: plain digits, or a power of ten where those would be long."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:,.10g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = value / 10**exponent
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return power if math.isclose(mantissa, 1) else f"{mantissa:.3g}·{power}"


@dataclass(frozen=True)
class Scale:
    """From values ``low``…``high`` to pixels ``start``…``end``; values outside go to the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, end: float, *, log: bool = False
    ) -> Scale:
        """A scale that holds all ``values`` and a margin; a log scale ignores those up to zero."""
        kept = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(kept), max(kept)
        if log:
            margin = max((high / low) ** 0.06, 1.2)
            return cls(low / margin, high * margin, start, end, True)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        held = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(held / self.low) / math.log(self.high / self.low)
        else:
            share = (held - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the scale, about ``wanted`` of them."""
        if not self.log:
            return _round_steps(self.low, self.high, wanted)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 3), (1, 2, 5)):
            ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            ticks = [value for value in ticks if self.low <= value <= self.high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / (wanted + 2))]
        return ticks if len(ticks) > 1 else _round_steps(self.low, self.high, wanted)


def _round_steps(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def axis_below(scale: Scale, y: float, title: str, wanted: int = 5) -> list[Markup]:
    """The ticks of a horizontal axis at ``y``, and its title below them."""
    low, high = sorted((scale.start, scale.end))
    marks: list[Markup] = []
    for value in scale.ticks(wanted):
        x = scale(value)
        marks += [
            line(x, y, x, y + 4, "axis"),
            text(x, y + 16, number(value), anchor="middle", class_="tick"),
        ]
    return [*marks, text((low + high) / 2, y + 33, title, anchor="middle", class_="axis-title")]


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """The area of the overlap."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)


def label_places(
    spots: Sequence[tuple[float, float]], labels: Sequence[str], frame: Box, blocked: Sequence[Box]
) -> list[tuple[float, float]]:
    """Where each spot's label begins, (x, baseline).

    Of eight places around the spot, the one that overlaps least with spots, earlier labels and
    ``blocked``, and is least outside ``frame``.
    """
    boxes = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in spots] + list(blocked)
    places = []
    for (x, y), label in zip(spots, labels, strict=True):
        width = len(label) * _CHARACTER
        sides = ((9, 4), (-width - 9, 4), (-width / 2, -11), (-width / 2, 20))
        corners = ((8, -9), (8, 17), (-width - 8, -9), (-width - 8, 17))
        trials = []
        for dx, dy in sides + corners:
            box = Box(x + dx, y + dy - 10, x + dx + width, y + dy + 3)
            inside = box.shared(frame)
            outside = (box.right - box.left) * (box.bottom - box.top) - inside
            trials.append((4 * outside + sum(box.shared(other) for other in boxes), box))
        # Rounded, so that the order of the places decides where rounding errors would.
        _, best = min(trials, key=lambda pair: round(pair[0], 3))
        boxes.append(best)
        places.append((best.left, best.bottom - 3))
    return places


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(value)
