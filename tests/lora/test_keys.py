"""Adapters whose keys are spelt otherwise than PEFT spells them today: PEFT is the oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from tests.helpers.adapters import (
    OPTIONS,
    adapted,
    assert_equal_to,
    base_of,
    configure,
    load,
    merged_by_peft,
    rewrite,
    train,
)
from tests.helpers.tiny import COMMON, Tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_PART = re.compile(r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\b")
_HEAD = "base_model.model."


def named(name: str) -> Callable[[str], str]:
    return lambda key: _PART.sub(rf"\1.{name}", key)


@pytest.mark.parametrize("option", ["plain", "embeddings", "dora", "lora-bias", "conv1d-head"])
@pytest.mark.parametrize("name", ["default", "sql"])
def test_an_adapters_name_in_its_keys_changes_nothing(
    tiny: Tiny, tmp_path: Path, option: str, name: str
) -> None:
    model_type, config = OPTIONS[option]
    base = base_of(tiny, model_type)
    directory = train(base, tmp_path / "a", config)
    untie = adapted(base, directory).untied
    oracle = merged_by_peft(load(base, untie=untie), directory)
    rewrite(directory, rename=named(name))
    result = adapted(base, directory)
    assert_equal_to(oracle, result)
    # PEFT looks for the name "default", and inserts it where there is none.
    assert bool(result.warnings) == (name != "default")
    if name == "default" and option not in ("lora-bias", "dora"):
        assert_equal_to(merged_by_peft(load(base, untie=untie), directory), result)


def test_whole_modules_under_an_adapters_name_are_found(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama")
    directory = train(base, tmp_path / "a", OPTIONS["saved"][1])
    oracle = merged_by_peft(load(base), directory)
    saved = re.compile(r"(lm_head|embed_tokens|norm)(?=\.weight)")

    def rename(key: str) -> str:
        return named("default")(saved.sub(r"\1.modules_to_save.default", key))

    rewrite(directory, rename=rename)
    assert_equal_to(oracle, adapted(base, directory))


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace(_HEAD, f"{_HEAD}_orig_mod."),
        lambda key: f"module.{key}",
        lambda key: key.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
        lambda key: key.removeprefix(_HEAD),
        lambda key: key.replace(f"{_HEAD}model.", _HEAD),
        lambda key: _HEAD + key,
    ],
    ids=["compiled", "compiled-inside", "ddp", "fsdp", "bare", "headless", "twice"],
)
def test_keys_that_peft_leaves_out_are_merged_and_said(
    tiny: Tiny, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    base = base_of(tiny, "llama")
    directory = train(base, tmp_path / "a", OPTIONS["plain"][1])
    oracle = merged_by_peft(load(base), directory)
    rewrite(directory, rename=rename)
    keys = set(load_file(directory / "adapter_model.safetensors"))
    ignored = merged_by_peft(load(base), directory)
    left_out = sum(not torch.equal(ignored[name], oracle[name]) for name in oracle)
    result = adapted(base, directory)
    assert_equal_to(oracle, result)
    [warning] = result.warnings
    assert f"{2 * left_out} of {len(keys)} tensors under keys that aren't PEFT's" in warning
    with pytest.raises(InputError, match="aren't PEFT's"):
        adapted(base, directory, strict=True)


TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16}


@pytest.fixture
def multimodal(tiny: Tiny) -> Path:
    text = COMMON | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    vision = TOWER | {"num_attention_heads": 2, "patch_size": 8}
    return tiny("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*language_model.*(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "k_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "rank_pattern": {"layers.1.self_attn.v_proj": 2}},
    ],
    ids=["expression", "names", "pattern"],
)
def test_the_older_naming_of_multimodal_models_is_followed(
    multimodal: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    directory = train(multimodal, tmp_path / "a", config)
    old, new = "base_model.model.language_model.model.", "base_model.model.model.language_model."
    rewrite(directory, rename=lambda key: key.replace(new, old))
    assert any(key.startswith(old) for key in load_file(directory / "adapter_model.safetensors"))
    result = adapted(multimodal, directory)
    assert_equal_to(merged_by_peft(load(multimodal), directory), result)
    assert not result.warnings


def test_a_scale_by_an_older_name_is_refused(multimodal: Path, tmp_path: Path) -> None:
    directory = train(multimodal, tmp_path / "a", {"target_modules": ".*language_model.*q_proj"})
    old, new = "base_model.model.language_model.model.", "base_model.model.model.language_model."
    rewrite(directory, rename=lambda key: key.replace(new, old))
    configure(directory, alpha_pattern={"language_model.model.layers.0.self_attn.q_proj": 32})
    with pytest.raises(InputError, match="another rank or alpha"):
        adapted(multimodal, directory)


@pytest.mark.parametrize("rank", [4, 16])
def test_a_missing_alpha_is_pefts_own(tiny: Tiny, tmp_path: Path, rank: int) -> None:
    base = base_of(tiny, "llama")
    config = {"target_modules": ["q_proj", "down_proj"], "r": rank, "lora_alpha": 64}
    directory = train(base, tmp_path / "a", config)
    path = directory / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["lora_alpha"]
    path.write_text(json.dumps(values))
    result = adapted(base, directory)
    assert_equal_to(merged_by_peft(load(base), directory), result)
    assert ["lora_alpha" in warning for warning in result.warnings] == [True]


def test_several_adapters_in_one_file_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = train(base_of(tiny, "llama"), tmp_path / "a", OPTIONS["plain"][1])
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    both = {named(name)(key): t.clone() for name in "ab" for key, t in tensors.items()}
    save_file(both, path)
    with pytest.raises(InputError, match="several adapters: a, b"):
        adapted(base_of(tiny, "llama"), directory)


@pytest.mark.parametrize("other", ["_orig_mod.", "module."])
def test_two_tensors_for_one_factor_are_refused(tiny: Tiny, tmp_path: Path, other: str) -> None:
    directory = train(base_of(tiny, "llama"), tmp_path / "a", OPTIONS["plain"][1])
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file(tensors | {other + key: tensors[key] + 1}, path)
    with pytest.raises(InputError, match="holds both"):
        adapted(base_of(tiny, "llama"), directory)
