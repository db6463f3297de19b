"""LoRA adapters read as PEFT merges them: PEFT on a float32 base is the oracle."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.lora.adapter import Adapter
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
    units_apart,
)
from tests.helpers.tiny import Tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    """A plain adapter of the tiny llama, to be spoilt."""
    return train(base_of(tiny, "llama"), tmp_path / "adapter", OPTIONS["plain"][1])


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reads_as_peft_merges_it(tiny: Tiny, tmp_path: Path, option: str) -> None:
    model_type, config = OPTIONS[option]
    base = base_of(tiny, model_type)
    directory = train(base, tmp_path / "adapter", config)
    result = adapted(base, directory)
    untie = result.untied
    oracle = merged_by_peft(load(base, untie=untie), directory)
    assert_equal_to(oracle, result)
    assert result.changed and not result.warnings
    cast = adapted(base, directory, dtype=torch.bfloat16)
    for name, expected in oracle.items():
        tensor = cast.read(cast.key(name))
        assert tensor.dtype == torch.bfloat16
        assert units_apart(tensor, expected.to(torch.bfloat16)) <= 1, name


def test_a_bfloat16_base_is_cast_once(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama", torch.bfloat16)
    directory = train(base, tmp_path / "adapter", OPTIONS["dora"][1])
    result = adapted(base, directory)
    for name, expected in merged_by_peft(load(base), directory).items():
        actual = result.read(name)
        assert actual.dtype == torch.bfloat16
        assert units_apart(actual, expected.to(torch.bfloat16)) <= 1, name


def test_slices_of_rows_make_no_difference(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tiny, "gpt2")
    directory = train(base, tmp_path / "adapter", OPTIONS["conv1d-dora"][1])
    whole = adapted(base, directory)
    expected = {key: whole.read(key) for key in whole.changed}
    monkeypatch.setattr("quantkit.lora.changes.SLICE", 1000)
    for key, tensor in expected.items():
        torch.testing.assert_close(whole.read(key), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_several_adapters_combine_as_in_peft(tiny: Tiny, tmp_path: Path, rslora: bool) -> None:
    base = base_of(tiny, "llama")
    config = {"use_rslora": rslora, "lora_alpha": 6}
    paths = [
        train(base, tmp_path / "a", {**config, "target_modules": ["q_proj", "v_proj"]}),
        train(base, tmp_path / "b", {**config, "target_modules": ["q_proj", "o_proj"]}, seed=2),
    ]
    weights = [0.7, -0.3]
    model = PeftModel.from_pretrained(load(base), paths[0], adapter_name="a")
    model.load_adapter(paths[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "both", combination_type="linear")
    model.set_adapter("both")
    oracle = model.merge_and_unload().state_dict()
    result = adapted(base, *zip(paths, weights, strict=True))
    assert_equal_to(oracle, result)
    assert bool(result.warnings) == rslora


def test_a_weight_scales_what_one_adapter_adds(tiny: Tiny, tmp_path: Path, adapter: Path) -> None:
    base = Checkpoint(base_of(tiny, "llama"))
    key = "model.layers.0.self_attn.q_proj.weight"
    whole, half = adapted(base.directory, adapter), adapted(base.directory, (adapter, 0.5))
    delta = whole.read(key) - base.read(key)
    torch.testing.assert_close(half.read(key) - base.read(key), delta / 2, rtol=1e-4, atol=1e-6)


# Tied embeddings


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4]}},
    ],
    ids=["head", "input", "input-factors", "both", "head-tokens"],
)
def test_tied_embeddings_come_apart_where_they_differ(
    tiny: Tiny, tmp_path: Path, config: dict[str, Any]
) -> None:
    base = base_of(tiny, "llama", tie_word_embeddings=True)
    directory = train(base, tmp_path / "adapter", config)
    result = adapted(base, directory)
    assert result.untied and result.config["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(result.keys())
    assert_equal_to(merged_by_peft(load(base, untie=True), directory), result)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
    ids=["untouched", "tokens", "factors", "saved"],
)
def test_tied_embeddings_stay_tied_where_they_dont(
    tiny: Tiny, tmp_path: Path, config: dict[str, Any]
) -> None:
    base = base_of(tiny, "llama", tie_word_embeddings=True)
    directory = train(base, tmp_path / "adapter", config)
    result = adapted(base, directory)
    assert not result.untied and result.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in set(result.keys())
    assert not result.warnings
    # PEFT's own merge adds tied factors twice, so here the adapter at run time is the oracle.
    ids = torch.arange(96)[None] % 64
    expected = PeftModel.from_pretrained(load(base), directory)(input_ids=ids).logits
    model = load(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(result.read(result.key(name)))
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


# Resized vocabularies


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("config", "apart"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [97, 98]}, False),
    ],
    ids=["saved", "factors", "resized-only", "tokens"],
)
def test_a_resized_vocabulary_is_followed(
    tiny: Tiny, tmp_path: Path, config: dict[str, Any], apart: bool, tied: bool
) -> None:
    base = base_of(tiny, "llama", tie_word_embeddings=tied)
    directory = train(base, tmp_path / "adapter", config, vocabulary=99)
    result = adapted(base, directory)
    assert result.config["vocab_size"] == 99
    assert result.untied == (tied and apart)
    model = load(base, untie=result.untied)
    model.resize_token_embeddings(99)
    if result.untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    assert_equal_to(merged_by_peft(model, directory), result)


def test_a_vocabulary_resized_on_one_side_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    directory = train(base, tmp_path / "adapter", config, vocabulary=99)
    rewrite(directory, drop=lambda key: "lm_head" in key)
    with pytest.raises(InputError, match="on one side only"):
        adapted(base, directory)


# Bad input


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (
            IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["k_proj", "down_proj"],
                feedforward_modules=["down_proj"],
            ),
            "IA3",
        ),
    ],
)
def test_other_methods_are_refused_by_name(
    tiny: Tiny, tmp_path: Path, config: IA3Config | PromptTuningConfig, name: str
) -> None:
    get_peft_model(load(base_of(tiny, "llama")), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=name):
        Adapter.open(tmp_path)


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "PREFIX_TUNING", "None"])
def test_other_types_are_refused_by_name(adapter: Path, kind: str) -> None:
    configure(adapter, peft_type=kind)
    with pytest.raises(InputError, match=kind):
        Adapter.open(adapter)


@pytest.mark.parametrize(
    "option",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [1]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_variants_that_cant_be_merged_are_refused_by_name(
    adapter: Path, option: dict[str, Any]
) -> None:
    configure(adapter, **option)
    with pytest.raises(InputError, match=next(iter(option))):
        Adapter.open(adapter)


def test_unknown_tensors_of_a_variant_are_named(adapter: Path) -> None:
    rewrite(adapter, rename=lambda key: key.replace("lora_A.weight", "lora_diag"))
    with pytest.raises(InputError, match=r"q_proj\.lora_diag|lora_diag"):
        Adapter.open(adapter)


def test_pickle_is_refused_with_the_reason(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        Adapter.open(adapter)


def test_a_truncated_adapter_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        Adapter.open(adapter)


def test_ranks_that_disagree_are_refused(adapter: Path) -> None:
    configure(adapter, r=8)
    with pytest.raises(InputError, match="rank 8"):
        Adapter.open(adapter)


@pytest.mark.parametrize(
    "change",
    [{"target_modules": "(q_proj"}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": float("nan")}],
)
def test_a_config_that_makes_no_sense_is_refused(adapter: Path, change: dict[str, Any]) -> None:
    configure(adapter, **change)
    with pytest.raises(InputError, match="isn't a LoRA config"):
        Adapter.open(adapter)


def test_a_missing_factor_is_named(adapter: Path) -> None:
    rewrite(adapter, drop=lambda key: key.endswith("layers.1.self_attn.q_proj.lora_B.weight"))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj"):
        Adapter.open(adapter)


def test_a_missing_target_module_is_named(tiny: Tiny, adapter: Path) -> None:
    rewrite(adapter, drop=lambda key: "layers.1.self_attn.q_proj" in key)
    with pytest.raises(InputError, match=r"lacks the factors of .*layers\.1\.self_attn\.q_proj"):
        adapted(base_of(tiny, "llama"), adapter)


def test_missing_magnitudes_are_named(tiny: Tiny, tmp_path: Path) -> None:
    directory = train(base_of(tiny, "llama"), tmp_path / "a", OPTIONS["dora"][1])
    rewrite(directory, drop=lambda key: "magnitude" in key)
    with pytest.raises(InputError, match="no magnitudes"):
        Adapter.open(directory)


def test_an_adapter_of_another_architecture_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    directory = train(base_of(tiny, "gpt2"), tmp_path / "a", OPTIONS["conv1d"][1])
    with pytest.raises(InputError, match="aren't in the base"):
        adapted(base_of(tiny, "llama"), directory)


def test_an_adapter_of_another_size_is_refused(tiny: Tiny, adapter: Path) -> None:
    base = base_of(tiny, "llama", hidden_size=32)
    with pytest.raises(InputError, match="has the shape"):
        adapted(base, adapter)


def test_another_base_name_is_a_warning_and_an_error_if_strict(tiny: Tiny, adapter: Path) -> None:
    configure(adapter, base_model_name_or_path="someone/other-7b")
    base = base_of(tiny, "llama")
    assert "someone/other-7b" in adapted(base, adapter).warnings[0]
    assert not adapted(base, adapter, base_name="Someone/Other-7B").warnings
    cached = "/root/.cache/huggingface/hub/models--someone--Other-7b/snapshots/" + "0" * 40
    assert not adapted(base, adapter, base_name=cached).warnings
    with pytest.raises(InputError, match="someone/other-7b"):
        adapted(base, adapter, strict=True)
    configure(adapter, base_model_name_or_path=cached)
    assert not adapted(base, adapter, base_name="someone/Other-7B").warnings


def test_nan_is_noticed(tiny: Tiny, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path)
    result = adapted(base_of(tiny, "llama"), adapter)
    with pytest.raises(InputError, match="NaN"):
        for key in result.changed:
            result.read(key)


def test_combinations_that_peft_refuses_are_refused(
    tiny: Tiny, tmp_path: Path, adapter: Path
) -> None:
    base = base_of(tiny, "llama")
    other = train(base, tmp_path / "r", {"target_modules": ["q_proj"], "r": 2})
    with pytest.raises(InputError, match="ranks 2, 4"):
        adapted(base, adapter, other)
    dora = train(base, tmp_path / "d", OPTIONS["dora"][1])
    with pytest.raises(InputError, match="DoRA"):
        adapted(base, adapter, dora)
    saved = train(base, tmp_path / "s", OPTIONS["saved"][1])
    with pytest.raises(InputError, match="both replace its tensor"):
        adapted(base, saved, shutil.copytree(saved, tmp_path / "s2"))


def test_reading_needs_no_peft(tiny: Tiny, adapter: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Adapter.open(adapter).lora.rank == 4
