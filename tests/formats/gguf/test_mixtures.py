"""Mixtures of experts: what can't be written, how layers and keys may differ, and the mixes."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.architectures.architecture import Metadata
from quantkit.formats.gguf.architectures.table import read_config
from quantkit.formats.gguf.mixes import MIXES, ModelTraits
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.gguf.tensor_types import choose_types
from quantkit.formats.gguf.writer import write_bf16
from tests.helpers.gguf_tiny import MIXTURES, change, checkpoint

pytest.importorskip("gguf")

YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "original_max_position_embeddings": 64,
}


def metadata(model_type: str, **changes: Any) -> Metadata:
    config = {
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 256, "model_type": model_type},
        **MIXTURES[model_type],
        **changes,
    }
    architecture, config = read_config(config, Path("config.json"))
    return architecture.metadata(config, architecture.dimensions(config))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 of 4 experts"),
        ("qwen3_moe", {"num_experts": 600}, "2 of 600 experts"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv 8\.0"),
        ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit 5\.0"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "layer_types other than"),
        ("glm4_moe", {"n_group": 4, "topk_group": 2}, "2 of 4 groups of 4 experts"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False"),
        ("deepseek_v3", {"rope_parameters": YARN}, "yarn rope whose mscale"),
        ("deepseek_v3", {"num_hidden_layers": 27}, "q_lora_rank with 27 layers"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
            "topk_method 'group_limited_greedy' with n_group 2",
        ),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval 2"),
        ("ernie4_5_moe", {"moe_layer_end_index": 0}, "moe_layer_end_index 0"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk that differs"),
    ],
)
def test_settings_that_no_graph_computes(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metadata(model_type, **changes)


def test_what_the_files_say() -> None:
    groups = metadata("glm4_moe", n_group=2, topk_group=2)
    assert groups["glm4moe.expert_group_count"] == groups["glm4moe.expert_group_used_count"] == 1
    latent = metadata("deepseek_v3")
    assert latent["deepseek2.attention.head_count_kv"] == 1
    assert latent["deepseek2.attention.key_length"] == 64 + 32
    assert latent["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert "deepseek2.rope.scaling.attn_factor" not in latent
    assert metadata("mixtral")["llama.expert_used_count"] == 2
    unrounded = {**YARN, "truncate": False}
    assert metadata("gpt_oss", rope_parameters=unrounded)["gpt-oss.rope.scaling.type"] == "yarn"
    with pytest.raises(InputError, match="truncate: false"):
        metadata("qwen3_moe", rope_parameters=unrounded)


def test_the_names_and_layouts_that_transformers_takes(tmp_path: Path) -> None:
    made = {name: tmp_path / name for name in ("apart", "fused")}
    made["apart"].mkdir()
    checkpoint(made["apart"], model_type="mixtral", **MIXTURES["mixtral"])
    made["fused"].mkdir()
    change(made["apart"], made["fused"])
    file = made["fused"] / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for key, value in sorted(load_file(file).items()):
        if ".experts." in key:
            layer, _, leaf = key.removesuffix(".weight").partition(".block_sparse_moe.experts.")
            experts.setdefault(f"{layer} {leaf.split('.')[1]}", []).append(value)
        else:
            tensors[key.replace("block_sparse_moe", "mlp")] = value
    for layer in ("model.layers.0", "model.layers.1"):
        gate, down, up = (torch.stack(experts[f"{layer} w{n}"]) for n in (1, 2, 3))
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{layer}.mlp.experts.down_proj"] = down
    save_file(tensors, file, {"format": "pt"})
    for name, path in made.items():
        write_bf16(tmp_path / f"{name}.gguf", Checkpoint(path))
    one, other = (GgufWeights(tmp_path / f"{name}.gguf") for name in made)
    assert set(one.keys()) == set(other.keys())
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.types)


def test_a_single_expert(tmp_path: Path) -> None:
    settings = {**MIXTURES["qwen3_moe"], "num_experts": 1, "num_experts_per_tok": 1}
    source = Checkpoint(checkpoint(tmp_path, model_type="qwen3_moe", **settings))
    write_bf16(tmp_path / "model.gguf", source)
    weights = GgufWeights(tmp_path / "model.gguf")
    for key in source.entries:
        assert torch.equal(weights.read(key), source.read(key).float()), key


def test_another_number_of_experts_is_damage(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**MIXTURES["qwen3_moe"], "num_hidden_layers": 1}
    path = tmp_path / "model.gguf"
    write_bf16(path, Checkpoint(checkpoint(tmp_path, model_type="qwen3_moe", **settings)))
    content, key = path.read_bytes(), b"qwen3moe.expert_count"
    place = content.index(key) + len(key) + 4
    for count, message in (
        (0, "metadata has 0 experts"),
        (3, r"\(4, 256, 256\), where the metadata has 3"),
        (4_000_000_000, "at most 512"),
    ):
        path.write_bytes(content[:place] + count.to_bytes(4, "little") + content[place + 4 :])
        with pytest.raises(InputError, match=message):
            GgufWeights(path)


@pytest.mark.parametrize(
    ("experts", "queries", "mix", "expected"),
    [
        # By llama.cpp's llama_tensor_get_type_impl, for 16 layers and an importance matrix.
        (
            *(8, 4, "q4_k_m"),
            {
                **{"attn_v": "Q8_0*16", "attn_k": "Q8_0*16", "attn_output": "Q5_K*16"},
                "ffn_down_exps": "Q6_K*2 Q4_K*2 Q6_K*1 Q4_K*2 Q6_K*1 Q4_K*2 Q6_K*1 Q4_K*2 Q6_K*3",
            },
        ),
        (8, 4, "q3_k_l", {"attn_output": "Q3_K*16", "ffn_down_exps": "Q5_K*16"}),
        (
            *(8, 4, "iq3_m"),
            {
                "attn_output": "Q5_K*16",
                "ffn_down_exps": "Q4_K*2 IQ3_S*2 Q4_K*1 IQ3_S*2 Q4_K*1 IQ3_S*2 Q4_K*1 IQ3_S*2 "
                "Q4_K*3",
            },
        ),
        (4, 1, "q4_k_m", {"attn_k": "Q4_K*16", "attn_output": "Q4_K*16"}),
        # Two tensors of a layer count where there is a shared expert.
        (
            *(4, 1, "iq2_xs"),
            {
                **{"attn_v": "Q4_K*16", "attn_output": "IQ2_XS*16"},
                **{"ffn_down_exps": "Q2_K*1 IQ2_XS*15", "ffn_down_shexp": "Q2_K*1 IQ2_XS*15"},
            },
        ),
    ],
)
def test_types_of_mixtures(experts: int, queries: int, mix: str, expected: dict[str, str]) -> None:
    parts = {f"{part}.weight": (256, 256) for part in ("attn_v", "attn_k", "attn_output")}
    stack = {"ffn_down_exps.weight": (experts, 256, 256), "ffn_gate_inp.weight": (experts, 256)}
    shared = {} if experts == 8 else {"ffn_down_shexp.weight": (256, 256)}
    shapes: dict[str, tuple[int, ...]] = {
        f"blk.{layer}.{name}": shape
        for layer in range(16)
        for name, shape in {**parts, **stack, **shared}.items()
    }
    traits = ModelTraits("qwen3moe", 16, queries, 1, False, True, experts)
    chosen = choose_types(shapes, MIXES[mix], traits)
    assert {chosen[f"blk.{n}.ffn_gate_inp.weight"].type for n in range(16)} == {"F32"}
    for part, runs in expected.items():
        types = [chosen[f"blk.{layer}.{part}.weight"].type for layer in range(16)]
        found = [f"{type}*{len(list(same))}" for type, same in groupby(types)]
        assert " ".join(found) == runs, part


def test_keys_without_importance_weights() -> None:
    shapes = {"blk.0.attn_k_b.weight": (4, 64, 256), "blk.0.attn_v_b.weight": (4, 64, 256)}
    traits = ModelTraits("deepseek2", 1, 4, 1, True, True, 4)
    with pytest.raises(InputError, match=r"attn_k_b\.weight has no importance weights"):
        choose_types(shapes, MIXES["iq2_xs"], traits)
