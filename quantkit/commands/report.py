"""report: a comparison's JSON → the report in another form."""

from __future__ import annotations

from pathlib import Path

from quantkit.base.errors import InputError
from quantkit.reports.files import read_comparison, render_report


def report(comparison: Path, out: Path, *, force: bool) -> None:
    """Write ``out`` in the form that its ending names: .html, .md, .csv or .xml (JUnit).

    comparison: comparison.json, or what ``eval --out`` wrote.

    Raises InputError for another ending, for a file that holds no comparison, and for an output
    that exists already (without ``force``).
    """
    text = render_report(read_comparison(comparison), out)
    if out.exists() and not force:
        raise InputError("exists already", subject=str(out), fix="--force replaces it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8", errors="replace")
