"""GGUF files: the mixes against llama-quantize's choices, the permutation, writing and reading."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputError
from quantkit.formats import gguf_llama, gguf_tokenizer
from quantkit.formats.gguf_file import GgufWeights, plan_file
from quantkit.formats.gguf_mixes import MIXES, Layout, choose_types
from quantkit.formats.gguf_writer import write_bf16, write_file
from tests.gguf_tiny import GPT2, QWEN2, TEXT, VOCABULARY, checkpoint

gguf = pytest.importorskip("gguf")

RECORDED = json.loads((Path(__file__).parent / "data/llama_quantize_types.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf-model")
    return checkpoint(directory, attention_bias=True, mlp_bias=True)


def change(directory: Path, target: Path, **changes: object) -> Path:
    """Copy a checkpoint with a changed config; a value of None removes the key."""
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("mix", ["q4_k_m", "q8_0"])
@pytest.mark.parametrize("recorded", RECORDED["models"], ids=lambda m: m["name"])
def test_types_equal_llama_quantize(recorded: dict, mix: str) -> None:
    config = recorded["config"]
    tied = config["tie_word_embeddings"]
    keys = gguf_llama.shapes(config, [] if tied else ["lm_head.weight"])
    shapes = {str(gguf_llama.gguf_name(key)): shape for key, shape in keys.items()}
    choices = choose_types(shapes, MIXES[mix], gguf_llama.layout(config, tied=tied))
    facts = recorded["types"][mix]
    for name, choice in choices.items():
        parts = name.split(".")
        if "_norm" in name:
            fact = "F32"
        elif parts[0] == "blk":
            fact = facts[parts[2]]
            fact = fact if isinstance(fact, str) else fact[int(parts[1])]
        else:
            fact = facts[parts[0]]
        assert (name, choice.type) == (name, fact)


def test_overrides() -> None:
    shapes = {"blk.0.ffn_down.weight": (8, 256), "blk.1.ffn_down.weight": (8, 192)}
    layout = Layout(layers=2, heads=1, kv_heads=1, tied=True)

    def types(match: str, type: str) -> list[str]:
        override = SimpleNamespace(match=match, type=type)
        chosen = choose_types(shapes, MIXES["q4_k_m"], layout, [override])
        return [choice.type for choice in chosen.values()]

    assert types("blk.0.*", "Q3_K") == ["Q3_K", "Q8_0"]
    assert types("*.ffn_down.weight", "F16") == ["F16", "F16"]
    with pytest.raises(InputError, match="matches no tensor"):
        types("blk.7.*", "Q6_K")
    with pytest.raises(InputError, match="don't divide"):
        types("*", "Q6_K")
    with pytest.raises(InputError, match="unknown ggml type"):
        types("*", "Q7_K")


def test_permutation() -> None:
    rows = torch.arange(16.0)
    # Two heads of eight: halves (0..3, 4..7) become neighbouring pairs.
    first = [0, 4, 1, 5, 2, 6, 3, 7]
    assert gguf_llama.permute(rows, 2).tolist() == first + [8 + row for row in first]
    weight = torch.rand(16, 3)
    assert torch.equal(gguf_llama.unpermute(gguf_llama.permute(weight, 2), 2), weight)
    assert torch.equal(gguf_llama.permute(weight, 0), weight)


def test_bf16_roundtrip_is_exact(model: Path, tmp_path: Path) -> None:
    source = Checkpoint(model)
    path = tmp_path / "model.gguf"
    write_bf16(path, source)
    weights = GgufWeights(path)
    assert set(weights.keys()) == set(source.keys())
    assert any(key.endswith("k_proj.bias") for key in weights.types)
    for key in source.entries:
        assert weights.shape(key) == source.shape(key)
        assert torch.equal(weights.read(key), source.read(key).float()), key
    assert weights.types["model.norm.weight"] == "F32"
    assert weights.types["lm_head.weight"] == "BF16"


def test_what_is_written(model: Path, tmp_path: Path) -> None:
    source = Checkpoint(model)
    plan = plan_file(source, "q4_k_m", name="tiny")
    path = tmp_path / "model.gguf"
    importance = torch.linspace(0.01, 2, 256) ** 3

    def weights_of(key: str) -> torch.Tensor | None:
        return importance if key.endswith("q_proj.weight") else None

    records = write_file(path, plan, source, weights_of)
    same = tmp_path / "same.gguf"
    write_file(same, plan, source, weights_of, threads=1)
    assert same.read_bytes() == path.read_bytes()
    assert [record.name for record in records] == [tensor.name for tensor in plan.tensors]

    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("general.file_type").contents() == 15
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sum(tensor.n_bytes for tensor in reader.tensors) == plan.nbytes
    for tensor in plan.tensors:
        assert tensors[tensor.name].tensor_type.name == tensor.type
        assert tuple(reversed(tensors[tensor.name].shape.tolist())) == tensor.shape

    weights = GgufWeights(path)
    for record in records:
        assert record.key is not None
        wanted = source.read(record.key).double()
        lost = (weights.read(record.key).double() - wanted).square().sum()
        whole = wanted.square().sum()
        assert record.error == pytest.approx(float(lost / whole) if whole else 0.0, abs=1e-9)
        assert (record.weighted_error is not None) == record.key.endswith("q_proj.weight")
        assert record.weighted_error is None or record.weighted_error < record.error


def test_tied_embeddings(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, tie_word_embeddings=True, num_hidden_layers=1)
    source = Checkpoint(directory)
    types = {tensor.name: tensor.type for tensor in plan_file(source, "q4_k_m").tensors}
    assert types["token_embd.weight"] == "Q6_K" and "output.weight" not in types

    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file({**tensors, "lm_head.weight": embedding.clone()}, directory / "model.safetensors")
    assert len(plan_file(Checkpoint(directory), "q4_k_m").tensors) == len(types)
    save_file({**tensors, "lm_head.weight": embedding + 1}, directory / "model.safetensors")
    with pytest.raises(InputError, match="differs"):
        plan_file(Checkpoint(directory), "q4_k_m")


def test_incomplete_checkpoints_are_refused(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(2)}, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"no place for: model\.extra\.weight"):
        plan_file(Checkpoint(directory), "bf16")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks model\.norm\.weight"):
        plan_file(Checkpoint(directory), "bf16")
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight is \(8,\)"):
        plan_file(Checkpoint(directory), "bf16")


def test_nan_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    source = Checkpoint(directory)
    for mix in MIXES:
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN"):
            write_file(tmp_path / "out.gguf", plan_file(source, mix), source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_models_that_cannot_be_written(
    model: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    source = Checkpoint(change(model, tmp_path, **changes))
    with pytest.raises(InputError, match=message):
        plan_file(source, "bf16")


def test_unknown_mix(model: Path) -> None:
    with pytest.raises(InputError, match="unknown mix"):
        plan_file(Checkpoint(model), "q5_k_xl")


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
    assert gguf_llama.metadata(old) == gguf_llama.metadata(new)
    assert gguf_llama.metadata(new)["llama.rope.freq_base"] == 5e5
    assert gguf_llama.metadata(new)["llama.rope.scaling.factor"] == 4.0
    mistral = {**base, "model_type": "mistral", "sliding_window": 128}
    assert gguf_llama.metadata(mistral)["llama.context_length"] == 128


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
    divisors = gguf_llama.rope_freqs(config.to_dict())
    assert divisors is not None and divisors.min() == 1.0 and divisors.max() == 32.0
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / divisors, frequencies, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("split", "name"), [(GPT2, "gpt-2"), (QWEN2, "qwen2")])
@pytest.mark.parametrize("bos", [False, True])
def test_byte_level_tokenizer(tmp_path: Path, split: str, name: str, bos: bool) -> None:
    directory = checkpoint(tmp_path, split=split, bos=bos, num_hidden_layers=1)
    values = gguf_tokenizer.metadata(directory, VOCABULARY)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == name
    assert len(tokens) == len(types) == VOCABULARY
    assert tokens[:2] == ["<s>", "</s>"] and types[:2] == [gguf_tokenizer.CONTROL] * 2
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]" and types[-1] == gguf_tokenizer.UNUSED
    assert values["tokenizer.ggml.bos_token_id"] == 0
    assert values["tokenizer.ggml.eos_token_id"] == 1
    assert values["tokenizer.ggml.add_bos_token"] is bos
    assert values["tokenizer.ggml.add_eos_token"] is False
    assert values["tokenizer.chat_template"].startswith("{% for m in")
    assert all(merge.count(" ") == 1 for merge in values["tokenizer.ggml.merges"])


def test_every_token_that_ends_a_generation_is_named(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 1, 7]}')
    values = gguf_tokenizer.metadata(directory, VOCABULARY)
    ends = [values[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert ends == [1, 5, 7]
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    change_config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(change_config))
    with pytest.raises(InputError, match="names no EOS"):
        gguf_tokenizer.metadata(directory, VOCABULARY)


def test_tokenizers_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    path = directory / "tokenizer.json"
    good = json.loads(path.read_text())

    def refused(match: str, **changes: object) -> None:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(InputError, match=match):
            gguf_tokenizer.metadata(directory, VOCABULARY)

    refused("normalizer", normalizer={"type": "Lowercase"})
    refused("neither byte-level", pre_tokenizer=None)
    refused("Whitespace", pre_tokenizer={"type": "Whitespace"})
    refused("WordPiece", model={"type": "WordPiece"})
    unknown = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [unknown, level]}
    refused(r"split text by \\w\+ ", pre_tokenizer=steps)
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        path.write_text(json.dumps(good))
        gguf_tokenizer.metadata(directory, 100)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        gguf_tokenizer.metadata(directory, VOCABULARY)


def test_sentencepiece_scores_order_the_merges(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, split=None, num_hidden_layers=1)
    values = gguf_tokenizer.metadata(directory, VOCABULARY)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    score = dict(zip(tokens, values["tokenizer.ggml.scores"], strict=True))
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert types[:3] == [3, 3, 2] and types[3:259] == [gguf_tokenizer.BYTE] * 256
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    results = [score["".join(merge)] for merge in merges]
    assert results == sorted(results, reverse=True) and len(merges) > 30


def test_damaged_files_are_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="no such file"):
        GgufWeights(path)
    write_bf16(path, Checkpoint(model))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="readable GGUF"):
        GgufWeights(path)
    path.write_bytes(TEXT[0].encode())
    with pytest.raises(InputError, match="readable GGUF"):
        GgufWeights(path)
