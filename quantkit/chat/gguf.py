"""A GGUF file's chat template, special tokens and context length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.rope import LONG
from quantkit.formats.gguf.templates import templates_of
from quantkit.formats.gguf.tokenizer import END_IDS

_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class ChatMetadata:
    """What a file says about chats.

    template: Jinja source, None for a model that has none; others: names of further templates;
    tokens: the special ones, by the names that templates use; ends: texts of the tokens that end an
    answer; adds_bos: whether the engine puts BOS before a prompt by itself; context: tokens that
    the model was trained on; short_context: tokens up to which a model with longrope uses the short
    factors, which llama.cpp decides by its context.
    """

    template: str | None
    others: tuple[str, ...]
    tokens: dict[str, str]
    ends: tuple[str, ...]
    adds_bos: bool
    context: int | None
    short_context: int | None


def read_chat(path: Path) -> ChatMetadata:
    """Read a file's chat metadata. Raises InputError for a file that isn't GGUF."""
    header = read_header(path)
    values = header.metadata
    architecture = values.get("general.architecture")
    has_longrope = any(tensor.name == LONG for tensor in header.tensors)
    vocabulary = values.get("tokenizer.ggml.tokens", [])

    def text(number: int | None) -> str | None:
        return vocabulary[number] if number is not None and number < len(vocabulary) else None

    def token(name: str) -> str | None:
        return text(values.get(f"tokenizer.ggml.{name}_token_id"))

    ends = [*map(token, _ENDS), *map(text, values.get(END_IDS, []))]
    named = {f"{name}_token": token(key) for name, key in _NAMED.items()}
    adds_bos = values.get("tokenizer.ggml.add_bos_token")
    if adds_bos is None:  # llama.cpp's default
        adds_bos = values.get("tokenizer.ggml.model") == "llama"
    return ChatMetadata(
        template=values.get("tokenizer.chat_template"),
        others=tuple(name for name in templates_of(values) if name != "default"),
        tokens={name: text for name, text in named.items() if text is not None},
        ends=tuple(dict.fromkeys(end for end in ends if end is not None)),
        adds_bos=bool(adds_bos),
        context=values.get(f"{architecture}.context_length"),
        short_context=values.get(f"{architecture}.rope.scaling.original_context_length")
        if has_longrope
        else None,
    )
