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
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.model_types.page import page
from benchmarks.model_types.record import RECIPES, Row, record

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
_SECONDS = 180
_ROW = "row: "
_MOST = (
    *("lm:llama", "lm:mistral", "lm:phi3", "lm:qwen3", "lm:gemma3_text", "lm:falcon"),
    *("lm:internlm3", "lm:qwen3_moe", "lm:qwen3_next", "lm:gpt_oss", "lm:mixtral", "lm:glm4_moe"),
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
    parser.add_argument("--these", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.these:
        for kind, model_type, name in (text.split(":") for text in chosen.these):
            with tempfile.TemporaryDirectory() as folder:
                row = record(kind, model_type, name, Path(folder))
            print(f"{_ROW}{json.dumps(row.to_json())}", flush=True)
        return
    if chosen.most:
        raise SystemExit(_most())
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    rows = {(r.kind, r.model_type): r for r in _known(chosen.results)}
    wanted = [
        (kind, model_type, name)
        for kind, model_type, name in types()
        # Without names, from where an earlier run got to.
        if (
            f"{kind}:{model_type}" in chosen.only if chosen.only else (kind, model_type) not in rows
        )
    ]
    for row in _apart(wanted):
        rows[row.kind, row.model_type] = row
        with chosen.results.open("a") as file:
            file.write(json.dumps(row.to_json()) + "\n")
        done = sum(outcome == "done" for outcome in row.outcomes.values())
        result = row.built or f"{done} of {len(row.outcomes)}"
        print(f"{row.kind}:{row.model_type}: {result}", flush=True)
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


def _apart(wanted: list[tuple[str, str, str]]) -> Iterator[Row]:
    """Try types in a process of their own; where it crashes or hangs, the next go on in another."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    while wanted:
        these = [":".join(names) for names in wanted]
        command = [sys.executable, "-m", "benchmarks.model_types", "--these", *these]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT
            ) as process,
        ):
            assert process.stdout is not None
            while wanted:
                watch = threading.Timer(_SECONDS, process.kill)
                watch.start()
                line = next((text for text in process.stdout if text.startswith(_ROW)), None)
                watch.cancel()
                names, *wanted = wanted
                if line is None:
                    process.wait()
                    errors.seek(0)
                    last = (errors.read().strip().splitlines() or ["no output"])[-1]
                    yield Row(*names, built=f"the process ended with {process.returncode}: {last}")
                    break
                yield Row(**json.loads(line.removeprefix(_ROW)))


if __name__ == "__main__":
    main()
