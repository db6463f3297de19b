"""A data set becomes rows of tokens, all of one length, the same for everyone who has the file."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError


@dataclass(frozen=True)
class Rows:
    """ids: int64 (rows, sequence_length); digest: sha256 of the file; wanted: rows asked for."""

    ids: Tensor
    digest: str
    wanted: int | None

    @property
    def count(self) -> int:
        return int(self.ids.shape[0])


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer. Raises InputError when it has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # whatever a tokenizer's own code raises, it can't be loaded
        raise InputError(
            f"its tokenizer can't be loaded ({type(error).__name__}: {error})",
            where=str(directory),
            mend="A checkpoint needs tokenizer.json (or the files of its slow tokenizer).",
        ) from error


def pack(
    dataset: Path, tokenizer: Any, *, sequence_length: int, rows: int | None, seed: int | None
) -> Rows:
    """Tokenize a data set and cut it into rows of ``sequence_length``.

    A .jsonl file has an object a line with ``text``, or ``messages`` for the chat template; any
    other file is one document of plain text. Documents are shuffled with ``seed`` (None keeps
    their order), joined with the end-of-sequence token and cut; what is left at the end is
    dropped. With ``rows`` at most so many are returned: the text may hold fewer.

    Raises InputError for unreadable files, malformed lines, or text too short for one row.
    """
    documents = _documents(dataset, tokenizer)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    enough = None if rows is None else rows * sequence_length
    for document in documents:
        if enough is not None and len(ids) >= enough:
            break
        ids += tokenizer.encode(document, add_special_tokens=False)
        ids += separator
    count = len(ids) // sequence_length
    if rows is not None:
        count = min(count, rows)
    if count == 0:
        raise InputError(
            f"holds {len(ids)} tokens, less than one row of {sequence_length}",
            where=str(dataset),
            mend="Give more text or a shorter sequence_length.",
        )
    table = torch.tensor(ids[: count * sequence_length]).view(count, sequence_length)
    return Rows(table, hashlib.sha256(dataset.read_bytes()).hexdigest(), rows)


def no_such_dataset(dataset: Path) -> InputError:
    """The error for a data set that isn't there."""
    return InputError(
        "no such file",
        where=str(dataset),
        mend="Paths in a YAML file are relative to that file.",
    )


def check_length(length: int, config: dict[str, Any], section: str) -> None:
    """Raise InputError for rows longer than the model has positions."""
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        raise InputError(
            f"sequence_length {length} exceeds the model's {limit} positions",
            where=section,
            mend=f"Set {section}.sequence_length to at most {limit}.",
        )


def _documents(dataset: Path, tokenizer: Any) -> list[str]:
    try:
        text = dataset.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise no_such_dataset(dataset) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't be read as UTF-8 text ({error})", where=str(dataset)) from error
    if not text.strip():
        raise InputError("is empty", where=str(dataset), mend="Give it text to calibrate on.")
    if dataset.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            documents.append(_document(line, f"{dataset}:{number}", tokenizer))
    return documents


def _document(line: str, where: str, tokenizer: Any) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"isn't valid JSON ({error})", where=where) from error
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        text: str = value["text"]
        return text
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return render_chat(value["messages"], tokenizer, where, add_generation_prompt=False)
    raise InputError('needs an object with "text" or "messages"', where=where)


def render_chat(
    messages: list[dict[str, Any]], tokenizer: Any, where: str, *, add_generation_prompt: bool
) -> str:
    """Render chat messages by the model's own template. Raises InputError when it has none."""
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (ValueError, TemplateError, KeyError, TypeError) as error:
        raise InputError(f"the chat template can't render it ({error})", where=where) from error
    return text
