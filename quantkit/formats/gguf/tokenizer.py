"""tokenizer.json as GGUF metadata.

Two kinds can be written: byte-level BPE (GGUF's model ``gpt2``), and BPE with byte fallback on
``▁``-marked text, as converted from SentencePiece (model ``llama``, Gemma's too). Whether llama.cpp
then makes the same ids of text is tried: ``pretokenizer.py``.

References: ``src/llama-vocab.cpp`` (what every key does), ``conversion/base.py`` (token types).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_optional_json
from quantkit.formats.gguf.architectures.architecture import Metadata
from quantkit.formats.gguf.pretokenizer import check_pretokenizer, find_pretokenizer
from quantkit.formats.gguf.vocabulary import TokenType, Vocabulary

# Special tokens that some tokenizers add without marking them as special.
_LOOKS_SPECIAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>", re.DOTALL
)
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # GGUF's spelling
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


def tokenizer_metadata(
    directory: Path, vocab_size: int, pre_tokenizer: str | None = None
) -> Metadata:
    """Return the ``tokenizer.*`` keys for the checkpoint in ``directory``.

    ``vocab_size``: rows of the embedding; ids that the tokenizer lacks become unused tokens.
    ``pre_tokenizer``: llama.cpp's name of one that is used without a proof; otherwise one is
    looked for that makes the same ids of text. transformers is needed only where there is no
    tokenizer.json.

    Raises InputError for a tokenizer of a kind that GGUF can't hold, or that llama.cpp doesn't
    agree with; MachineError when that can't be tried for want of llama.cpp's library.
    """
    path, text = _tokenizer_json(directory)
    try:
        tokenizer = _tokenizer(text)
        vocabulary = _vocabulary(json.loads(text), vocab_size)
        if vocabulary.model == "gpt2" and pre_tokenizer is not None:
            check_pretokenizer(pre_tokenizer)
            vocabulary = replace(vocabulary, pre=pre_tokenizer)
        elif pre_tokenizer in (None, "default"):
            cut_at = (TokenType.CONTROL, TokenType.USER_DEFINED)
            strict = pre_tokenizer is None
            vocabulary = find_pretokenizer(vocabulary, tokenizer, cut_at, strict=strict)
        else:
            raise InputError(f"SentencePiece has one pre-tokenizer, default, not {pre_tokenizer}")
    except InputError as error:
        raise InputError(error.what, where=error.where or str(path), fix=error.fix) from error
    settings = read_optional_json(directory / "tokenizer_config.json")
    special = _special_ids(directory, settings, vocabulary.tokens)
    values = {
        **vocabulary.metadata(),
        **special,
        **_added_tokens(settings, tokenizer, special, path),
    }
    template = chat_template(directory)
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return result | ({"tokenizer.chat_template": template} if template else {})


def _tokenizer_json(directory: Path) -> tuple[Path, str]:
    """The text of tokenizer.json and its path, or what transformers makes of older files."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return path, path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return directory, tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise InputError(
            f"doesn't exist, and transformers can't make it of other files ({error})",
            subject=str(path),
            fix="Save the fast tokenizer beside the weights: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIR).",
        ) from error


def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library has no class of its own for this
        raise InputError(f"the tokenizers library can't read it ({error})") from error


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


def _special_ids(directory: Path, settings: dict[str, Any], tokens: list[str]) -> Metadata:
    """Ids of the special tokens: by name in tokenizer_config.json, else by id in config.json.

    Further tokens that end a generation, by generation_config.json, go to llama.cpp's keys for end
    of turn and end of message. Raises InputError for a tokenizer without EOS.
    """
    config = read_optional_json(directory / "config.json")
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
            "names no EOS token, and llama.cpp would use an ordinary token as such",
            subject=str(directory / "tokenizer_config.json"),
        )
    ends = _numbers(read_optional_json(directory / "generation_config.json").get("eos_token_id"))
    further = [number for number in ends if number != result["eos_token_id"]]
    return result | dict(zip(("eot_token_id", "eom_token_id"), further, strict=False))


def _numbers(value: object) -> list[int]:
    """A token id, a list of them, or None, as a list."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int)]


def _added_tokens(
    settings: dict[str, Any], tokenizer: Any, special: Metadata, path: Path
) -> Metadata:
    """Whether BOS and EOS are added to a text. Raises InputError for any other addition."""
    # In transformers tokenizer_config.json decides, where it has these settings. Without them, what
    # tokenizer.json adds to a text shows it.
    names = ("add_bos_token", "add_eos_token")
    if any(settings.get(name) is not None for name in names):
        return {name: bool(settings.get(name)) for name in names}
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    bos, eos = [special.get("bos_token_id")], [special["eos_token_id"]]
    for before, after in (([], []), (bos, []), ([], eos), (bos, eos)):
        if full == before + bare + after:
            return {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    raise InputError(
        f"the tokenizer turns ids {bare} into {full}; GGUF can only add BOS before, EOS after",
        where=str(path),
    )


def chat_template(directory: Path) -> str | None:
    """The template that a checkpoint's directory has for chats, or None."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_optional_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # named templates: the default is the one used for chat
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
