"""quantkit cache clear"""

from __future__ import annotations

from quantkit.cli.app import cache_app, handles_errors
from quantkit.cli.options import JsonOpt


@cache_app.command("clear")
@handles_errors
def cache_clear_command(as_json: JsonOpt = False) -> None:
    """Remove everything that is kept."""
    from quantkit.calibration import cache
    from quantkit.cli.console import Console

    freed = cache.clear()
    Console(as_json=as_json).show({"freed_bytes": freed}, f"{freed / 1e6:,.1f} MB freed")
