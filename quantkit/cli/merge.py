"""quantkit merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import quantkit
from quantkit.cli.app import EXIT_CODES, app, handles_errors
from quantkit.cli.options import ForceOpt, JsonOpt, parse_adapters, parse_optional_size


@app.command("merge", epilog=EXIT_CODES)
@handles_errors
def merge_command(
    base: Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'demo'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER...", help="LoRA directories or hub ids.")
    ] = None,
    weighted: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER=WEIGHT", help="One more, with its weight."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the base's if unset.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 2GB; the base's shards if unset.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    proof: Annotated[
        bool, typer.Option(help="Compare the result with the adapter at run time.")
    ] = True,
    dequantize_base: Annotated[
        bool, typer.Option("--dequantize-base", help="Unpack a bitsandbytes base (QLoRA) first.")
    ] = False,
    force: ForceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Merge LoRA adapters into a checkpoint, one tensor at a time, and prove it equal."""
    from quantkit.cli.console import Console

    console = Console(as_json=as_json)
    manifest = quantkit.merge(
        base,
        [*(adapters or []), *parse_adapters(weighted)],
        out=out,
        dtype=dtype,
        max_shard_size=parse_optional_size(max_shard_size, "--max-shard-size"),
        strict=strict,
        proof=proof,
        dequantize_base=dequantize_base,
        force=force,
        progress=console,
    )
    text = f"{out}: {manifest.weights_bytes / 1e6:,.1f} MB"
    text += f", {manifest.changed_tensors} tensors changed"
    if result := manifest.proof:
        text += f"; logits differ by {result.difference:.1e} from base and adapter at run time"
        text += f", the cast to {manifest.dtype} costs {result.kl:.2g} nats (mean KL)"
    console.show(manifest.to_json(), text)
