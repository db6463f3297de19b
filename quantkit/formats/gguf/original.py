"""A checkpoint's tokenizer as transformers has it: vocabulary, chat templates, ends of generation.

What ``AutoTokenizer`` and ``GenerationConfig`` make of a directory's files is what counts: the same
tokenizer.json gives other ids under another ``tokenizer_class``, and special tokens are named in up
to four files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import openable
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.checkpoint.sidecars import check_sidecars, has_vocabulary
from quantkit.checkpoint.tokenizer_files import check_packages


@dataclass(frozen=True)
class Original:
    """A tokenizer: transformers' object, and its backend in tokenizer.json's words.

    ``path``: the file or directory to name in messages. ``templates``: of chats, by name;
    "default" is the one that chats have unless another is asked for. ``ends``: ids that end a
    generation, the tokenizer's EOS first.
    """

    path: Path
    tokenizer: Any
    data: dict[str, Any]
    templates: dict[str, str]
    ends: tuple[int, ...]


def read_original(directory: Path, vocab_size: int) -> Original:
    """Read the tokenizer of a checkpoint with ``vocab_size`` embeddings.

    Raises InputError where transformers can't, or where it has no backend of the tokenizers
    library.
    """
    if not has_vocabulary(directory):
        raise InputError(
            "has no tokenizer, and a GGUF file must hold one",
            subject=str(directory),
            fix="Save the tokenizer beside the weights: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(DIR).",
        )
    path = directory / "tokenizer.json"
    if not path.is_file():
        path = directory
    tokenizer = _load(directory)
    try:
        backend = tokenizer.backend_tokenizer
    except AttributeError as error:
        raise InputError(
            f"the tokenizer is {type(tokenizer).__name__}, which the tokenizers library doesn't "
            "have, and GGUF can't hold",
            where=str(path),
        ) from error
    backend.no_truncation()
    backend.no_padding()
    data = json.loads(backend.to_str())
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Original(
        path,
        tokenizer,
        _without_defaults(data, directory, vocab_size),
        _templates(tokenizer),
        tuple(dict.fromkeys([*eos, *end_tokens(directory, tokenizer)])),
    )


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_sidecars(directory)
    try:
        return AutoTokenizer.from_pretrained(
            openable(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a tokenizer's own code may raise anything
        check_packages(directory)
        if not (directory / "tokenizer.json").is_file():
            raise InputError(
                f"doesn't exist, and transformers can't make it of other files ({error})",
                subject=str(directory / "tokenizer.json"),
                fix="Save the fast tokenizer beside the weights: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(DIR).",
            ) from error
    _check_tokenizer_json(directory / "tokenizer.json")
    try:  # a class that transformers knows only with the model's own code
        return PreTrainedTokenizerFast.from_pretrained(openable(directory), local_files_only=True)
    except Exception as error:  # what is wrong in the files beside tokenizer.json shows in any way
        raise InputError(
            f"transformers can't load the tokenizer ({type(error).__name__}: {error})",
            where=str(directory),
            fix="Check tokenizer_config.json, special_tokens_map.json and the chat templates.",
        ) from error


def _check_tokenizer_json(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(openable(path)))
    except Exception as error:  # the library has no class of its own for this
        raise InputError(
            f"the tokenizers library can't read it ({error})", where=str(path)
        ) from error


def _without_defaults(data: dict[str, Any], directory: Path, vocab_size: int) -> dict[str, Any]:
    """Without the tokens that only transformers' class adds, and that have no embedding."""
    added = data.get("added_tokens") or []
    if all(token["id"] < vocab_size for token in added):
        return data
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    stored = "".join(
        (directory / name).read_text(encoding="utf-8-sig")
        for name in names
        if (directory / name).is_file()
    )
    kept = [
        token
        for token in added
        if token["id"] < vocab_size
        or any(json.dumps(token["content"], ensure_ascii=pure) in stored for pure in (True, False))
    ]
    return {**data, "added_tokens": kept}


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return {"default": template}
    return {name: text for name, text in (template or {}).items() if isinstance(text, str)}
