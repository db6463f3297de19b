"""Made-up runs and options of the benchmark of peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.runs import Options, Run


def run_of(tool: str, **changes: Any) -> Run:
    """One run of a tool at nf4 on the tiny model."""
    fields: dict[str, Any] = {
        "parameters": 8_000_000,
        "model": "tiny",
        "device": "cpu",
        "job": "nf4",
        "tool": tool,
        "number": 0,
        "wall": 10.0,
        "cpu": 15.0,
        "peak": 2_000_000_000,
        "weights": 4_000_000,
        "error": None,
    }
    return Run(**{**fields, **changes})


def options_of(folder: Path, **changes: Any) -> Options:
    """What the command line asks for: one run of nf4 on the tiny model, in ``folder``."""
    fields: dict[str, Any] = {
        "jobs": ["nf4"],
        "peers": ["transformers + bitsandbytes"],
        "models": ["tiny"],
        "runs": 1,
        "device": "cpu",
        "work": folder,
        "environments": folder / "environments",
        "timeout": 60.0,
        "out": folder / "results.md",
    }
    return Options(**{**fields, **changes})
