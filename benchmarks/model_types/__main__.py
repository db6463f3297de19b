"""``python -m benchmarks.model_types``: try every model type, and write docs/models.md.

With ``--most`` the twenty that people quantize most are tried, and it fails unless each of them
goes through every recipe whose format holds it, with transformers' logits. CI runs that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.model_types.page import page
from benchmarks.model_types.record import RECIPES, Row, record

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
_SECONDS = 180
_MOST = (
    *("lm:llama", "lm:mistral", "lm:phi3", "lm:qwen2", "lm:qwen3", "lm:gemma3_text", "lm:olmo3"),
    *("lm:qwen3_moe", "lm:qwen3_next", "lm:gpt_oss", "lm:mixtral", "lm:glm4_moe"),
    *("lm:deepseek_v3", "lm:granitemoehybrid", "vlm:qwen2_5_vl", "vlm:qwen3_vl", "vlm:qwen3_5"),
    *("vlm:qwen3_5_moe", "vlm:gemma3", "vlm:mistral3"),
)
_DIFFERENCE = 1e-6  # of the largest logit


def types() -> Iterator[tuple[str, str, str]]:
    """Kind, model type and class of every causal and image-text type of transformers."""
    from transformers.models.auto import modeling_auto as auto

    for kind, names in (
        ("lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("vlm", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for model_type, name in names.items():
            yield kind, model_type, name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_types", description=__doc__)
    parser.add_argument("only", nargs="*", help="such as lm:qwen3_moe vlm:gemma3 (default: all)")
    parser.add_argument("--most", action="store_true", help="the twenty that must work")
    parser.add_argument("--results", type=Path, default=ROOT / "reports" / "models.jsonl")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "TYPE", "CLASS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        kind, model_type, name = chosen.one
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(record(kind, model_type, name, Path(folder)).to_json()))
        return
    if chosen.most:
        raise SystemExit(_most())
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    rows = {(r.kind, r.model_type): r for r in _known(chosen.results)}
    for kind, model_type, name in types():
        if chosen.only and f"{kind}:{model_type}" not in chosen.only:
            continue
        if not chosen.only and (kind, model_type) in rows:  # where an earlier run got to
            continue
        rows[kind, model_type] = row = _apart(kind, model_type, name)
        with chosen.results.open("a") as file:
            file.write(json.dumps(row.to_json()) + "\n")
        done = sum(outcome == "done" for outcome in row.outcomes.values())
        print(f"{kind}:{model_type}: {row.built or f'{done} of {len(row.outcomes)}'}", flush=True)
    if not chosen.only:
        PAGE.write_text(page(list(rows.values())))


def _most() -> int:
    """Try the twenty in this process; the number of those that don't give what they should."""
    failed = 0
    for kind, model_type, name in types():
        if f"{kind}:{model_type}" not in _MOST:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = record(kind, model_type, name, Path(folder))
        wanted = [recipe for recipe in RECIPES if recipe != "nf4" or not row.experts]
        problems = [row.built] if row.built else []
        problems += [f"{r}: {o}" for r in wanted if (o := row.outcomes.get(r)) != "done"]
        if row.difference is None or row.difference > _DIFFERENCE:
            problems.append(f"logits differ from transformers' by {row.difference}")
        print(f"{kind}:{model_type}: {'; '.join(problems) or 'as it should be'}", flush=True)
        failed += bool(problems)
    return failed


def _known(results: Path) -> list[Row]:
    if not results.is_file():
        return []
    return [Row(**json.loads(line)) for line in results.read_text().splitlines()]


def _apart(kind: str, model_type: str, name: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.model_types", "--one", kind, model_type, name]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return Row(kind, model_type, name, built=f"took longer than {_SECONDS} seconds")
    try:
        return Row(**json.loads(run.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        return Row(kind, model_type, name, built=f"the process ended with {run.returncode}: {last}")


if __name__ == "__main__":
    main()
