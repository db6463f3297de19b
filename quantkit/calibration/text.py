"""Calibration text: a data set becomes rows of tokens, all of one length."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.files import openable
from quantkit.checkpoint.sidecars import check_sidecars
from quantkit.checkpoint.tokenizer_files import check_packages
from quantkit.documents.dataset import Dataset, Document, read_dataset
from quantkit.documents.text import check_text
from quantkit.model.limits import Limits


@dataclass(frozen=True)
class Rows:
    """Rows of tokens.

    ids: (rows, sequence_length) int64; digest: SHA-256 of the data set; found: what it held, in
    words for people; beginning: the tokens that every row begins with, None where none were asked
    for; remark: what a reader of figures on these rows should know.
    """

    ids: Tensor
    digest: str
    found: str = ""
    beginning: tuple[str, ...] | None = None
    remark: str | None = None

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
        return AutoTokenizer.from_pretrained(openable(directory), trust_remote_code=False)
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
    bos: bool = False,
    limits: Limits | None = None,
) -> Rows:
    """Tokenize a data set and cut it into rows of ``sequence_length``.

    Documents are shuffled with ``seed`` (None keeps their order), joined by the end-of-sequence
    token and cut; tokens after the last whole row are dropped. ``rows`` is the largest number of
    rows returned (None: all); the text may hold fewer. The result depends on these arguments alone.

    bos: begin every document, and every row that a document is continued in, with what the
    tokenizer puts before a text (see ``beginning_of``); limits: of the model, whose embedding must
    have every token.

    Raises InputError for a data set that can't be read, for text too short for one row, and for a
    token that the model lacks.
    """
    texts = read_dataset(dataset)
    documents = list(texts.documents)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    added = beginning_of(tokenizer)
    begin = added if bos else []
    if len(begin) >= sequence_length:
        raise InputError(
            f"the tokenizer begins every text with {len(begin)} tokens, which leaves no room in "
            f"rows of {sequence_length}",
            where=str(dataset),
            fix="Set a longer sequence_length.",
        )
    # Large data sets aren't tokenized further than needed.
    table: list[list[int]] = []
    row: list[int] = []
    for ids in _tokenized(documents, tokenizer, begin, limits):
        done = 0
        while done < len(ids):
            if not row and ids[done : done + len(begin)] != begin:
                row = list(begin)
            taken = ids[done : done + sequence_length - len(row)]
            row, done = row + taken, done + len(taken)
            if len(row) == sequence_length:
                table.append(row)
                row = []
        if rows is not None and len(table) >= rows:
            table = table[:rows]
            break
    if not table:
        raise InputError(
            f"holds {len(row)} tokens, less than one row of {sequence_length}",
            subject=str(dataset),
            fix="Give more text or a shorter sequence_length.",
        )
    found = texts.found
    if not _has_template(tokenizer) and any(d.plain is not None for d in documents):
        found += ", joined as plain text: the model has no chat template"
    named = tuple(map(str, tokenizer.convert_ids_to_tokens(added)))
    remark = None
    if named and not bos:
        remark = f"rows don't begin with {' '.join(named)}, as this tokenizer begins texts"
    elif named:
        found += f"; rows begin with {' '.join(named)}"
    return Rows(torch.tensor(table), texts.digest, found, named if bos else None, remark)


def count_tokens(
    dataset: Dataset, tokenizer: Any, *, bos: bool = False, limits: Limits | None = None
) -> int:
    """How many tokens a data set has, before it is cut into rows: see ``pack_rows``."""
    begin = beginning_of(tokenizer) if bos else []
    documents = read_dataset(dataset).documents
    return sum(map(len, _tokenized(documents, tokenizer, begin, limits)))


def beginning_of(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text by itself: BOS, nothing, or several tokens."""
    bare, full = (list(tokenizer.encode("a", add_special_tokens=added)) for added in (False, True))
    for place in range(len(full) - len(bare) + 1):
        if full[place : place + len(bare)] == bare:
            return full[:place]
    # The text itself is tokenized otherwise behind special tokens.
    special = set(tokenizer.all_special_ids)
    return list(itertools.takewhile(special.__contains__, full))


def _tokenized(
    documents: Iterable[Document], tokenizer: Any, begin: list[int], limits: Limits | None
) -> Iterator[list[int]]:
    """The ids of each document, its end-of-sequence token included."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if begin and separator == begin[:1]:
        separator = []  # what ends a document begins the next
    for document in documents:
        text, templated = _rendered(document, tokenizer)
        # Chat templates write their own special tokens, and texts are separated below.
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        if not templated and ids[: len(begin)] != begin:
            ids = begin + ids
        if not (begin and ids[-1:] == separator):
            ids += separator
        if limits is not None:
            limits.check_ids(ids, tokenizer, document.where)
        yield ids


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(document: Document, tokenizer: Any) -> tuple[str, bool]:
    """A document's text, and whether the model's chat template wrote it."""
    if isinstance(document.content, str):
        return document.content, False
    if document.plain is not None and not _has_template(tokenizer):
        return document.plain, False
    messages, where = document.content, document.where
    text = render_chat(
        messages, tokenizer, where, add_generation_prompt=False, tools=document.tools
    )
    return text, True


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

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    try:
        text = render(messages, tools)
    except Exception as error:  # a template is code, and may raise anything
        raise InputError(
            f"the model's chat template can't render the messages ({error})", where=where
        ) from error
    # A template that doesn't know tools, or calls of them, drops them without an error.
    uncalled = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
    for what, without in (("tools", (messages, None)), ("tool calls", (uncalled, tools))):
        try:
            ignored = without != (messages, tools) and render(*without) == text
        except Exception:
            ignored = False  # it does look at them
        if ignored:
            raise InputError(
                f"the model's chat template leaves the {what} out",
                where=where,
                fix="Leave them out of the data, or use a chat template that shows them.",
            )
    check_text(text, where)
    return text
