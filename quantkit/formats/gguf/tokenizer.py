"""A checkpoint's tokenizer as GGUF metadata.

Two kinds can be written: byte-level BPE (GGUF's model ``gpt2``), and BPE with byte fallback on
``▁``-marked text, as converted from SentencePiece (model ``llama``, Gemma's too). Whether llama.cpp
then makes the same ids of text as transformers is tried: ``pretokenizer.py``.

References: ``src/llama-vocab.cpp`` (what every key does), ``conversion/base.py`` (token types).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_optional_json
from quantkit.base.names import listed
from quantkit.formats.gguf.architectures.architecture import Metadata
from quantkit.formats.gguf.cases import build_cases
from quantkit.formats.gguf.original import Original, read_original
from quantkit.formats.gguf.pretokenizer import (
    Proven,
    candidate_names,
    check_pretokenizer,
    find_pretokenizer,
)
from quantkit.formats.gguf.templates import template_metadata, template_notes
from quantkit.formats.gguf.vocabulary import (
    ENDS_BY_TEXT,
    TokenType,
    Vocabulary,
    can_tokenize,
    ends_generation,
    loaded,
)

# Special tokens that some tokenizers add without marking them as special.
_LOOKS_SPECIAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>", re.DOTALL
)
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# All ids that end a generation, where they are more than llama.cpp has keys for. It ignores this.
END_IDS = "quantkit.end_token_ids"
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # GGUF's spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


@dataclass(frozen=True)
class TokenizerPlan:
    """What a file has of a tokenizer.

    ``metadata``: the ``tokenizer.*`` keys, and ``general.name``, by which llama.cpp reads special
    tokens; ``notes``: sentences on what llama.cpp does otherwise than transformers.
    """

    metadata: Metadata
    notes: tuple[str, ...]


def plan_tokenizer(
    directory: Path, vocab_size: int, name: str = "model", pre_tokenizer: str | None = None
) -> TokenizerPlan:
    """Plan the metadata for the tokenizer of the checkpoint in ``directory``.

    ``vocab_size``: rows of the embedding; ids that the tokenizer lacks become unused tokens.
    ``name``: the model's. ``pre_tokenizer``: llama.cpp's name of one that is used without a proof;
    otherwise one is looked for that makes the same ids of text as transformers.

    Raises InputError for a tokenizer of a kind that GGUF can't hold, or that llama.cpp doesn't
    agree with; MachineError when that can't be tried for want of llama.cpp's library.
    """
    original = read_original(directory, vocab_size)
    try:
        vocabulary = replace(_vocabulary(original.data, vocab_size), name=name)
        proven = _proven(vocabulary, original, pre_tokenizer)
    except InputError as error:
        where = error.where or str(original.path)
        raise InputError(error.what, where=where, fix=error.fix) from error
    special = _special_ids(directory, original, vocabulary.tokens)
    values = {
        **proven.vocabulary.metadata(),
        **special,
        **_added_tokens(original, special),
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    notes = (
        *proven.notes,
        *_unheld_ends(proven.vocabulary, special, original.ends),
        *template_notes(original.templates),
    )
    metadata |= {"general.name": proven.vocabulary.name}
    if len(original.ends) > len(_ENDS):
        metadata[END_IDS] = [n for n in original.ends if 0 <= n < len(vocabulary.tokens)]
    return TokenizerPlan(metadata | template_metadata(original.templates), notes)


def _proven(vocabulary: Vocabulary, original: Original, pre_tokenizer: str | None) -> Proven:
    added = original.data.get("added_tokens") or []
    strips = any(token.get("rstrip") or token.get("lstrip") for token in added)
    if vocabulary.model == "gpt2" and pre_tokenizer is not None:
        check_pretokenizer(pre_tokenizer)
        name = candidate_names(vocabulary, strips)[0]
        return Proven(replace(vocabulary, pre=pre_tokenizer, name=name))
    if pre_tokenizer not in (None, "default"):
        raise InputError(f"SentencePiece has one pre-tokenizer, default, not {pre_tokenizer}")
    cases = build_cases(vocabulary, original.tokenizer, original.templates, added)
    return find_pretokenizer(
        vocabulary,
        cases,
        drops_space=strips,
        strict=pre_tokenizer is None,
    )


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; tokenizers before 0.20 wrote them as one string."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _vocabulary(data: dict[str, Any], size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json, its pre-tokenizer still to be found."""
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(f"a {model.get('type')} tokenizer can't be written as GGUF (BPE can)")
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(data, size, sentencepiece)
    merges = _merges(model)
    if sentencepiece:
        return Vocabulary("llama", tokens, types, [], _scores(tokens, types, merges))
    # A space joins the parts of a merge, so one inside a part is written as GPT-2's letter for it.
    joined = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
    return Vocabulary("gpt2", tokens, types, joined, [], bool(model.get("ignore_merges")))


