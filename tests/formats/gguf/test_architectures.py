"""Every architecture: written, read back, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.architectures.architecture import Metadata
from quantkit.formats.gguf.architectures.table import ARCHITECTURES, read_config
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.gguf.rope import FREQS, read_rope, rope_metadata, rope_tensors
from quantkit.formats.gguf.transforms import AddOne, InterleaveHalves, Keep, ThreeParts, Transform
from quantkit.formats.gguf.writer import write_bf16
from tests.helpers.gguf_tiny import MODELS, change, checkpoint

gguf = pytest.importorskip("gguf")

# Text models that are never alone.
INSIDE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("gguf-model"))


def test_all_models_are_tested() -> None:
    known = {name for a in ARCHITECTURES for name in a.model_types}
    assert known == {*MODELS, *INSIDE}


def test_the_docs_name_all_models() -> None:
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    assert [name for name in MODELS if f"`{name}`" not in page] == []


@pytest.mark.parametrize("model_type", MODELS)
def test_bf16_comes_back(tmp_path: Path, model_type: str) -> None:
    source = Checkpoint(checkpoint(tmp_path, model_type=model_type, **MODELS[model_type]))
    write_bf16(tmp_path / "model.gguf", source)
    weights = GgufWeights(tmp_path / "model.gguf")
    viewed = plan_file(source, "bf16").viewed(source)
    keys = [part.key for part in plan_file(source, "bf16").parts]
    read = set(weights.keys())
    # Checkpoints of Nemotron-H have the names of its first code.
    own = {key: re.sub("^backbone(?=.)", "model", key) for key in {*keys, *source.keys()} if key}
    assert read - set(own.values()) <= {"lm_head.weight"}
    for key in filter(None, keys):
        name = key if key in read else own[key]
        assert torch.equal(weights.read(name), viewed.read(key).float()), key
    assert set(weights.types.values()) <= {"BF16", "F32"}


@pytest.mark.parametrize("model_type", MODELS)
def test_what_slices_of_rows_give(tmp_path: Path, model_type: str) -> None:
    source = Checkpoint(checkpoint(tmp_path, model_type=model_type, **MODELS[model_type]))
    plan = plan_file(source, "bf16")
    viewed = plan.viewed(source)
    for tensor in plan.parts:
        assert tensor.key is not None
        weight, step = viewed.read(tensor.key), tensor.transform.rows
        if step is None:
            apart = ("query_key_value", "kv_b_proj", "linear_attn", "mixer", "mamba", "shared_mlp")
            assert any(part in tensor.key for part in apart)
            continue
        slices = [weight[start : start + step] for start in range(0, len(weight), step)]
        value = torch.cat([tensor.transform.apply(part) for part in slices])
        assert torch.equal(value, tensor.value(viewed)), tensor.name


@pytest.mark.parametrize("transform", [Keep(), InterleaveHalves(8), ThreeParts(4), AddOne()])
@pytest.mark.parametrize("shape", [(48,), (48, 3)])
def test_transforms_are_undone(transform: Transform, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(-100, 100, shape).float() / 16
    assert torch.equal(transform.undo(transform.apply(tensor)), tensor)


def test_what_transforms_do() -> None:
    rows = torch.arange(16.0)
    # Two heads of eight: halves (0..3, 4..7) become neighboring pairs.
    first = [0, 4, 1, 5, 2, 6, 3, 7]
    assert InterleaveHalves(8).apply(rows).tolist() == first + [8 + row for row in first]
    # Two heads of two: (q, k, v) of each become all q, all k, all v.
    fused = torch.arange(12.0)
    assert ThreeParts(2).apply(fused).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_an_output_matrix_that_llama_cpp_needs_is_written_twice(tmp_path: Path) -> None:
    source = Checkpoint(checkpoint(tmp_path, model_type="olmo2", tie_word_embeddings=True))
    keys = {tensor.name: tensor.key for tensor in plan_file(source, "q4_k_m").tensors}
    assert keys["output.weight"] == keys["token_embd.weight"] == "model.embed_tokens.weight"
    with pytest.raises(InputError, match="output matrix of its own: GGUF's gemma architecture"):
        directory = checkpoint(tmp_path, model_type="gemma", tie_word_embeddings=False)
        plan_file(Checkpoint(directory), "bf16")


def test_the_list_of_those_that_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_file(Checkpoint(change(model, tmp_path, model_type="phimoe")), "bf16")
    assert caught.value.fix == f"Those that can: {', '.join(sorted([*MODELS, *INSIDE]))}."


def test_settings_that_cannot_be_switched_off(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, model_type="gemma2", attn_logit_softcapping=None)
    with pytest.raises(InputError, match="attn_logit_softcapping null"):
        plan_file(Checkpoint(directory), "bf16")


def test_biases_that_the_config_promises_must_be_there(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, model_type="qwen2", num_hidden_layers=1)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"):
        plan_file(Checkpoint(directory), "bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "phimoe"}, "model_type 'phimoe' can't be written"),
        ({"model_type": "gpt2"}, "'gpt2' can't"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_parameters": {"rope_type": "llama3"}, "model_type": "qwen2"}, "'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": "qwen2", "head_dim": 32}, "4 heads of 32 for 256"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 7}, "query_pre_attn_scalar 7"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}, "layer_types"),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe"]},
            "layers 'linear_attention', 'moe'",
        ),
        (
            {
                **{"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention"]},
                "time_step_limit": [0.0, 1.0],
            },
            "time_step_limit",
        ),
        (
            {
                **{"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention"]},
                "use_conv_bias": False,
            },
            "without biases",
        ),
        ({"model_type": "granitemoehybrid"}, "num_local_experts 8"),
        (
            {
                **{"model_type": "granitemoehybrid", "num_local_experts": 0},
                "layer_types": ["attention", "attention"],
            },
            "layer_types all 'full_attention'",
        ),
        ({"model_type": "lfm2"}, "layer_types all 'full_attention'"),
        ({"model_type": "lfm2", "layer_types": ["conv", "mamba"]}, "linear_attention"),
        ({"model_type": "qwen3_5_text"}, "layer_types all 'linear_attention'"),
        ({"model_type": "qwen3_5_text", "linear_value_head_dim": 64}, "linear_value_head_dim 64"),
        ({"model_type": "seed_oss", "attention_out_bias": True}, "attention_out_bias"),
        ({"model_type": "ernie4_5", "use_bias": True}, "use_bias"),
        ({"model_type": "exaone4"}, "sliding_window 4096 in 2 layers"),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm True in 2 layers"),
        ({"model_type": "cohere2", "layer_types": ["full_attention"] * 2}, "at every 4th"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm"),
        ({"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}}, "'default'"),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            "rope_theta 10000.0 in sliding layers",
        ),
        (
            {
                "model_type": "hunyuan_v1_dense",
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "without alpha",
        ),
    ],
)
def test_models_that_cannot_be_written(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = Checkpoint(change(model, tmp_path, **changes))
    with pytest.raises(InputError, match=message):
        plan_file(source, "bf16")


def metadata(config: dict[str, object]) -> Metadata:
    architecture, config = read_config(config, Path("config.json"))
    return architecture.metadata(config, architecture.dimensions(config))


def test_rope_of_old_and_new_configs() -> None:
    base = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "vocab_size": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    old = {**base, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {
        **base,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
    }
    assert metadata(old) == metadata(new)
    assert metadata(new)["llama.rope.freq_base"] == 5e5
    assert metadata(new)["llama.rope.scaling.factor"] == 4.0
    mistral = {**base, "model_type": "mistral", "sliding_window": 128}
    assert metadata(mistral)["llama.context_length"] == 128


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, None),
        ({"attention_factor": 0.1 * math.log(4) + 1}, None),
        ({"attention_factor": 1.0}, 1 / (0.1 * math.log(4) + 1)),
        ({"mscale": 1.0}, None),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1 / (0.1 * math.log(4) + 1)),
    ],
)
def test_the_attention_factor_of_yarn(settings: dict[str, float], factor: float | None) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = read_rope({"max_position_embeddings": 256, "rope_parameters": {**yarn, **settings}})
    assert rope_metadata(rope).get("rope.scaling.attn_factor") == pytest.approx(factor)


def test_rope_freqs_are_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(rope_parameters=llama3, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = rope_tensors(read_rope(config.to_dict()), 128).get(FREQS)
    assert divisors is not None and divisors.min() == 1.0 and divisors.max() == 32.0
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / divisors, frequencies, rtol=2e-5, atol=0)
