"""GGUF files: the mixes against llama-quantize's choices, the permutation, writing and reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.gguf.writer import write_bf16, write_file
from tests.helpers.gguf_tiny import TEXT, change, checkpoint

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf-model")
    return checkpoint(directory, attention_bias=True, mlp_bias=True)


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
    keys = {tensor.name: tensor.key for tensor in plan.tensors}
    for record in records:
        key = keys[record.name]
        assert key is not None
        wanted = source.read(key).double()
        lost = (weights.read(key).double() - wanted).square().sum()
        whole = wanted.square().sum()
        assert record.error == pytest.approx(float(lost / whole) if whole else 0.0, abs=1e-9)
        assert (record.weighted_error is not None) == key.endswith("q_proj.weight")
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
    types = {
        tensor.name: tensor.type for tensor in plan_file(Checkpoint(directory), "q4_k_m").tensors
    }
    assert types["output.weight"] == "Q6_K"  # as in transformers, both count


def test_incomplete_checkpoints_are_refused(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(2)}, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"holds model\.extra\.weight"):
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
    for mix in ("q4_k_m", "q8_0", "bf16"):
        with pytest.raises(
            InputError, match=r"layers\.1\.mlp\.up_proj\.weight: the weight holds NaN"
        ):
            write_file(tmp_path / "out.gguf", plan_file(source, mix), source)


def test_unknown_mix(model: Path) -> None:
    with pytest.raises(InputError, match="unknown mix"):
        plan_file(Checkpoint(model), "q5_k_xl")


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
