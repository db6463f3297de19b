"""What a peer's job is told. Standard library only: every peer's interpreter runs this."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """variant: what to make. model: the original. rows: token ids to calibrate with; heldout: to
    judge with.

    artifact: the directory to make; weights: where the peer's own dequantized weights go, or else
    figures: what its loaded model reaches.
    """

    variant: str
    model: Path
    rows: list[list[int]]
    heldout: list[list[int]]
    artifact: Path
    weights: Path
    figures: Path


def parse() -> Job:
    """Read the command line of a job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("--feed", type=Path, required=True, help="model, rows.json, heldout.json")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    return Job(
        given.variant,
        given.feed / "model",
        json.loads((given.feed / "rows.json").read_text()),
        json.loads((given.feed / "heldout.json").read_text()),
        given.out / "artifact",
        given.out / "weights",
        given.out / "figures.json",
    )
