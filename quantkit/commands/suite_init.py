"""suite init: prompts + baseline → a suite to start from, with the baseline's answers as cases."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.base.output import check_output, new_directory
from quantkit.base.progress import Progress
from quantkit.calibration.text import count_tokens, load_tokenizer
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.checkpoint.reader import Checkpoint
from quantkit.documents.content import locate_file, read_bytes
from quantkit.documents.dataset import check_exists, read_dataset
from quantkit.documents.forms import asked_of, is_blank
from quantkit.documents.records import Record, counted, read_records
from quantkit.engines import transformers as hf
from quantkit.judging.answers import Answer
from quantkit.judging.cases import Case, cases_of, check_prompts, load_cases
from quantkit.judging.regression import answer_cases
from quantkit.model.device import resolve_device
from quantkit.model.limits import Limits
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.recipes.suite import load_suite

SUITE, CASES, TEXT = "suite.yaml", "cases.jsonl", "text.jsonl"
_SHORT = 5  # words of the longest answer that must be repeated exactly
_SIMILARITY = 0.8  # that any longer answer must have
_ROWS = 16  # of likelihood text, at least, where there is enough of it
_BATCH = 32  # prompts answered together
_LENGTHS = (512, 256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class NewSuite:
    """What was written.

    path: of the suite's YAML file; cases: how many; checks: how many of each kind; cut: ids of the
    cases whose answer was cut at the limit of tokens.
    """

    path: Path
    cases: int
    checks: dict[str, int]
    cut: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": str(self.path),
            "cases": self.cases,
            "checks": self.checks,
            "cut": list(self.cut),
        }


def init_suite(
    prompts: Path,
    baseline: Checkpoint,
    out: Path,
    *,
    name: str | None,
    text: Path | None,
    max_new_tokens: int,
    device: str,
    force: bool,
    progress: Progress,
) -> NewSuite:
    """Ask the baseline each prompt, greedily in float32, and write a suite of its answers.

    prompts: a text with one prompt a line, cases whose ``check`` may be left out, or records of
    text, whose answers are left out; texts are asked through the chat template where the model has
    one. name: the suite's, that of ``out`` if None. text: held-out text for likelihoods; the
    prompts and answers if None.

    Raises QuantkitError; nothing is written then.
    """
    check_output(out, "a suite", SUITE, force=force)
    if text is not None:
        text = locate_file(str(text), Path.cwd())
        check_exists(text)
        progress.note(f"likelihood text: {read_dataset(text).found}")
    tokenizer = load_tokenizer(baseline.tokenizer)
    chat = getattr(tokenizer, "chat_template", None) is not None
    asked, found = _read_prompts(locate_file(str(prompts), Path.cwd()), max_new_tokens, chat)
    progress.note(f"prompts: {found}")
    where = resolve_device(device)
    hf.check_memory(baseline.parameters(), torch.float32, "recording answers", where)
    skeleton = Skeleton(baseline, torch.float32)
    limits = Limits.of(skeleton, baseline)
    check_prompts(asked, tokenizer, limits)
    stream = Stream(skeleton, baseline, where)
    end = end_tokens(baseline.tokenizer, tokenizer)
    with (
        progress.task("record the baseline's answers", len(asked)) as task,
        stream.whole() as model,
    ):
        answers: list[Answer] = []
        generate, score = partial(hf.generate, model, end=end), partial(hf.score, model)
        for start in range(0, len(asked), _BATCH):
            batch = asked[start : start + _BATCH]
            answers += answer_cases(batch, tokenizer, generate, score)
            task.advance(len(batch))
    with new_directory(out) as directory:
        cases = [_with_check(c, a) for c, a in zip(asked, answers, strict=True)]
        _write_lines(directory / CASES, cases)
        dataset = TEXT if text is None else f"text{_suffixes(text)}"
        if text is None:
            documents = [_document(c, a) for c, a in zip(asked, answers, strict=True)]
            _write_lines(directory / TEXT, documents)
        else:
            (directory / dataset).write_bytes(read_bytes(text))
        length = _row_length(directory / dataset, tokenizer, limits)
        content = _SUITE.format(name=_suite_name(name or out), dataset=dataset, length=length)
        (directory / SUITE).write_text(content, encoding="utf-8")
        # A suite that couldn't be loaded again must not appear.
        load_suite(str(directory / SUITE))
        load_cases(directory / CASES, allow_code=True)
    checks = Counter(name for case in cases for check in case["check"] for name in check)
    cut = [c.id for c, a in zip(asked, answers, strict=True) if a.tokens >= c.max_new_tokens]
    return NewSuite(out / SUITE, len(cases), dict(checks), tuple(cut))


def _suffixes(path: Path) -> str:
    """The last suffixes of a text's name, such as .jsonl.gz."""
    suffixes = "".join(path.suffixes[-2:])
    return suffixes if suffixes.isascii() and suffixes else ".txt"


