"""A suite of a test's own, written to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_suite(place: Path, cases: list[dict[str, Any]], **changes: object) -> Path:
    """A suite of these cases and some text; returns its file."""
    (place / "text.jsonl").write_text('{"text": "The cat is black. The owl is white."}\n' * 40)
    (place / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    content = {
        "schema": 1,
        "name": "mine",
        "version": "1.0.0",
        "likelihood": {"dataset": "text.jsonl", "sequence_length": 64},
        "regression": {"cases": "cases.jsonl"},
        **changes,
    }
    path = place / "suite.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
