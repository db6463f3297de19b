"""tokenizer.json as GGUF metadata.

Two kinds can be written: byte-level BPE (GGUF's model ``gpt2``), and BPE with byte fallback on
``▁``-marked text, as converted from SentencePiece (model ``llama``). llama.cpp has its
pre-tokenizers compiled in and knows them by name; the name is decided here from the structure
and the regexes of tokenizer.json, and an unknown one is refused rather than guessed.

References: ``src/llama-vocab.cpp`` (what every name does), ``conversion/base.py`` (token types).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import read_json
from quantkit.errors import InputError
from quantkit.formats.gguf_llama import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORD}|\p{{N}}|{_REST}"
# Words that end in lower case, and words in upper case.
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CASED_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_LOWER}{_SUFFIX}?|{_UPPER}{_SUFFIX}?|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)

# GGUF's name: (the regexes that the text is split by, one after the other; ignore_merges)
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((_DIGIT, _GPT2), False),  # starcoder's, refact's and command-r's too
    "llama-bpe": ((_LLAMA3,), True),
    "smaug-bpe": ((_LLAMA3,), False),
    "qwen2": ((_QWEN2,), False),
    "tekken": ((_TEKKEN,), True),
    "gpt-4o": ((_GPT4O,), False),
    "deepseek-coder": (_DEEPSEEK_CODER, False),
}

_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # GGUF's spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


def metadata(directory: Path, vocab_size: int) -> Metadata:
    """Return the ``tokenizer.*`` keys for the checkpoint in ``directory``.

    ``vocab_size``: rows of the embedding; ids that the tokenizer lacks become unused tokens.
    Raises InputError when tokenizer.json is missing or of a kind that GGUF can't hold.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            "no such file: GGUF's vocabulary is made of it",
            where=str(path),
            mend="Save the fast tokenizer beside the weights: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIR).",
        )
    tokenizer = read_json(path)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(
            f"a {model.get('type')} tokenizer can't be written as GGUF (BPE can)", where=str(path)
        )
    try:
        kind = _sentencepiece(tokenizer) if model.get("byte_fallback") else _byte_level(tokenizer)
        tokens, types = _vocabulary(tokenizer, vocab_size)
    except InputError as error:
        raise InputError(error.what, where=str(path), mend=error.mend) from error
    values: Metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": types,
        **kind,
        **_special_ids(directory, tokens),
        **_added_tokens(directory),
    }
    if values["model"] == "llama":
        values["scores"] = _scores(tokens, types, _merges(model))
    template = _chat_template(directory)
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return result | ({"tokenizer.chat_template": template} if template else {})


def _byte_level(tokenizer: dict[str, Any]) -> Metadata:
    normalizer = tokenizer.get("normalizer")
    # llama.cpp normalizes nothing; NFC leaves text as it is usually written alone.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise InputError(f"normalizer {json.dumps(normalizer)} has no counterpart in llama.cpp")
    model = tokenizer["model"]
    steps = split_regexes(tokenizer.get("pre_tokenizer"))
    ignore = bool(model.get("ignore_merges"))
    name = next((name for name, what in PRE_TOKENIZERS.items() if what == (steps, ignore)), None)
    if name is None:
        raise InputError(
            "no pre-tokenizer of llama.cpp is known to split text by "
            f"{' then '.join(steps)} (ignore_merges: {ignore})",
            mend=f"Known: {', '.join(PRE_TOKENIZERS)}.",
        )
    # A space inside a merge's part is written as GPT-2's letter for it, as llama.cpp expects.
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(model)]
    return {"pre": name, "merges": merges}


