"""The limits of models' inputs, beside what transformers can compute."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer, pack_rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.limits import Limits, check_length, fixed_positions
from quantkit.model.skeleton import Skeleton
from tests.helpers.tiny import Tiny

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "n_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gpt_bigcode": {},
    "biogpt": {},
    "ctrl": {"dff": 64},
    "mpt": {"max_seq_len": 40, "d_model": 64, "n_heads": 4, "n_layers": 2},
    "roberta": {"is_decoder": True},
    "bloom": {},
    "llama": {},
    "falcon": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_fixed_where_transformers_fails_beyond_them(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"):
        config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
        model = AutoModelForCausalLM.from_config(config).eval()
    fixed = fixed_positions(model)
    with torch.inference_mode():
        model(torch.full((1, fixed or 41), 5), use_cache=False)
        if fixed is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, fixed + 1), 5), use_cache=False)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
    ],
)
def test_a_stretched_rope_has_more_positions(
    tiny: Tiny, rope: dict[str, Any], positions: int
) -> None:
    directory = tiny("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    checkpoint = Checkpoint(directory)
    assert Limits.of(Skeleton(checkpoint), checkpoint) == Limits(96, positions)


def test_prompts_and_rows_must_fit() -> None:
    fixed, trained = Limits(96, 40, fixed=True), Limits(96, 40)
    assert fixed.too_long(8, 33) is None  # the last new token isn't read
    assert "34 tokens after a prompt of 8" in str(fixed.too_long(8, 34))
    assert trained.too_long(40, 1000) is None and Limits(96, None).too_long(10**6) is None
    for limits in (fixed, trained):
        assert "41 tokens, and the model 40" in str(limits.too_long(41))
        check_length(40, limits, "calibration")
        with pytest.raises(InputError, match="sequence_length 41 exceeds the model's 40"):
            check_length(41, limits, "calibration")


@pytest.mark.parametrize("line", ["The owl is white.", "<|user|>", "naïve 🦉"])
def test_a_token_that_the_model_lacks_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    tokenizer, text = load_tokenizer(demo_model()), tmp_path / "text.txt"
    text.write_text(line)
    largest = max(tokenizer.encode(line, add_special_tokens=False))
    sizes: dict[str, Any] = {"sequence_length": 1, "rows": None, "seed": None}
    if largest > tokenizer.eos_token_id:
        assert pack_rows(text, tokenizer, **sizes, limits=Limits(largest + 1, None)).count
    with pytest.raises(InputError, match=f"with the id .*only {largest} rows") as caught:
        pack_rows(text, tokenizer, **sizes, limits=Limits(largest, None))
    assert caught.value.where == str(text)


def test_the_text_separator_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a")
    tokenizer = SimpleNamespace(
        eos_token_id=50256,
        encode=lambda text, add_special_tokens: [1],
        convert_ids_to_tokens=lambda id: "<|endoftext|>",
    )
    with pytest.raises(InputError, match=r"<\|endoftext\|>"):
        pack_rows(
            tmp_path / "text.txt",
            tokenizer,
            sequence_length=1,
            rows=None,
            seed=None,
            limits=Limits(96, None),
        )
