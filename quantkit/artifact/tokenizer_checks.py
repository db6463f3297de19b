"""Checks that an artifact's tokenizer and chat template are those of the baseline.

They are compared on texts and chats; the same chats are prompts for an engine on trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quantkit.artifact.findings import Check
from quantkit.base.errors import InputError
from quantkit.calibration.text import render_chat
from quantkit.formats.gguf import corpus

PLAIN = (
    "Once upon a time there was",
    "The most important thing to know about",
    "In the morning they went to the",
)
# A question, one after a system message, and a conversation: an engine on trial answers them all.
CHATS = corpus.CHATS[:3]
# Under these names both in GGUF's metadata, after "tokenizer.ggml.", and as tokenizers' attributes.
_SPECIAL = ("bos_token_id", "eos_token_id")


def _render_chats(tokenizer: Any, template: str | None) -> list[str | None]:
    """Each of ``CHATS`` as the template renders it; None where the template refuses the chat."""
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


def sample_texts(tokenizer: Any, marks_beginnings: bool = False) -> list[str]:
    """Texts to compare tokenizers on: scripts, code, spaces, and chats as the template has them.

    marks_beginnings: leaves out the texts that begin with a space, for an engine that marks the
    beginning of those too.
    """
    chats = _render_chats(tokenizer, tokenizer.chat_template)
    all_texts = [*corpus.CORPUS, *(text for text in chats if text is not None)]
    return [text for text in all_texts if not (marks_beginnings and text.startswith(" "))]


def sample_prompts(tokenizer: Any) -> list[list[int]]:
    """Prompts as token ids: chats where there is a chat template, plain text otherwise."""
    chats = [t for t in _render_chats(tokenizer, tokenizer.chat_template) if t is not None]
    if chats:
        return [tokenizer.encode(text, add_special_tokens=False) for text in chats]
    return [tokenizer.encode(text) for text in PLAIN]


def compare_template(original: Any, own: Any, template: Any) -> Iterator[Check]:
    """Whether the chat template ``template`` of the artifact is the baseline's, and renders alike.

    original, own: the tokenizers of the baseline and the artifact.
    """
    if original.chat_template is None and template is None:
        yield Check("chat template", True, "neither has one")
        return
    same = original.chat_template == template
    detail = f"the same {len(str(template))} characters"
    if not same:
        detail = _difference(original.chat_template, template)
    yield Check("chat template", same, detail)
    expected = _render_chats(original, original.chat_template)
    rendered = _render_chats(own, template)
    differing = [pair for pair in zip(expected, rendered, strict=True) if pair[0] != pair[1]]
    detail = f"{len(CHATS)} rendered equally"
    if differing:
        detail = f"became {differing[0][1]!r}, not {differing[0][0]!r}"
    yield Check("chats", not differing, detail)


def compare_ids(
    texts: Sequence[str], original: Sequence[list[int]], own: Sequence[list[int]]
) -> Check:
    """Whether texts have the same token ids by the baseline's tokenizer and by the artifact's."""
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
    """Whether a GGUF file's metadata has the baseline's ids that begin and end a text."""
    for name in _SPECIAL:
        own, expected = metadata.get(f"tokenizer.ggml.{name}"), getattr(original, name)
        if expected is not None and own != expected:
            return Check("special tokens", False, f"{name} is {own}, not {expected}")
    return Check("special tokens", True, "those of the baseline")


def _difference(original: str | None, own: str | None) -> str:
    if own is None:
        return "is missing"
    if original is None:
        return "is one that the baseline doesn't have"
    return f"differs: {len(str(own))} characters, the baseline's has {len(str(original))}"
