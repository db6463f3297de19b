"""Write the text files of the demo world and of the skill: `python demo/build_text.py`.

The files are committed so that nobody has to run this to use them, and rebuilt byte for byte so
that anybody can check where they come from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

import skill  # noqa: E402
import world  # noqa: E402


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def text_files() -> dict[str, str]:
    """Return the content of every generated file by its path below the repository root."""
    return {
        "recipes/suites/demo-heldout.jsonl": _lines(
            {"text": text} for text in world.heldout_documents()
        ),
        "recipes/suites/demo-regression.jsonl": _lines(world.regression_cases()),
        "recipes/suites/demo-tasks/facts.jsonl": _lines(world.harness_facts()),
        "recipes/suites/demo-tasks/claims.jsonl": _lines(world.harness_claims()),
        "recipes/suites/demo-tasks/sums.jsonl": _lines(world.harness_sums()),
        "recipes/suites/demo-adapter-heldout.jsonl": _lines(
            {"text": text} for text in skill.heldout_documents()
        ),
        "recipes/suites/demo-adapter-regression.jsonl": _lines(skill.regression_cases()),
        "calibration/demo-world-v1.jsonl": _lines(
            {"text": text} for text in world.calibration_documents()
        ),
    }


def main() -> None:
    for name, content in text_files().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
        print(f"{name}: {content.count(chr(10))} lines, {len(content)} bytes")


if __name__ == "__main__":
    main()
