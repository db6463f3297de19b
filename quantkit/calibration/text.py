"""Calibration text: a data set becomes rows of tokens, all of one length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.checkpoint.sidecars import check_sidecars
from quantkit.checkpoint.tokenizer_files import check_packages
from quantkit.documents.dataset import Dataset, Document, read_dataset
from quantkit.documents.text import check_text
from quantkit.model.limits import Limits


@dataclass(frozen=True)
class Rows:
    """Rows of tokens. ids: (rows, sequence_length) int64; digest: SHA-256 of the data set."""

    ids: Tensor
    digest: str

    @property
    def count(self) -> int:
        return int(self.ids.shape[0])


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint.

    Raises InputError where none can be loaded, MachineError where a package for its files lacks.
    """
    from transformers import AutoTokenizer

    try:
        check_sidecars(directory)
        return AutoTokenizer.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a tokenizer's own code may raise anything
        check_packages(directory)
        raise InputError(
            f"the tokenizer can't be loaded ({type(error).__name__}: {error})",
            where=str(directory),
            fix="A checkpoint needs tokenizer.json (or the files of its slow tokenizer).",
        ) from error


def pack_rows(
    dataset: Dataset,
    tokenizer: Any,
    *,
    sequence_length: int,
    rows: int | None,
    seed: int | None,
    limits: Limits | None = None,
) -> Rows:
    """Tokenize a data set and cut it into rows of ``sequence_length``.

    Documents are shuffled with ``seed`` (None keeps their order), joined by the end-of-sequence
    token and cut; tokens after the last whole row are dropped. ``rows`` is the largest number of
    rows returned (None: all); the text may hold fewer. The result depends on these arguments alone.

    limits: of the model, whose embedding must have every token.

    Raises InputError for a data set that can't be read, for text too short for one row, and for a
    token that the model lacks.
    """
    documents, digest = read_dataset(dataset)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    # Large data sets aren't tokenized further than needed.
    enough = None if rows is None else rows * sequence_length
    for document in documents:
        if enough is not None and len(ids) >= enough:
            break
        # Chat templates write their own special tokens, and texts are separated below.
        tokens = tokenizer.encode(_rendered(document, tokenizer), add_special_tokens=False)
        tokens += separator
        if limits is not None:
            limits.check_ids(tokens, tokenizer, document.where)
        ids += tokens
    count = len(ids) // sequence_length
    if rows is not None:
        count = min(count, rows)
    if count == 0:
        raise InputError(
            f"holds {len(ids)} tokens, less than one row of {sequence_length}",
            subject=str(dataset),
            fix="Give more text or a shorter sequence_length.",
        )
    table = torch.tensor(ids[: count * sequence_length]).view(count, sequence_length)
    return Rows(table, digest)


def _rendered(document: Document, tokenizer: Any) -> str:
    if isinstance(document.content, str):
        return document.content
    return render_chat(document.content, tokenizer, document.where, add_generation_prompt=False)


def render_chat(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    where: str,
    *,
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text of chat messages, rendered by the model's own chat template.

    where: names the messages in errors; tools: descriptions of functions that the model may call.
    Raises InputError where the model has no template, or one that can't render the messages or
    leaves the tools out.
    """

    def render(tools: list[dict[str, Any]] | None) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    try:
        text = render(tools)
        # A template that doesn't know tools drops them without an error.
        ignored = bool(tools) and render(None) == text
    except Exception as error:  # a template is code, and may raise anything
        raise InputError(
            f"the model's chat template can't render the messages ({error})", where=where
        ) from error
    if ignored:
        raise InputError("the model's chat template leaves the tools out", where=where)
    check_text(text, where)
    return text
