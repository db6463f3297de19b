"""Which tokens end an answer: transformers' GenerationConfig and AutoTokenizer are the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.base.resources import demo_model
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.formats.gguf.original import read_original

CASES: list[tuple[Any, Any]] = [
    ([4, 0], None),  # in config.json alone
    (4, [0, 4]),
    (7, [9, 8, 4, 2]),
    ([5, 6, 7, 8], 9),
    (3, None),
    ([4], [4]),
]


@pytest.mark.parametrize(("config", "generation"), CASES)
def test_ends_are_those_of_transformers(tmp_path: Path, config: Any, generation: Any) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(demo_model(), directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": config}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    oracle = AutoModelForCausalLM.from_pretrained(directory).generation_config.eos_token_id
    ends = end_tokens(directory, tokenizer)
    assert ends == (oracle if isinstance(oracle, list) else [oracle])
    in_gguf = read_original(directory, 1024).ends
    assert list(in_gguf) == list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def test_where_no_config_names_any_it_is_the_tokenizers(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(demo_model(), directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    (directory / "generation_config.json").write_text("{}")
    assert end_tokens(directory, tokenizer) == [tokenizer.eos_token_id]
    (directory / "generation_config.json").unlink()
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": None}))
    assert end_tokens(directory, tokenizer) == [tokenizer.eos_token_id]
    path.write_text(
        json.dumps({**config, "eos_token_id": None, "text_config": {"eos_token_id": 6}})
    )
    assert end_tokens(directory, tokenizer) == [6]
