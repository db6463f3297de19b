"""The command line of a peer's job. Standard library only: every peer's interpreter runs this."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What to make, of what, and where.

    variant: the script's own name for the settings. model: the original checkpoint.
    rows, heldout: token ids to calibrate with and to judge with.
    artifact: the directory to make. weights: the directory for the weights that the peer's loaded
    model computes with, or else figures: the JSON file for what that model reaches.
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
        variant=given.variant,
        model=given.feed / "model",
        rows=json.loads((given.feed / "rows.json").read_text()),
        heldout=json.loads((given.feed / "heldout.json").read_text()),
        artifact=given.out / "artifact",
        weights=given.out / "weights",
        figures=given.out / "figures.json",
    )
