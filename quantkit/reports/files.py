"""The files of a comparison: written in every form, and comparison.json read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_json, write_json
from quantkit.base.typed import typed
from quantkit.reports.html.page import comparison_html
from quantkit.reports.junit import comparison_junit
from quantkit.reports.markdown import comparison_markdown
from quantkit.reports.table_csv import comparison_csv
from quantkit.results.comparison import Comparison

_WRITERS = {
    ".md": comparison_markdown,
    ".html": comparison_html,
    ".csv": comparison_csv,
    ".xml": comparison_junit,
}
# https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
_SUMMARY_LIMIT = 1024 * 1024  # bytes
_CUT = "\n\n… The rest is in comparison.md.\n".encode()
_NAMES = ("comparison.md", "report.html", "comparison.csv", "junit.xml")


def write_reports(comparison: Comparison, directory: Path) -> list[Path]:
    """Write a comparison in every form into ``directory``; returns the paths of the files."""
    # comparison.json comes first, since all other forms can be made of it again.
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "comparison.json"]
    write_json(written[0], comparison.to_json())
    for name in _NAMES:
        path = directory / name
        write_report(comparison, path)
        written.append(path)
    return written


def write_report(comparison: Comparison, path: Path) -> None:
    """Write a comparison to ``path``, in the form that its suffix names."""
    # Paths and goals of the command line may hold bytes that aren't UTF-8.
    path.write_text(render_report(comparison, path), encoding="utf-8", errors="replace")


def render_report(comparison: Comparison, path: Path) -> str:
    """A comparison as the text of a report, in the form that the suffix of ``path`` names.

    Raises InputError for a suffix that names none.
    """
    if path.suffix not in _WRITERS:
        given = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise InputError(
            f"has {given}, which is no form of a report",
            subject=str(path),
            fix=f"The suffixes of reports are {', '.join(_WRITERS)}.",
        )
    return _WRITERS[path.suffix](comparison)


def read_comparison(path: Path) -> Comparison:
    """Read comparison.json, also one with the keys of 0.1.0.dev.

    Raises InputError with the file and the key for what doesn't fit a comparison.
    """
    value = read_json(path)
    if value.get("schema") != 1:
        raise InputError(
            f"the schema is {value.get('schema')!r}, not 1",
            where=str(path),
            fix="Name a comparison.json; quantkit compare writes one.",
        )
    return typed(Comparison, _as_fields(value), str(path))


# Keys that comparison.json had before they were renamed, and what they are called now.
_RENAMED = {"localisation": "localization", "mends": "fixes"}


def _as_fields(value: Any) -> Any:
    """``value`` in the form of the dataclasses: renamed keys, and each ``harness`` with its tasks.

    In JSON a ``harness`` is the plain list of its tasks.
    """
    if isinstance(value, list):
        return [_as_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        _RENAMED.get(key, key): {"tasks": _as_fields(item)}
        if key == "harness" and isinstance(item, list)
        else _as_fields(item)
        for key, item in value.items()
    }


def append_step_summary(comparison: Comparison, environment: Mapping[str, str]) -> Path | None:
    """Append the comparison as Markdown to the summary of a GitHub Actions step.

    environment: of the process. Returns the summary's file; None where this isn't such a step.
    """
    name = environment.get("GITHUB_STEP_SUMMARY")
    if not name:
        return None
    path = Path(name)
    # GitHub drops a summary that is too long, so lines are left off its end.
    room = _SUMMARY_LIMIT - (path.stat().st_size if path.exists() else 0)
    text = (comparison_markdown(comparison) + "\n").encode(errors="replace")
    if len(text) > room:
        cut = text[: max(room - len(_CUT), 0)].rpartition(b"\n")[0]
        text = cut + _CUT if cut else b""
    with path.open("ab") as file:
        file.write(text)
    return path
