"""Adapters that change nothing, as those saved wrongly under FSDP, or a part of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.adapters import (
    adapted,
    assert_equal_to,
    base_of,
    configure,
    load,
    merged_by_peft,
    rewrite,
    train,
)
from tests.helpers.cli import refused
from tests.helpers.tiny import Tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def untrained(directory: Path, *, only: str = "") -> Path:
    """Every B of a saved adapter, or those whose key has ``only`` in it, as before training."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if ("lora_B" in key or "lora_embedding_A" in key) and only in key:
            tensors[key].zero_()
    save_file(tensors, path)
    return directory


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    ],
    ids=["plain", "embedding", "conv1d", "bias-beside-b"],
)
def test_an_adapter_whose_factors_are_zero_is_refused(
    tiny: Tiny, tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    base = base_of(tiny, model_type)
    directory = untrained(train(base, tmp_path / "a", config))
    oracle = merged_by_peft(load(base), directory)
    assert all(
        torch.equal(tensor, oracle[name]) for name, tensor in load(base).state_dict().items()
    )
    out = tmp_path / "out"
    for command in (
        ["merge", base, directory, "--out", out],
        ["quantize", "nf4", "--model", base, "--adapter", directory, "--out", out],
    ):
        message = refused(2, *command)
        assert "changes nothing: A or B is zero in all of its" in message
        assert not out.exists()


def test_untrained_magnitudes_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama")
    config = {"target_modules": ["q_proj", "lm_head"], "use_dora": True}
    directory = untrained(train(base, tmp_path / "a", config))
    assert adapted(base, directory).warnings  # the magnitudes alone were trained
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if key.endswith("lora_magnitude_vector"):
            name = key.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")
            tensors[key] = load(base).state_dict()[name].norm(dim=1).bfloat16()
    save_file(tensors, path)
    assert "changes nothing" in refused(2, "merge", base, directory, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora_alpha": 0}, "its lora_alpha is 0"),
        ("saved", "what it replaces is what the base has"),
    ],
    ids=["alpha", "saved"],
)
def test_other_ways_to_change_nothing(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any] | str, why: str
) -> None:
    base = base_of(tiny, "llama")
    saved = ["norm"] if change == "saved" else None
    config = {"target_modules": ["q_proj"], "modules_to_save": saved}
    directory = train(base, tmp_path / "a", config)
    if isinstance(change, dict):
        configure(directory, **change)
    else:
        rewrite(directory, drop=lambda key: "lora_" in key)
        configure(directory, target_modules=None)
        path = directory / "adapter_model.safetensors"
        own = load(base).state_dict()
        save_file(
            {key: own[key.removeprefix("base_model.model.")] for key in load_file(path)}, path
        )
    message = refused(2, "merge", base, directory, "--out", tmp_path / "out")
    assert f"changes nothing: {why}" in message


@pytest.mark.parametrize("only", ["layers.1.", "v_proj"])
def test_factors_that_add_nothing_are_said(tiny: Tiny, tmp_path: Path, only: str) -> None:
    base = base_of(tiny, "llama")
    directory = train(base, tmp_path / "a", {"target_modules": ["q_proj", "v_proj"]})
    untrained(directory, only=only)
    result = adapted(base, directory)
    [warning] = result.warnings
    assert f"adds nothing to {2 if '.' in only else 3} of the 6 weights" in warning
    assert_equal_to(merged_by_peft(load(base), directory), result)


def test_a_weight_of_zero_is_said(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama")
    directory = train(base, tmp_path / "a", {"target_modules": ["q_proj", "v_proj"]})
    result = adapted(base, (directory, 0.0))
    assert result.warnings == ["a adds nothing: its weight is 0"]
    assert_equal_to(load(base).state_dict(), result)
