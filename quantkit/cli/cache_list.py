"""quantkit cache list"""

from __future__ import annotations

from quantkit.cli.app import cache_app, handles_errors
from quantkit.cli.options import JsonOpt


@cache_app.command("list")
@handles_errors
def cache_list_command(as_json: JsonOpt = False) -> None:
    """Show what is kept, where, and how much room it takes."""
    from quantkit.calibration import cache
    from quantkit.cli.console import Console
    from quantkit.reports.terminal import listing

    entries = cache.entries()
    values = [
        {"path": str(entry.path), "bytes": entry.nbytes, "about": entry.about} for entry in entries
    ]
    rows = [
        (
            entry.path.name[:12],
            f"{entry.nbytes / 1e6:,.1f}",
            entry.about.get("checkpoint", "")[:12],
            entry.about.get("calibration rows", "")[:12],
        )
        for entry in entries
    ]
    table = listing(("entry", "MB", "checkpoint", "calibration rows"), rows)
    table.title = f"{cache.directory()}, at most {cache.limit() / 1e9:g} GB"
    Console(as_json=as_json).show(values, table)
