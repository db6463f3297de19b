"""Tiny checkpoints with a tokenizer, so that they can be calibrated and judged on text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

TEXT = "Some words, of which there are enough for two rows, are what experts are measured on.\n"


def copied(source: Path, target: Path) -> Path:
    """A checkpoint of one's own, with a tokenizer that has a token for each letter."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer(
        WordLevel({letter: id for id, letter in enumerate(sorted(set(TEXT)))}, " ")
    )
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return target
