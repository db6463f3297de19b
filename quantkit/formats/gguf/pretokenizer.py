"""Which of llama.cpp's pre-tokenizers splits text as the checkpoint's tokenizer does.

llama.cpp has its pre-tokenizers compiled in and knows them by name. Which one belongs to a
tokenizer.json isn't read off its regexes but tried: llama.cpp tokenizes texts with one candidate
after the other, and the first that agrees with the ``tokenizers`` library on every id is the one.

The texts are a fixed corpus and texts made of the vocabulary's own tokens: another pre-tokenizer
only shows where a token crosses a boundary, so one or two tokens of every shape (letters then
digits, spaces then a letter, …) are among them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from quantkit.base.errors import InputError
from quantkit.formats.gguf.corpus import CORPUS
from quantkit.formats.gguf.vocabulary import TokenType, Vocabulary, can_tokenize, loaded, tokenize

# One name for each of llama.cpp's behaviours, the common ones first: those that look words up in
# the vocabulary before merging (``ignore_merges``), and the others.
WHOLE_WORDS = ("llama-bpe", "tekken", "glm4", "youtu")
MERGES_ONLY = (
    *("qwen2", "gpt-2", "gpt-4o", "smollm", "starcoder", "refact", "command-r", "dbrx"),
    *("smaug-bpe", "olmo", "mpt", "stablelm2", "falcon", "qwen35", "deepseek-llm"),
    *("deepseek-coder", "deepseek-v3", "chatglm-bpe", "bloom", "gpt3-finnish", "poro-chat"),
    *("viking", "jais", "jais-2", "codeshell", "exaone", "exaone-moe", "chameleon"),
    *("minerva-7b", "superbpe", "trillion", "granite-docling", "bailingmoe", "seed-coder"),
    *("hunyuan", "hunyuan-dense", "kimi-k2", "grok-2", "afmoe", "minimax-m2", "solar-open"),
    *("tiny_aya", "joyai-llm", "mellum2", "default"),
)

_PER_SHAPE, _MOST_TEXTS = 2, 3000
_LONGEST_KEY = 12  # characters by which the texts' substrings are looked up
_RUN = re.compile(r"(.)\1{4,}")


def find_pretokenizer(
    vocabulary: Vocabulary, tokenizer: Any, special: Iterable[int], *, strict: bool = True
) -> Vocabulary:
    """Return the vocabulary with the settings by which llama.cpp tokenizes like ``tokenizer``.

    ``tokenizer``: of the ``tokenizers`` library. ``special``: types of tokens that text is cut at
    before anything else. When no setting agrees on every text, the result is the one that agrees
    on most of them from the first on, or an InputError if ``strict``. Raises MachineError when
    llama.cpp's library isn't installed.
    """
    texts = [*CORPUS, *_own_texts(vocabulary)]
    if vocabulary.model == "llama":
        # SentencePiece marks the beginning of a text even before a space; the tokenizers
        # library's Metaspace doesn't. llama.cpp does as SentencePiece.
        texts = [text for text in texts if not text.startswith(" ")]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    expected = [encoding.ids for encoding in encodings]
    part, ids = _needed_part(vocabulary, texts, set(special), set().union(*expected))
    furthest, best, example = -1, vocabulary, ""
    for candidate in _candidates(part):
        with loaded(candidate) as handle:
            if handle is None:
                continue
            agreed, got = _agreement(handle, ids, texts, expected)
        if agreed > furthest:
            furthest = agreed
            best = replace(
                vocabulary, pre=candidate.pre, add_space_prefix=candidate.add_space_prefix
            )
        if agreed == len(texts):
            return best
        if agreed == furthest:
            text, wanted = texts[agreed], expected[agreed]
            example = f"{text!r} is {wanted} there and {got} by {candidate.pre!r}"
    if not strict:
        return best
    raise InputError(
        f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does: {example}",
        fix="If you know which one is meant to be used, name it: quantize.pre_tokenizer.",
    )


def check_pretokenizer(name: str) -> None:
    """Raise InputError for a pre-tokenizer that llama.cpp, where it is installed, doesn't know."""
    if not can_tokenize():
        return
    smallest = Vocabulary("gpt2", ["a", "b", "ab"], [1, 1, 1], ["a b"], [], pre=name)
    with loaded(smallest) as handle:
        if handle is None:
            raise InputError(
                f"llama.cpp knows no pre-tokenizer {name!r}",
                where="quantize.pre_tokenizer",
                fix=f"Known, among others: {', '.join((*WHOLE_WORDS, *MERGES_ONLY))}.",
            )


