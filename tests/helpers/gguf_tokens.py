"""Tiny checkpoints whose tokenizers have special tokens of many kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.gguf_tiny import checkpoint

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def added(content: str, **flags: bool) -> dict[str, Any]:
    """An added token as tokenizer.json has it, without its id."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": True, **usual, **flags}


def with_tokens(
    directory: Path,
    *,
    split: str | None = None,
    tokens: list[dict[str, Any]] | None = None,
    template: str | list[dict[str, str]] | None = None,
    settings: dict[str, Any] | None = None,
    parts: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A tiny checkpoint with further special tokens, whose ids follow the vocabulary's.

    ``settings``: of tokenizer_config.json, None removes one; ``parts``: of tokenizer.json.
    """
    checkpoint(directory, split=split, num_hidden_layers=1, **config)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text()) | (parts or {})
    first = max(data["model"]["vocab"].values()) + 1
    data["added_tokens"] += [
        {"id": first + index, **token} for index, token in enumerate(tokens or [])
    ]
    path.write_text(json.dumps(data), encoding="utf-8")
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"chat_template": template} | (settings or {})
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return directory
