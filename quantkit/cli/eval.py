"""quantkit eval"""

from __future__ import annotations

import quantkit
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.comparison import finish
from quantkit.cli.options import (
    AdapterOpt,
    AllowCodeOpt,
    AllowOverlapOpt,
    ArtifactsArg,
    BaselineOpt,
    DeviceOpt,
    GoalOpt,
    JsonOpt,
    LocateOpt,
    OutFileOpt,
    SuiteOpt,
    parse_adapters,
)


@app.command("eval", epilog=EXIT_CODES)
@handles_errors
def eval_command(
    artifacts: ArtifactsArg,
    baseline: BaselineOpt,
    suite: SuiteOpt,
    adapters: AdapterOpt = None,
    goal: GoalOpt = None,
    locate: LocateOpt = None,
    out: OutFileOpt = None,
    device: DeviceOpt = "cpu",
    allow_code: AllowCodeOpt = False,
    allow_overlap: AllowOverlapOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Judge artifacts by a suite, against the BF16 baseline."""
    from quantkit.cli.console import Console

    console = Console(as_json=as_json)
    comparison = quantkit.evaluate(
        artifacts,
        baseline=baseline,
        suite=suite,
        adapters=parse_adapters(adapters),
        out=out,
        device=device,
        localize=locate,
        goal=goal,
        allow_code=allow_code,
        allow_overlap=allow_overlap,
        progress=console,
    )
    finish(console, comparison)