def _agreement(
    handle: int, ids: list[int], texts: list[str], expected: list[list[int]]
) -> tuple[int, list[int]]:
    """How many texts from the first on llama.cpp tokenizes as expected, and the next one's ids."""
    for count, (text, wanted) in enumerate(zip(texts, expected, strict=True)):
        got = [ids[index] for index in tokenize(handle, text)]
        if got != wanted:
            return count, got
    return len(texts), []


def _candidates(vocabulary: Vocabulary) -> Iterator[Vocabulary]:
    if vocabulary.model == "gpt2":
        names = (*MERGES_ONLY, *WHOLE_WORDS)
        if vocabulary.ignore_merges:
            names = (*WHOLE_WORDS, *MERGES_ONLY)
        for name in names:
            yield replace(vocabulary, pre=name)
    else:
        for prefix in (True, False):
            yield replace(vocabulary, add_space_prefix=prefix)


def _own_texts(vocabulary: Vocabulary) -> list[str]:
    """Texts made of one or two tokens of every shape in the vocabulary."""
    seen: dict[str, int] = {}
    texts: list[str] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        text = _text_of(token, vocabulary.model) if kind == TokenType.NORMAL else None
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


def _letters() -> dict[int, int]:
    """GPT-2's letters for bytes: of printable ones itself, of the rest one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}


_LETTERS = _letters()  # byte → code point
_BYTES = {code: byte for byte, code in _LETTERS.items()}


def _text_of(token: str, model: str) -> str | None:
    """The text of a token, or None for a part of a character."""
    if model == "llama":
        return token.replace("▁", " ")
    try:
        return token.translate(_BYTES).encode("latin-1").decode("utf-8")
    except UnicodeError:
        return None


def _needed_part(
    vocabulary: Vocabulary, texts: list[str], special: set[int], used: set[int]
) -> tuple[Vocabulary, list[int]]:
    """The tokens that tokenizing ``texts`` can touch, and their ids in the whole vocabulary.

    ``special``: types of tokens that are looked for in the raw text. Bytes and the unknown token
    are always among the result: any text can need them.
    """
    # Loading all of a large vocabulary for every candidate would take seconds each.
    raw = "\0".join(texts)
    written = _written(texts, vocabulary.model)
    keys = {
        written[start : start + length]
        for length in range(1, _LONGEST_KEY + 1)
        for start in range(len(written) - length + 1)
    }

    def occurs(token: str) -> bool:
        return token[:_LONGEST_KEY] in keys and (len(token) <= _LONGEST_KEY or token in written)

    ids = [
        index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if index in used
        or (kind == TokenType.NORMAL and occurs(token))
        or (kind in special and token in raw)
        or kind in (TokenType.UNKNOWN, TokenType.BYTE)
    ]
    part = replace(
        vocabulary,
        tokens=[vocabulary.tokens[index] for index in ids],
        types=[vocabulary.types[index] for index in ids],
        merges=[merge for merge in vocabulary.merges if occurs(merge.replace(" ", "", 1))],
        scores=[vocabulary.scores[index] for index in ids] if vocabulary.scores else [],
    )
    return part, ids


def _written(texts: list[str], model: str) -> str:
    """The texts in the letters of the vocabulary, with a character between that it lacks."""
    if model == "llama":
        return "\0".join("▁" + text.replace(" ", "▁") for text in texts)
    return "\0".join(text.encode().decode("latin-1").translate(_LETTERS) for text in texts)
