"""Texts and chats by which two tokenizers are compared, and an engine is made to speak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantkit.artifact.findings import Check
from quantkit.base.errors import InputError
from quantkit.calibration.text import render_chat
from quantkit.formats.gguf.pretokenizer import CORPUS

PLAIN = (
    "Once upon a time there was",
    "The most important thing to know about",
    "In the morning they went to the",
)
_QUESTION = {"role": "user", "content": "How many days has a week?"}
CHATS: tuple[list[dict[str, str]], ...] = (
    [_QUESTION],
    [{"role": "system", "content": "Answer in one word."}, _QUESTION],
    [
        _QUESTION,
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "  And a year?\n\n1) 52 weeks  2) 12"},
    ],
)
# GGUF's key → the tokenizer's attribute.
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}


def rendered(tokenizer: Any, template: str | None) -> list[str | None]:
    """The chats by a template; None for each that it refuses."""
    results: list[str | None] = []
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        for chat in CHATS:
            try:
                text = render_chat(chat, tokenizer, "chat", add_generation_prompt=True)
            except InputError:
                results.append(None)
            else:
                results.append(text)
    finally:
        tokenizer.chat_template = kept
    return results


def texts(tokenizer: Any, marks_beginnings: bool = False) -> list[str]:
    """A corpus of scripts, code and spaces, and the chats as the tokenizer's template has them.

    ``marks_beginnings``: the other side marks the beginning of a text even before a space, so
    that texts which begin with one aren't compared.
    """
    chats = rendered(tokenizer, tokenizer.chat_template)
    found = [*CORPUS, *(text for text in chats if text is not None)]
    return [text for text in found if not (marks_beginnings and text.startswith(" "))]


def openings(tokenizer: Any) -> list[list[int]]:
    """Prompts as token ids: chats where there is a template, plain text otherwise."""
    chats = [text for text in rendered(tokenizer, tokenizer.chat_template) if text is not None]
    if chats:
        return [tokenizer.encode(text, add_special_tokens=False) for text in chats]
    return [tokenizer.encode(text) for text in PLAIN]


def compare_template(original: Any, own: Any, template: Any) -> Iterator[Check]:
    """The chat template, and what it makes of chats."""
    if original.chat_template is None and template is None:
        yield Check("chat template", True, "neither has one")
        return
    same = original.chat_template == template
    well = f"the same {len(str(template))} characters"
    yield Check("chat template", same, well if same else _differ(original.chat_template, template))
    theirs = rendered(original, original.chat_template)
    mine = rendered(own, template)
    wrong = [
        number for number, pair in enumerate(zip(theirs, mine, strict=True)) if len({*pair}) > 1
    ]
    detail = f"{len(CHATS)} rendered equally"
    if wrong:
        detail = f"became {mine[wrong[0]]!r}, not {theirs[wrong[0]]!r}"
    yield Check("chats", not wrong, detail)


def compare_ids(
    texts: Sequence[str], original: Sequence[list[int]], own: Sequence[list[int]]
) -> Check:
    """The token ids of texts, before and after."""
    for text, before, after in zip(texts, original, own, strict=True):
        if list(before) != list(after):
            place = next(
                (i for i, pair in enumerate(zip(before, after, strict=False)) if len({*pair}) > 1),
                min(len(before), len(after)),
            )
            return Check(
                "tokens",
                False,
                f"{text!r} differs from token {place} on: {list(after)[place : place + 4]}, "
                f"not {list(before)[place : place + 4]}",
            )
    return Check("tokens", True, f"{len(texts)} texts have equal ids")


def compare_special_ids(original: Any, metadata: dict[str, Any]) -> Check:
    """The ids that begin and end a text, in a GGUF file's metadata."""
    for key, name in _SPECIAL.items():
        mine, theirs = metadata.get(f"tokenizer.ggml.{key}"), getattr(original, name)
        if theirs is not None and mine != theirs:
            return Check("special tokens", False, f"{key} is {mine}, not {theirs}")
    return Check("special tokens", True, "those of the baseline")


def _differ(original: str | None, own: str | None) -> str:
    if own is None:
        return "is missing"
    if original is None:
        return "is one that the baseline doesn't have"
    return f"differs: {len(own)} characters, the baseline's has {len(original)}"
