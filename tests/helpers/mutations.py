"""Files as people damage them: JSON, YAML and headers with odd values, as hypothesis draws them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

# What is found in public bug reports in the place of a number, a name or a list.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1024.0, 0.5, -0.0, 2**31, 2**63, 10**20),
    *(
        1e308,
        float("nan"),
        float("inf"),
        "",
        "64",
        "auto",
        "bfloat16",
        "å\u2028",
        "\ud800",
        "../x",
        "a\0b",
    ),
    *([], [None], [[]], [0, 1], ["a"], {}, {"a": 1}, {"type": "linear", "factor": "2"}),
]


class Content(bytes):
    """A file's content, of which a failure shows the beginning only."""

    def __repr__(self) -> str:
        return f"{bytes(self[:3000])!r} ({len(self)} bytes)"


_BYTES = [
    b"",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b'"',
    b"[" * 3000,
    b"NaN",
    b"\n",
    b",",
]


@st.composite
def values(draw: DrawFn, value: Any, extra: Mapping[str, Sequence[Any]] | None = None) -> Any:
    """``value``, of JSON, with one to three changes: a part replaced, taken away or renamed.

    extra: keys that it might have at its top too, with values for them.
    """
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if extra and isinstance(value, dict) and draw(st.integers(0, 3)) == 0:
            key = draw(st.sampled_from(sorted(extra)))
            value[key] = _one_of(draw, [*extra[key], *ODD])
            continue
        places = list(_places(value))
        if not places:
            return _one_of(draw, ODD)
        holder, key = draw(st.sampled_from(places))
        _change(draw, holder, key, [other[name] for other, name in places])
    return value


@st.composite
def texts(draw: DrawFn, value: Any, extra: Mapping[str, Sequence[Any]] | None = None) -> Content:
    """JSON of ``value`` with changes, or with bytes that no JSON has."""
    changed = value if draw(st.integers(0, 9)) == 0 else draw(values(value, extra))
    data = json.dumps(changed).encode()
    return draw(damaged(data)) if draw(st.integers(0, 9)) == 0 else Content(data)


@st.composite
def damaged(draw: DrawFn, data: bytes, starts: Sequence[int] = ()) -> Content:
    """``data`` cut short, or with some bytes changed, mostly at one of the places ``starts``."""
    start = draw(st.integers(0, len(data)))
    if draw(st.integers(0, 4)) and starts:
        start = starts[draw(st.integers(0, len(starts) - 1))]
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return Content(data[:start])
    if kind == 1:
        return Content(data[:start] + draw(st.sampled_from(_BYTES)) + data[start:])
    number = draw(st.sampled_from([0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]))
    size = draw(st.sampled_from([1, 4, 8]))
    placed = (number % 2 ** (8 * size)).to_bytes(size, "little")
    if kind == 2:
        return Content(data[:start] + placed + data[start + size :])
    return Content(data[:start] + data[start + draw(st.integers(1, 16)) :])


@st.composite
def safetensors(draw: DrawFn, data: Content) -> Content:
    """A safetensors file whose header has changes, mostly with the right length before it."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(data))
    length = int.from_bytes(data[:8], "little")
    header = draw(texts(json.loads(data[8 : 8 + length])))
    said = len(header) if draw(st.integers(0, 9)) else draw(st.sampled_from([0, 1, 2**40]))
    return Content(said.to_bytes(8, "little") + header + data[8 + length :])


@st.composite
def gguf(draw: DrawFn, data: bytes, names: Sequence[str]) -> Content:
    """A GGUF file whose header is damaged, mostly right behind one of ``names``.

    There are the type and value of a key, and the shape, type and place of a tensor.
    """
    ends = [data.index(name.encode()) + len(name) for name in names]
    starts = [end + step for end in ends for step in (0, 4, 8, 12, 16, 20, 24, 28)]
    return draw(damaged(data, [0, 4, 8, 16, *starts]))


@st.composite
def lines(draw: DrawFn, values_of_lines: Sequence[Any]) -> Content:
    """JSON lines, one of which has changes."""
    rows = [json.dumps(value).encode() for value in values_of_lines]
    place = draw(st.integers(0, len(rows) - 1))
    rows[place] = draw(texts(values_of_lines[place]))
    joined = draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n"])).join(rows)
    return Content(draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"])) + joined)


def _one_of(draw: DrawFn, values: Sequence[Any]) -> Any:
    """One of the values, by its number: they needn't be printable, and aren't shared."""
    return copy.deepcopy(values[draw(st.integers(0, len(values) - 1))])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value: what holds it, and its key or index there."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(draw: DrawFn, holder: Any, key: Any, others: list[Any]) -> None:
    value, kind = holder[key], draw(st.integers(0, 7))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw(st.sampled_from(["", "a", f"{key}_", str(key).upper()]))] = holder.pop(key)
    elif kind == 2:
        holder[key] = _one_of(draw, others)
    elif kind == 3:
        holder[key] = _one_of(draw, [str(value), [value], {"a": value}])
    elif kind == 4 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = _one_of(draw, [value + 1, value - 1, value * 2, value // 2, -value])
    elif kind == 5 and isinstance(value, int | float):
        holder[key] = float(value)
    else:
        holder[key] = _one_of(draw, ODD)
