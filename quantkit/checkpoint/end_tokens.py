"""Which tokens end a generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.base.files import read_optional_json

_KEY = "eos_token_id"


def end_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end an answer of the model in ``directory``.

    They are those of transformers' ``GenerationConfig``, which is made of config.json where there
    is no generation_config.json; where it has none, the tokenizer's EOS. ``tokenizer``: that of
    ``AutoTokenizer``.
    """
    path = directory / "generation_config.json"
    config = read_optional_json(directory / "config.json")
    text = config.get("text_config")  # of a model that reads more than text
    own = _ids(config.get(_KEY)) or _ids(text.get(_KEY) if isinstance(text, dict) else None)
    listed = _ids(read_optional_json(path).get(_KEY)) if path.is_file() else own
    return listed or _ids(tokenizer.eos_token_id) or own


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(value for value in values if type(value) is int))
