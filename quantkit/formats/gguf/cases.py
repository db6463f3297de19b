"""The texts by which llama.cpp's tokenization is compared with transformers'.

They are a fixed corpus, texts made of the vocabulary's own tokens, special tokens beside text, and
whole chats by the model's own templates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.formats.gguf.corpus import BESIDE_SPECIAL, CHATS, CORPUS
from quantkit.formats.gguf.letters import text_of
from quantkit.formats.gguf.vocabulary import ENDS_BY_TEXT, TokenType, Vocabulary

_PER_SHAPE, _MOST_TEXTS = 2, 3000
_PER_KIND = 6  # special tokens of one kind that are tried beside text
_RUN = re.compile(r"(.)\1{4,}")


@dataclass(frozen=True)
class Case:
    """A text, and its ids by transformers."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Cases:
    """What llama.cpp is to tokenize as transformers does.

    ``plain``: texts without special tokens; ``spaced``: such that begin with a space, of
    SentencePiece's kind of tokenizers; ``special``: texts around special tokens; ``chats``: by the
    model's templates.
    """

    plain: list[Case]
    spaced: list[Case]
    special: list[Case]
    chats: list[Case]

    def texts(self) -> list[str]:
        return [case.text for group in self._groups() for case in group]

    def used(self) -> set[int]:
        """Every id of any text."""
        return {index for group in self._groups() for case in group for index in case.ids}

    def _groups(self) -> tuple[list[Case], ...]:
        return self.plain, self.spaced, self.special, self.chats


def build_cases(
    vocabulary: Vocabulary,
    tokenizer: Any,
    templates: Mapping[str, str],
    added: list[dict[str, Any]],
) -> Cases:
    """Tokenize all texts by ``tokenizer``, of transformers.

    ``templates``: of chats, by name; ``added``: the added tokens, as in tokenizer.json.
    """

    def tokenized(texts: list[str]) -> list[Case]:
        if not texts:
            return []
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [Case(text, list(row)) for text, row in zip(texts, ids, strict=True)]

    words = [token["content"] for token in added if token["content"].replace("▁", " ").strip()]
    texts = [*CORPUS, *_own_texts(vocabulary)]
    # Added tokens may be ordinary words, and llama.cpp takes some ordinary tokens for special ones.
    cut_at = [*words, *(token for token in vocabulary.tokens if token in ENDS_BY_TEXT)]
    around = [text for text in texts if any(word in text for word in cut_at)]
    texts = [text for text in texts if text not in set(around)] if around else texts
    # SentencePiece itself marks the beginning of a text even before a space, as llama.cpp does, but
    # not all of transformers' conversions: these texts don't decide whether a vocabulary is right.
    apart = vocabulary.model == "llama"
    return Cases(
        plain=tokenized([text for text in texts if not (apart and text.startswith(" "))]),
        spaced=tokenized([text for text in texts if apart and text.startswith(" ")]),
        special=tokenized(list(dict.fromkeys([*around, *_beside_special(words, added)]))),
        chats=tokenized(list(dict.fromkeys(_rendered(tokenizer, templates)))),
    )


def _rendered(tokenizer: Any, templates: Mapping[str, str]) -> Iterator[str]:
    """Every chat by every template, where the template can render it."""
    for template in templates.values():
        for chat in CHATS:
            try:
                yield tokenizer.apply_chat_template(
                    chat,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=chat[-1]["role"] == "user",
                )
            except Exception:  # a template refuses a chat in any way it likes
                continue


def _beside_special(words: list[str], added: list[dict[str, Any]]) -> Iterator[str]:
    """Texts around the first added tokens of every kind, of those in ``words``."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for token in added:
        if token["content"] not in words:
            continue
        flags = ("special", "normalized", "single_word", "lstrip", "rstrip")
        kinds.setdefault(tuple(token.get(flag) for flag in flags), []).append(token["content"])
    for texts in kinds.values():
        chosen = texts[:_PER_KIND]
        for index, text in enumerate(chosen):
            for pattern in BESIDE_SPECIAL:
                yield pattern.format(text, chosen[index - 1])


def _own_texts(vocabulary: Vocabulary) -> list[str]:
    """Texts made of one or two tokens of every shape in the vocabulary."""
    seen: dict[str, int] = {}
    texts: list[str] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        text = text_of(token, vocabulary.model) if kind == TokenType.NORMAL else None
        # llama.cpp has no normalizers such as NFC, so only text that they leave alone is tried.
        if not text or not (text.isascii() or unicodedata.is_normalized("NFC", text)):
            continue
        shape = _RUN.sub(r"\1\1\1\1", text.translate(_SHAPES))
        seen[shape] = seen.get(shape, 0) + 1
        if seen[shape] <= _PER_SHAPE and len(texts) < _MOST_TEXTS:
            texts += [text, f"x{text}x{text}"]
    return texts


class _Shapes(dict[int, str]):
    """Every character → a character for its kind: category, and the script of letters."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        kind = character
        if category == "Lo":
            kind = chr(0xE000 + (code >> 9))
        elif category[0] in "LNM":
            kind = {"Lu": "A", "Lt": "A", "Ll": "a", "Lm": "m"}.get(category, category[0].lower())
        elif code > 127:
            kind = "?"
        self[code] = kind
        return kind


_SHAPES = _Shapes()
