"""What a comparison leaves on disk, and reading it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.base.errors import InputError
from quantkit.base.files import read_json, write_json
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
    """Write a comparison in every form into ``directory``; returns the files.

    comparison.json comes first: all others can be made of it again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "comparison.json"]
    write_json(written[0], comparison.to_json())
    for name in _NAMES:
        path = directory / name
        path.write_text(render(comparison, path), encoding="utf-8")
        written.append(path)
    return written


def render(comparison: Comparison, path: Path) -> str:
    """A comparison in the form that the ending of ``path`` stands for.

    Raises InputError for another ending.
    """
    if path.suffix not in _WRITERS:
        raise InputError(
            f"no form of a report ends in {path.suffix or 'nothing'}",
            where=str(path),
            fix=f"Endings: {', '.join(_WRITERS)}.",
        )
    return _WRITERS[path.suffix](comparison)


def read_comparison(path: Path) -> Comparison:
    """Read comparison.json. Raises InputError naming the file and the key that isn't as it was."""
    value = read_json(path)
    if value.get("schema") != 1:
        raise InputError(
            f"schema is {value.get('schema')!r}, not 1",
            where=str(path),
            fix="Is it a comparison.json? Compare again to make one.",
        )
    try:
        return TypeAdapter(Comparison).validate_python(_with_tasks(value))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{key}: {problem['msg']}", where=str(path)) from error


def _with_tasks(value: Any) -> Any:
    """``value`` with every ``harness``, a plain list in JSON, as its dataclass wants it."""
    if isinstance(value, list):
        return [_with_tasks(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {"tasks": item} if key == "harness" and isinstance(item, list) else _with_tasks(item)
        for key, item in value.items()
    }


def append_step_summary(comparison: Comparison, environment: Mapping[str, str]) -> Path | None:
    """Append the Markdown to the summary of a GitHub Actions step, where there is one.

    GitHub drops a summary that is too long, so whole lines are left off its end.
    """
    name = environment.get("GITHUB_STEP_SUMMARY")
    if not name:
        return None
    path = Path(name)
    room = _SUMMARY_LIMIT - (path.stat().st_size if path.exists() else 0)
    text = (comparison_markdown(comparison) + "\n").encode()
    if len(text) > room:
        cut = text[: max(room - len(_CUT), 0)].rpartition(b"\n")[0]
        text = cut + _CUT if cut else b""
    with path.open("ab") as file:
        file.write(text)
    return path
