"""The results of inspect and verify as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from quantkit.artifact.findings import Facts, Verification
from quantkit.reports.terminal import listing, plan_table

_SIGNS = {True: "[green]✓[/]", False: "[bold red]✗[/]", None: "–"}
_WIDEST = 100  # characters of a value


def facts_table(facts: Facts) -> Group:
    """All facts about an artifact, from its format to its provenance."""
    rows = [
        ("format", facts.format),
        ("method", facts.method or "unknown"),
        ("producer", facts.producer or "unknown"),
        ("parameters", f"{facts.parameters:,}"),
        ("files", f"{len(facts.files)}, {facts.files_bytes / 1e6:,.1f} MB: {facts.files[0]}"),
        ("bits per weight", f"{facts.bits_per_weight:.3f} in the files"),
        ("stored as", ", ".join(f"{k} {v / 1e6:,.1f} MB" for k, v in facts.dtypes.items())),
    ]
    about = _pairs("", rows)
    engines = listing(("engine", "loads", ""), [(e.engine, e.loads, e.why) for e in facts.engines])
    parts = [about, plan_table(facts.plan, "tensors"), engines]
    parts.append(_pairs("tokenizer", [(k, _template(v)) for k, v in facts.tokenizer.items()]))
    if facts.metadata:
        parts.append(_pairs("metadata", [(k, _text(v)) for k, v in facts.metadata.items()]))
    if facts.provenance:
        parts.append(_pairs("provenance", _provenance(facts.provenance)))
    return Group(*parts)


def checks_table(result: Verification) -> Table:
    """A line for each check."""
    title = f"{result.path}: {'verified' if result.passed else 'FAILED'} ({result.engine})"
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("")
    table.add_column("", overflow="fold")
    for check in result.checks:
        table.add_row(_SIGNS[check.passed], check.name, escape(check.detail))
    return table


def _provenance(manifest: dict[str, object]) -> list[tuple[str, str]]:
    rows = []
    for key, value in manifest.items():
        if key == "recipe" and isinstance(value, dict):
            value = f"{value.get('name')} {value.get('version')}, digest {value.get('digest')}"
        if key == "source" and isinstance(value, dict):
            files: dict[str, str] = value.get("files", {})
            value = ", ".join(f"{name} {digest[:12]}" for name, digest in files.items())
        if key == "tensors" and isinstance(value, dict):
            value = ", ".join(f"{fate['count']} {name}" for name, fate in value.items())
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append((key, _text(value)))
    return rows


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def _template(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['characters']} characters, sha256 {value['sha256'][:12]}"
    return "none" if value is None else _text(value)


def _text(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}…"
