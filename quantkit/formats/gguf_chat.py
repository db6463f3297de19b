"""What a GGUF file says of chatting: its template, special tokens and context length.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.formats.gguf_file import open_gguf, value_of

_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class ChatMetadata:
    """template: Jinja source, None for a model that has none; tokens: the special ones, by the
    names that templates use; ends: texts of the tokens that end an answer; adds_bos: whether the
    engine puts BOS before a prompt by itself; context: tokens that the model was trained on."""

    template: str | None
    tokens: dict[str, str]
    ends: tuple[str, ...]
    adds_bos: bool
    context: int | None


def read_chat(path: Path) -> ChatMetadata:
    """Read a file's chat metadata. Raises InputError for a file that isn't GGUF."""
    reader = open_gguf(path)
    vocabulary = reader.get_field("tokenizer.ggml.tokens")

    def token(name: str) -> str | None:
        number = value_of(reader, f"tokenizer.ggml.{name}_token_id")
        return None if number is None or vocabulary is None else str(vocabulary.contents(number))

    named = {f"{name}_token": token(key) for name, key in _NAMED.items()}
    adds_bos = value_of(reader, "tokenizer.ggml.add_bos_token")
    if adds_bos is None:  # llama.cpp's defaults
        adds_bos = value_of(reader, "tokenizer.ggml.model") == "llama"
    architecture = value_of(reader, "general.architecture")
    return ChatMetadata(
        template=value_of(reader, "tokenizer.chat_template"),
        tokens={name: text for name, text in named.items() if text is not None},
        ends=tuple(dict.fromkeys(text for text in map(token, _ENDS) if text is not None)),
        adds_bos=bool(adds_bos),
        context=value_of(reader, f"{architecture}.context_length"),
    )
