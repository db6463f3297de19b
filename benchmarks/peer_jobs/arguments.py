"""The command line of a peer's job. Standard library only: every peer's interpreter runs this."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arguments:
    """What to make, of what, and where.

    job: its name in benchmarks/peers/jobs.py. rows: token ids to calibrate with. text: a file with
    the same text. out: the directory to make.
    bits, symmetric: of the integer grids, whose groups have 128 columns. mix: llama.cpp's name.
    gguf: the model as a BF16 GGUF file, which need not exist.
    """

    job: str
    model: str
    adapter: str
    rows: list[list[int]]
    text: Path
    out: Path
    device: str
    bits: int
    symmetric: bool
    mix: str
    gguf: Path


def parse() -> Arguments:
    """Read the command line of a job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--feed", type=Path, required=True, help="what benchmarks/models.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--mix", default="Q4_K_M")
    given = parser.parse_args()
    return Arguments(
        job=given.job,
        model=str(given.feed / "model"),
        adapter=str(given.feed / "adapter"),
        rows=json.loads((given.feed / "rows.json").read_text()),
        text=given.feed / "text.txt",
        out=given.out,
        device=given.device,
        bits=given.bits,
        symmetric=given.job != "awq" if given.symmetric is None else given.symmetric,
        mix=given.mix,
        gguf=given.feed / "bf16.gguf",
    )