def _tokens(data: dict[str, Any], size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id below ``size``; ids that the tokenizer lacks are unused."""
    model = data["model"]
    added = {token["id"]: token for token in data.get("added_tokens") or []}
    by_id = {index: text for text, index in model["vocab"].items()}
    largest = max([*by_id, *added])
    if largest >= size:
        raise InputError(
            f"token id {largest} is outside the model's vocabulary of {size}",
            fix="Save the tokenizer that the model was trained with beside it.",
        )
    tokens: list[str] = []
    types: list[int] = []
    for index in range(size):
        if index in added:
            text = added[index]["content"]
            control = added[index]["special"] or _LOOKS_SPECIAL.fullmatch(text)
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            if sentencepiece and text == model.get("unk_token"):
                kind = TokenType.UNKNOWN
            elif sentencepiece and kind == TokenType.USER_DEFINED:
                text = text.replace("▁", " ")  # llama.cpp looks for these in the raw text
        elif index in by_id:
            text = by_id[index]
            is_byte = sentencepiece and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
            kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        else:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
        tokens.append(text)
        types.append(kind)
    _check_tokens(tokens, types, sentencepiece)
    return tokens, types


def _check_tokens(tokens: list[str], types: list[int], sentencepiece: bool) -> None:
    """Raise InputError for what would make llama.cpp abort."""
    if len(set(tokens)) < len(tokens):
        twice = next(text for index, text in enumerate(tokens) if text in tokens[:index])
        raise InputError(f"{twice!r} is the text of two ids, which llama.cpp doesn't load")
    if sentencepiece and types.count(TokenType.BYTE) != 256:
        raise InputError(f"the tokenizer has {types.count(TokenType.BYTE)} of the 256 byte tokens")


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merges."""
    # SentencePiece's BPE joins the pair whose result scores highest. Hugging Face's conversion
    # sorted the merges by these scores, so a token's first place in the list gives the order back.
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    return [
        -float(rank.get(text, len(merges))) if kind == TokenType.NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _special_ids(directory: Path, original: Original, tokens: list[str]) -> Metadata:
    """Ids of the special tokens: the tokenizer's, else config.json's.

    Further tokens that end a generation go to llama.cpp's keys for end of turn and end of message,
    first those that it doesn't know by their text. Raises InputError for a tokenizer without EOS.
    """
    config = read_optional_json(directory / "config.json")
    result: Metadata = {}
    for role, key in _SPECIAL.items():
        own = getattr(original.tokenizer, f"{role}_token_id", None)
        configured = config.get(f"{role}_token_id")
        for number in (own, *(configured if isinstance(configured, list) else [configured])):
            if type(number) is int and 0 <= number < len(tokens):
                result.setdefault(key, number)
    ends = [number for number in original.ends if 0 <= number < len(tokens)]
    if not ends:
        raise InputError(
            "names no EOS token, and llama.cpp would use an ordinary token as such",
            subject=str(directory / "tokenizer_config.json"),
        )
    result["eos_token_id"] = ends[0]
    further = sorted(ends[1:], key=lambda number: tokens[number] in ENDS_BY_TEXT)
    return result | dict(zip(_ENDS[1:], further, strict=False))


def _unheld_ends(
    vocabulary: Vocabulary, special: Mapping[str, int], ends: Iterable[int]
) -> list[str]:
    """A note on the tokens at which llama.cpp won't end a generation, if there are any."""
    size = len(vocabulary.tokens)
    ends = [number for number in ends if 0 <= number < size]
    held = {special.get(name) for name in _ENDS}
    unheld = [number for number in ends if number not in held]
    if not unheld:
        return []
    if can_tokenize():
        ids = [
            index
            for index, kind in enumerate(vocabulary.types)
            if index in ends or kind not in (TokenType.NORMAL, TokenType.UNUSED)
        ]
        place = {index: number for number, index in enumerate(ids)}
        part = vocabulary.part(ids, vocabulary.merges[:1])
        moved = {key: place[index] for key, index in special.items() if index in place}
        with loaded(part, moved) as handle:
            if handle is not None:
                unheld = [n for n in unheld if not ends_generation(handle, place[n])]
    if not unheld:
        return []
    texts = listed(repr(vocabulary.tokens[number]) for number in unheld)
    return [
        f"llama.cpp doesn't end a generation at {texts}, as transformers does: GGUF has keys for "
        "three such tokens. `quantkit export` gives the others to Ollama as stop texts; do so in "
        "other programs."
    ]


def _added_tokens(original: Original, special: Metadata) -> Metadata:
    """Whether BOS and EOS are added to a text. Raises InputError for any other addition."""
    bare, full = (
        list(original.tokenizer("a", add_special_tokens=added)["input_ids"])
        for added in (False, True)
    )
    bos, eos = [special.get("bos_token_id")], [special["eos_token_id"]]
    for before, after in (([], []), (bos, []), ([], eos), (bos, eos)):
        if full == before + bare + after:
            return {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    raise InputError(
        f"the tokenizer turns ids {bare} into {full}; GGUF can only add BOS before, EOS after",
        where=str(original.path),
    )