def split_regexes(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the regexes that a byte-level pre-tokenizer splits text by, one after the other.

    Raises InputError for a step that isn't such a split, or when bytes are not mapped at all.
    """
    steps = [pre_tokenizer] if pre_tokenizer else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    regexes = []
    byte_level = False
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                regexes += [_GPT2] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                regexes.append(_DIGIT)
            # Regexes that match everything: keeping the matches or the gaps' ends is the same.
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
                regexes.append(regex)
            case {
                "type": "Split",
                "pattern": {"Regex": str(regex)},
                "behavior": "Removed",
                "invert": True,
            }:
                regexes.append(regex)
            case _:
                raise InputError(
                    f"pre-tokenizer step {json.dumps(step, ensure_ascii=False)} "
                    "has no counterpart in llama.cpp"
                )
    if not byte_level:
        raise InputError("a BPE tokenizer that is neither byte-level nor has byte_fallback")
    return tuple(regexes)


def _sentencepiece(tokenizer: dict[str, Any]) -> Metadata:
    """Keys of a tokenizer that marks spaces with ▁ and falls back to bytes."""
    steps = _flat(tokenizer.get("normalizer"), "normalizers")
    steps += _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prefix = False
    spaces = False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                spaces = True
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                spaces = True
                prefix = prefix or step.get("prepend_scheme", "always") != "never"
            case _:
                raise InputError(
                    f"step {json.dumps(step, ensure_ascii=False)} has no counterpart in "
                    "llama.cpp's SentencePiece tokenizer"
                )
    if not spaces:
        raise InputError("a tokenizer with byte_fallback that doesn't mark spaces with ▁")
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix}


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; tokenizers before 0.20 wrote them as one string."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _vocabulary(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return text and type of every id below ``size``."""
    model = tokenizer["model"]
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    by_id = {index: text for text, index in model["vocab"].items()}
    largest = max([*by_id, *added])
    if largest >= size:
        raise InputError(
            f"token id {largest} is outside the model's vocabulary of {size}",
            mend="Save the tokenizer that the model was trained with beside it.",
        )
    tokens = []
    types = []
    for index in range(size):
        if index in added:
            text = added[index]["content"]
            control = added[index]["special"] or re.fullmatch(r"<\|.*\|>|<｜.*｜>", text)
            kind = CONTROL if control else USER_DEFINED
            if text == model.get("unk_token"):
                kind = UNKNOWN
        elif index in by_id:
            text = by_id[index]
            is_byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
            kind = BYTE if is_byte else NORMAL
        else:
            text, kind = f"[PAD{index}]", UNUSED
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merges.

    SentencePiece's BPE joins the pair whose result scores highest; Hugging Face's conversion
    sorted the merges by just that, so a token's first place in the list gives the order back.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    return [
        -float(rank.get(text, len(merges))) if kind == NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _special_ids(directory: Path, tokens: list[str]) -> Metadata:
    """Ids of the special tokens: tokenizer_config.json names them, config.json numbers them.

    The further tokens that end a generation, by generation_config.json, go to the two keys that
    llama.cpp has for such, end of turn and end of message.
    """
    settings = _optional_json(directory / "tokenizer_config.json")
    config = _optional_json(directory / "config.json")
    index = {text: number for number, text in enumerate(tokens)}
    result: Metadata = {}
    for role, key in _SPECIAL.items():
        named = settings.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        numbers = [index[text]] if text in index else _numbers(config.get(f"{role}_token_id"))
        if numbers and 0 <= numbers[0] < len(tokens):
            result[key] = numbers[0]
    if "eos_token_id" not in result:
        raise InputError(
            "names no EOS token, and llama.cpp would take any ordinary one for it",
            where=str(directory / "tokenizer_config.json"),
        )
    ends = _numbers(_optional_json(directory / "generation_config.json").get("eos_token_id"))
    further = [number for number in ends if number != result["eos_token_id"]]
    return result | dict(zip(("eot_token_id", "eom_token_id"), further, strict=False))


def _numbers(value: object) -> list[int]:
    """A token id or a list of them, as a list; None is none."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int)]


def _added_tokens(directory: Path) -> Metadata:
    """Whether the tokenizer itself adds BOS and EOS, observed on a text rather than believed."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"transformers can't load it ({error})", where=str(directory)) from error
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in (([], []), (bos, []), ([], eos), (bos, eos)):
        if full == before + bare + after:
            return {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    raise InputError(
        f"the tokenizer turns ids {bare} into {full}; GGUF can only add BOS before, EOS after",
        where=str(directory / "tokenizer.json"),
    )


def _chat_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _optional_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # named templates: the default is the one used for chat
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