def _suite_name(name: str | Path) -> str:
    """A name that suites may have, made from one that somebody chose or from a directory's."""
    text = name if isinstance(name, str) else name.resolve().name
    return re.sub(r"[^a-z0-9._+-]+", "-", text.lower()).strip("-._+") or "suite"


def _read_prompts(path: Path, max_new_tokens: int, chat: bool) -> tuple[list[Case], str]:
    """Prompts as cases, and what was found. Their check, until the answer is known: similarity.

    chat: whether texts are asked through the chat template.
    """
    asked = {"max_new_tokens": max_new_tokens, "check": {"similarity": _SIMILARITY}}

    def parse(record: Record) -> Any:
        named = {"id": f"prompt-{record.number:03}", **asked}
        value = asked_of(record.value)
        if isinstance(value, dict):
            return {**named, **value}
        if isinstance(value, str) and chat:
            return {**named, "messages": [{"role": "user", "content": value}]}
        return {**named, "prompt": value} if isinstance(value, str) else value

    found = read_records(path)
    kept = tuple(r for r in found.records if r.problem is not None or not is_blank(r.value))
    if found.records and not kept:
        raise InputError("holds only blank prompts", subject=str(path))
    cases = cases_of(replace(found, records=kept), path, allow_code=False, parse=parse)
    what = f"{path.name}: {found.shape}, {counted(len(cases), 'prompt')}"
    blank = len(found.records) - len(kept)
    return cases, f"{what}; {counted(blank, 'blank one')} dropped" if blank else what


def _with_check(case: Case, answer: Answer) -> dict[str, Any]:
    """A case with the baseline's answer as its check, unless the case came with one."""
    content = case.model_dump(mode="json", exclude_defaults=True)
    if content["check"] != [{"similarity": {"min": _SIMILARITY}}]:
        return content
    text = answer.text.strip()
    ended = answer.tokens < case.max_new_tokens  # by itself, not cut at the limit
    if ended and 0 < len(text.split()) <= _SHORT:
        return {**content, "check": [{"exact": text}]}
    return {**content, "check": [{"similarity": {"min": _SIMILARITY, "to": answer.text}}]}


def _document(case: Case, answer: Answer) -> dict[str, Any]:
    """Prompt and answer as one document of likelihood text."""
    if case.messages is None:
        return {"text": f"{case.prompt}{answer.text}"}
    return {"messages": [*case.messages, {"role": "assistant", "content": answer.text}]}


def _row_length(dataset: Path, tokenizer: Any, limits: Limits) -> int:
    """The longest row length that gives enough rows for an interval, in tokens."""
    tokens = count_tokens(dataset, tokenizer, bos=True, limits=limits)
    limit = limits.positions or _LENGTHS[0]
    for length in _LENGTHS:
        if length <= limit and tokens >= _ROWS * length:
            return length
    if tokens >= 2 * _LENGTHS[-1]:
        return _LENGTHS[-1]
    raise InputError(
        f"has {tokens} tokens; likelihoods need at least {2 * _LENGTHS[-1]}",
        subject=dataset.name,
        fix="Give more prompts, or a longer held-out text by --text.",
    )


def _write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(value, ensure_ascii=False) for value in values)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


_SUITE = """\
schema: 1
name: {name}
version: 1.0.0
description: Cases recorded from the baseline's own answers.
likelihood:
  # Held-out text like what the model is used for. The prompts and the baseline's answers are
  # enough to begin with; intervals can be relied on from a few dozen rows.
  dataset: {dataset}
  sequence_length: {length}
  # Rows begin as the tokenizer begins a text: with BOS, where it adds one.
  bos: true
regression:
  # Short answers must be repeated exactly, long ones must be similar to the baseline's. Read
  # them: a wrong answer that was recorded is a wrong answer that is required. Mark what must
  # never break with "critical": true, and prefer checks of what an answer must contain.
  cases: cases.jsonl
gates:
  # Bounds to begin with. Judge an artifact that you know to be good and one that you know to be
  # bad (2 bits, round to nearest), and choose bounds between them.
  - {{metric: kl_divergence.mean, max: 0.05}}
  - {{metric: perplexity.ratio, max: 1.05}}
  - {{metric: regression.broken_critical, max: 0}}
  - {{metric: regression.pass_rate, min: 0.9}}
"""
