"""What a peer's job is told. Standard library only: every peer's interpreter runs this."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arguments:
    """job: as benchmarks/peers.py names it. rows: token ids. text: a file. out: what to make."""

    job: str
    model: str
    adapter: str
    rows: list[list[int]]
    text: Path
    out: Path
    device: str


def parse() -> Arguments:
    """Read the command line of a job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--feed", type=Path, required=True, help="what benchmarks/models.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    return Arguments(
        job=given.job,
        model=str(given.feed / "model"),
        adapter=str(given.feed / "adapter"),
        rows=json.loads((given.feed / "rows.json").read_text()),
        text=given.feed / "text.txt",
        out=given.out,
        device=given.device,
    )
