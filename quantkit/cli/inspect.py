"""quantkit inspect"""

from __future__ import annotations

import quantkit
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import ArtifactArg, JsonOpt


@app.command("inspect", epilog=EXIT_CODES)
@handles_errors
def inspect_command(artifact: ArtifactArg, as_json: JsonOpt = False) -> None:
    """Describe an artifact: format, schemes, size, producer, tokenizer, what loads it."""
    from quantkit.cli.console import Console
    from quantkit.reports.findings import facts_table

    facts = quantkit.inspect(artifact)
    Console(as_json=as_json).show(facts.to_json(), facts_table(facts))
