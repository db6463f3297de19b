"""The records of a file of texts, prompts or cases, in whichever form the file's content has.

The content decides: a JSON array, JSON lines, CSV, Parquet, or plain text. A name that promises
one of them is only held against a file that turns out to be none.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError, not_installed
from quantkit.documents.content import MARK, decode, read_content
from quantkit.documents.forms import CHATS, KEYS

_SHOWN = 10  # problems of a file that are listed
_FIRST = 100  # characters of a first line that are shown
_PROMISES = {
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# An object or a list of objects, in JSON or as Python prints it: more than a text with a bracket.
_LIKE_JSON = re.compile(r"""(\[\s*)?\{\s*(["'])[^"'\n]*\2\s*:""")
_COLUMN = re.compile(r"[\w.-]*")
_AS_TEXT = 'If it is meant as plain text, write it as one JSON string: {"text": "…"}.'


@dataclass(frozen=True)
class Record:
    """One record of a file. where: the file, and the line or entry, whose ``number`` counts from 1;
    value: as in JSON; problem: why there is no value, or None."""

    where: str
    number: int
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True)
class Records:
    """All records of a file. shape: what they were found in, such as "JSON lines"; digest: the
    file's sha256; text: the whole of a plain text, whose records are its lines; None for others."""

    shape: str
    records: tuple[Record, ...]
    digest: str
    text: str | None = None

    def check(self, fix: str = _AS_TEXT) -> None:
        """Raise InputError that lists the first ten records that couldn't be read."""
        problems = [(r.where, r.problem) for r in self.records if r.problem is not None]
        if problems:
            raise listed(problems, fix)


def counted(number: int, noun: str) -> str:
    """A number of things, such as "1 document" or "1,200 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(problems: Sequence[tuple[str, str]], fix: str) -> InputError:
    """The error that lists the first ten problems, each with its place."""
    (where, first), *others = problems
    shown = [first, *(f"{place}: {problem}" for place, problem in others[: _SHOWN - 1])]
    if len(problems) > _SHOWN:
        shown.append(f"and {len(problems) - _SHOWN} more")
    return InputError("\n".join(shown), where=where, fix=fix)


def first_line(text: str) -> str:
    """The first line of a text that isn't blank, quoted, cut and made printable for a message."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:_FIRST])
    return f'"{shown}{"…" if len(line) > _FIRST else ""}"'


def read_records(path: Path) -> Records:
    """Read a file, or a pipe, whatever its name, its byte order mark and its packing.

    A line of JSON lines that isn't JSON is a record with a problem: see ``Records.check``.

    Raises InputError for a file that can't be read, is empty, isn't text, is broken JSON or CSV, or
    is plain text under a name that promises something else; MachineError without pyarrow where it
    is needed.
    """
    content = read_content(path)
    packed = f", packed by {content.packing}" if content.packing else ""
    if content.data.startswith(b"PAR1"):
        return Records(f"Parquet{packed}", tuple(_parquet(content.data, path)), content.digest)
    text = decode(content.data, path)
    if not text.strip():
        raise InputError("is empty", subject=str(path), fix="Give it text.")
    promise = next((s.lower() for s in reversed(path.suffixes) if s.lower() not in _PACKED), "")
    promised = _PROMISES.get(promise)
    found = _json(text, path, promised=promised == "JSON")
    found = found or _csv(text, path, promised=promised == "CSV")
    if found is not None:
        shape, records = found
        return Records(f"{shape}{packed}", tuple(records), content.digest)
    if promised is not None:
        raise InputError(
            f"is named {promise} and holds no {promised} that can be used; its first "
            f"line is {first_line(text)}",
            subject=str(path),
            fix=f"{_wanted()} If it is meant as plain text, name it .txt.",
        )
    begin = text.lstrip()[0]
    doubt = f" (it begins with {begin}, but isn't JSON)" if begin in "[{" else ""
    lines = enumerate(text.split("\n"), 1)
    records = [Record(f"{path}:{number}", number, line) for number, line in lines if line.strip()]
    return Records(f"plain text{doubt}{packed}", tuple(records), content.digest, text)


def _wanted() -> str:
    return f"Texts are read from the keys or columns {', '.join(KEYS)}."


def _json(text: str, path: Path, *, promised: bool) -> tuple[str, list[Record]] | None:
    """The records of JSON in any of its forms; None where the text is no JSON.

    promised: whether the file's name says JSON. Raises InputError for broken JSON.
    """
    begin = text.lstrip()
    if begin[0] not in '[{"':
        return None
    whole = _parse(text)
    if whole.error is None and not isinstance(whole.value, str):
        return _whole(whole.value, path, text)
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    values = [(number, _parse(line)) for number, line in lines]
    good = sum(_is_record(value) for _, value in values)
    strings = len(values) > 1 and all(isinstance(value.value, str) for _, value in values)
    if strings or (begin[0] != '"' and 2 * good >= len(values)):
        return "JSON lines", [
            Record(f"{path}:{n}", n, v.value, v.error and f"the line isn't valid JSON ({v.error})")
            for n, v in values
        ]
    if begin[0] == '"':
        return None
    sequence, rest = _sequence(text)
    if sequence and not text[rest:].strip():
        return "JSON values", [Record(f"{path}:{line}", line, value) for line, value in sequence]
    after = text[rest:].lstrip() if sequence else begin
    if promised or _LIKE_JSON.match(after.lstrip(", \t\r\n")):
        line = text.count("\n", 0, len(text) - len(after)) + 1 if sequence else whole.line
        error = _parse(after).error if sequence else whole.error
        if sequence and after.startswith(","):
            error = "a comma follows a value: write each in a line without one, or all in a list"
        elif "'" in begin[:3]:
            error = f"{error}: Python prints objects so, json.dumps writes them"
        raise InputError(
            f"begins as JSON and isn't valid JSON ({error}); the line is "
            f"{first_line(text.split(chr(10))[line - 1])}",
            where=f"{path}:{line}",
            fix=_AS_TEXT,
        )
    return None


@dataclass(frozen=True)
class _Parsed:
    """What JSON text says, or what is wrong with it and in which of its lines."""

    value: Any = None
    error: str | None = None
    line: int = 1


def _parse(text: str) -> _Parsed:
    try:
        return _Parsed(json.loads(text.lstrip(MARK)))
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        return _Parsed(None, f"{what} at column {error.colno}", error.lineno)
    except RecursionError:
        return _Parsed(None, "it is nested too deeply")
    except ValueError as error:  # numbers of thousands of digits
        return _Parsed(None, str(error))


def _is_record(parsed: _Parsed) -> bool:
    """Whether a line is JSON that isn't found in texts: an object, or a list of some."""
    value = parsed.value
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict | str)
    return isinstance(value, dict) and bool(value)


def _sequence(text: str) -> tuple[list[tuple[int, Any]], int]:
    """The JSON values that a text begins with, each with its line, and where they end."""
    decoder, place, values = json.JSONDecoder(), 0, []
    line, counted = 1, 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict | list):
            break
        line, counted = line + text.count("\n", counted, place), place
        values.append((line, value))
        place = end
    return values, place


def _whole(value: Any, path: Path, text: str) -> tuple[str, list[Record]]:
    """The records of one JSON value: a list, or an object that is a record or holds some."""
    line = text.count("\n", 0, len(text) - len(text.lstrip())) + 1
    if isinstance(value, list):
        if value and all(isinstance(item, dict) and "role" in item for item in value):
            return "a JSON array", [Record(f"{path}:{line}", 1, value)]  # one chat
        return "a JSON array", _entries(value, path)
    if isinstance(value, dict) and not _known(value):
        lists = [item for item in value.values() if isinstance(item, list)]
        lists = [item for item in lists if item and isinstance(item[0], dict)]
        if len(lists) == 1:  # such as {"version": 1, "data": […]}
            return "a JSON array in an object", _entries(lists[0], path)
    if isinstance(value, dict) and (rows := _columns(value)) is not None:
        return "a JSON object of columns", _entries(rows, path)
    shape = "a JSON object" if "\n" in text.strip() else "JSON lines"
    return shape, [Record(f"{path}:{line}", line, value)]


def _columns(value: dict[str, Any]) -> list[Any] | None:
    """The rows of a table that JSON holds by columns, as pandas writes it; None for no table."""
    columns = {
        name: list(column.values()) if isinstance(column, dict) else column
        for name, column in value.items()
    }
    known = [columns[name] for name in _known(columns) if name.strip().lower() not in CHATS]
    tabular = all(isinstance(column, list) for column in columns.values())
    if not known or not tabular or len({len(column) for column in columns.values()}) != 1:
        return None
    if not known[0] or not isinstance(known[0][0], str):
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _entries(values: Sequence[Any], path: Path) -> list[Record]:
    return [Record(f"{path} entry {n}", n, value) for n, value in enumerate(values, 1)]


def _known(names: Sequence[str] | dict[str, Any]) -> list[str]:
    """Those of the names of keys or columns that texts are read from."""
    return [name for name in names if name.strip().lower() in KEYS]


def _csv(text: str, path: Path, *, promised: bool) -> tuple[str, list[Record]] | None:
    """The records of a table whose first line names a column that is known; None for no table.

    promised: whether the file's name says CSV; a text may begin with a line such as "Question".
    Raises InputError for rows that don't fit the names.
    """
    begin = text.lstrip("\r\n").partition("\n")[0].rstrip("\r")
    headers = [(delimiter, _header(begin, delimiter)) for delimiter in ",\t;"]
    headers = [(delimiter, names) for delimiter, names in headers if _known(names)]
    if not headers:
        return None
    delimiter, names = max(headers, key=lambda pair: len(pair[1]))
    if names[1:] == [] and names[0] not in KEYS and not promised:
        return None
    kind = "tab-separated" if delimiter == "\t" else "CSV"
    try:
        rows = list(_rows(text, delimiter))[1:]
        problem = next(
            (
                (f"{path}:{line}", f"has {len(row)} fields, the first line {len(names)}")
                for line, row in rows
                if len(row) != len(names)
            ),
            None,
        )
    except csv.Error as error:
        rows = []
        problem = (str(path), f"isn't {kind} ({error}): is a double quote left open?")
    if problem is not None and len(names) == 1:
        return None
    if problem is not None:
        raise listed([problem], f'Put fields with commas in double quotes: "…". {_AS_TEXT}')
    return f"{kind} (columns: {', '.join(filter(None, names))})", [
        Record(f"{path}:{line}", line, _row(names, row)) for line, row in rows
    ]


def _header(line: str, delimiter: str) -> list[str]:
    """The names in a first line; none where it doesn't look like names."""
    try:
        cells = next(csv.reader([line], delimiter=delimiter, strict=True))
    except (csv.Error, StopIteration):
        return []
    names = [cell.strip() for cell in cells]
    return names if all(_COLUMN.fullmatch(name) for name in names) else []


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table that aren't blank, each with the line that it begins in."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line = 1
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _row(names: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    """A row by its columns' names: cells that hold JSON as what they say.

    Empty cells are null in the columns that texts are read from, and left out in others.
    """
    cells = [(name, _cell(cell)) for name, cell in zip(names, row, strict=True) if name]
    return {name: cell for name, cell in cells if cell is not None or _known([name])}


def _cell(cell: str) -> Any:
    if not cell.strip():
        return None
    if cell.lstrip()[0] in "[{":
        parsed = _parse(cell)
        return cell if parsed.error is not None or not _is_record(parsed) else parsed.value
    return cell


def _parquet(data: bytes, path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise not_installed("pyarrow", "datasets") from None
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = file.schema_arrow.names
        if not _known(columns):
            raise InputError(
                f"has the columns {', '.join(columns)}, none of which is known",
                subject=str(path),
                fix=_wanted(),
            )
        rows = file.read().to_pylist()
    except InputError:
        raise
    except Exception as error:  # pyarrow passes on the errors of many libraries
        raise InputError(f"can't be read as Parquet ({error})", subject=str(path)) from error
    for number, row in enumerate(rows, 1):
        # A struct has all keys of the column in every row, most of them null.
        values = {name: _without_nulls(value) for name, value in row.items()}
        yield Record(f"{path} entry {number}", number, values)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
