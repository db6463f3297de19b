"""quantkit merge: what lies on disk, what is proven, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit.base.errors import InputError, QuantkitError
from quantkit.base.progress import Silent
from quantkit.base.sizes import parse_size
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.commands import merge as verb
from quantkit.formats.bitsandbytes import BitsandbytesFormat
from quantkit.formats.packed import open_artifact
from quantkit.lora.changes import Factors
from quantkit.methods import nf4
from tests.helpers.adapters import (
    OPTIONS,
    adapted,
    base_of,
    configure,
    load,
    merged_by_peft,
    train,
    units_apart,
)
from tests.helpers.tiny import Tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PLAIN = OPTIONS["plain"][1]
SCHEME = nf4.Nf4Scheme(64, True)


def merge(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Any]:
    adapters = [(str(adapter), 1.0)]
    return verb.merge(str(base), adapters, out, progress=Silent(), **options).to_json()


@pytest.fixture
def base(tiny: Tiny) -> Path:
    return base_of(tiny, "llama")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return train(base, tmp_path / "adapter", PLAIN)


# What is written


PROVEN = ("plain", "dora", "embeddings", "tokens", "bias-all", "conv1d-dora", "conv1d-head")


@pytest.mark.parametrize("option", [*PROVEN, "lora-bias", "gemma2-dora"])
def test_the_result_loads_as_peft_merges_it_and_is_proven(
    tiny: Tiny, tmp_path: Path, option: str
) -> None:
    model_type, config = OPTIONS[option]
    base = base_of(tiny, model_type)
    adapter = train(base, tmp_path / "adapter", config)
    manifest = merge(base, adapter, tmp_path / "out")
    assert 0 <= manifest["proof"]["difference"] < 1e-5
    assert manifest["proof"]["kl"] < 1e-9  # nothing was cast
    oracle = merged_by_peft(load(base, untie=manifest["untied"]), adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, expected in oracle.items():
        error = (found[name] - expected).abs().max()
        assert error <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("option", ["plain", "conv1d-dora"])
def test_bfloat16_is_the_oracle_cast_once(tiny: Tiny, tmp_path: Path, option: str) -> None:
    model_type, config = OPTIONS[option]
    base = base_of(tiny, model_type)
    adapter = train(base, tmp_path / "adapter", config)
    manifest = merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    assert manifest["dtype"] == "bfloat16" and 0 < manifest["proof"]["kl"] < 1e-2
    merged = Checkpoint(tmp_path / "out")
    assert merged.config["dtype"] == merged.config["torch_dtype"] == "bfloat16"
    oracle = merged_by_peft(load(base), adapter)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, actual in model.state_dict().items():
        assert actual.dtype == torch.bfloat16
        assert units_apart(actual, oracle[name].to(torch.bfloat16)) <= 1, name


def test_tied_embeddings_come_apart_on_disk(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama", tie_word_embeddings=True)
    adapter = train(base, tmp_path / "a", {"target_modules": ["q_proj", "embed_tokens"]})
    manifest = merge(base, adapter, tmp_path / "out")
    assert manifest["untied"] and manifest["proof"]["difference"] < 1e-5
    ids = torch.arange(40)[None]
    expected = PeftModel.from_pretrained(load(base), adapter)(input_ids=ids).logits
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{"ensure_weight_tying": True}, {}], ids=["tied", "untied"])
def test_tied_factors_are_proven(tiny: Tiny, tmp_path: Path, config: dict[str, Any]) -> None:
    base = base_of(tiny, "llama", tie_word_embeddings=True)
    config = {**config, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    manifest = merge(base, train(base, tmp_path / "a", config), tmp_path / "out")
    assert manifest["proof"]["difference"] < 1e-5
    assert manifest["untied"] == ("ensure_weight_tying" not in config)


def test_old_key_names_are_matched(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_of(tiny, "gpt2"), base)
    path = base / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    adapter = train(base, tmp_path / "a", {"target_modules": ["c_attn", "lm_head"]})
    merge(base, adapter, tmp_path / "out")
    assert "h.0.attn.c_attn.weight" in Checkpoint(tmp_path / "out").entries
    oracle = merged_by_peft(load(base, untie=True), adapter)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, expected in oracle.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_shards_are_those_of_the_base_or_of_the_size_given(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    load(base).save_pretrained(sharded, max_shard_size="100KB")
    merge(sharded, adapter, tmp_path / "one", proof=False)
    index = "model.safetensors.index.json"
    as_before = json.loads((sharded / index).read_text())["weight_map"]
    assert json.loads((tmp_path / "one" / index).read_text())["weight_map"] == as_before
    merge(sharded, adapter, tmp_path / "two", proof=False, max_shard_size=10_000_000)
    assert [p.name for p in (tmp_path / "two").glob("*.safetensors")] == ["model.safetensors"]
    merge(base, adapter, tmp_path / "three", proof=False, max_shard_size=100_000)
    assert len(list((tmp_path / "three").glob("model-*.safetensors"))) > 1
    for out in ("one", "three"):
        AutoModelForCausalLM.from_pretrained(tmp_path / out)


def test_what_is_written_is_what_is_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "out", proof=False, dtype="bfloat16")
    merged, read = Checkpoint(tmp_path / "out"), adapted(base, adapter, dtype=torch.bfloat16)
    assert set(merged.keys()) == set(read.keys()) and merged.nbytes() == read.nbytes()
    assert merged.config == {**read.config, "torch_dtype": "bfloat16"}
    for key in merged.keys():  # noqa: SIM118
        assert torch.equal(merged.read(key), read.read(key))


def test_same_inputs_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        merge(base, adapter, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        if path.name != "run.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_manifest_says_what_was_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    manifest = merge(base, adapter, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert set(manifest["source"]["files"]) == {"config.json", "model.safetensors"}
    (found,) = manifest["adapters"]
    assert found["name"] == "adapter" and found["weight"] == 1 and found["rank"] == 4
    assert set(found["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" in manifest["files"] and "run.json" not in manifest["files"]
    assert manifest["changed_tensors"] == 9
    assert manifest["tensors"]["changed"]["count"] == 9
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_lost_tensor_is_caught(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = verb._read_ahead

    def forgetful(adapted: Any, keys: Any) -> Any:
        return (pair for pair in read(adapted, keys) if pair[0] != "model.norm.weight")

    monkeypatch.setattr(verb, "_read_ahead", forgetful)
    with pytest.raises(QuantkitError, match=r"lacks model\.norm\.weight"):
        merge(base, adapter, tmp_path / "out", proof=False)
    assert not (tmp_path / "out").exists()


def tokenizer(directory: Path, tokens: int, template: str | None = None) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    Tokenizer(WordLevel({f"t{i}": i for i in range(tokens)}, "t0")).save(
        str(directory / "tokenizer.json")
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "size": tokens}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def test_the_adapters_tokenizer_wins_where_it_brings_one(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    source = tmp_path / "base"
    shutil.copytree(base, source)
    tokenizer(source, 90, "base's")
    (source / "added_tokens.json").write_text("{}")
    merge(source, adapter, tmp_path / "one", proof=False)
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "base's"
    tokenizer(adapter, 96)
    merge(source, adapter, tmp_path / "two", proof=False)
    out = tmp_path / "two"
    assert (out / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert not (out / "added_tokens.json").exists()  # a part of the other tokenizer
    assert (out / "chat_template.jinja").read_text() == "base's"
    tokenizer(adapter, 96, "adapter's")
    merge(source, adapter, tmp_path / "three", proof=False)
    assert (tmp_path / "three" / "chat_template.jinja").read_text() == "adapter's"
    assert (tmp_path / "three" / "generation_config.json").is_file()


def test_a_resized_vocabulary_agrees_everywhere(base: Path, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = train(base, tmp_path / "a", config, vocabulary=99)
    tokenizer(adapter, 99)
    manifest = merge(base, adapter, tmp_path / "out")
    assert manifest["vocabulary"] == {"rows": 99, "resized": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 99
    tokenizer(adapter, 100)
    with pytest.raises(InputError, match="100 tokens"):
        merge(base, adapter, tmp_path / "again")


def test_several_weighted_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = train(base, tmp_path / "b", PLAIN, seed=2)
    adapters = [(str(adapter), 0.7), (str(other), 0.3)]
    out = tmp_path / "out"
    manifest = verb.merge(str(base), adapters, out, progress=Silent()).to_json()
    assert [found["weight"] for found in manifest["adapters"]] == [0.7, 0.3]
    model = PeftModel.from_pretrained(load(base), adapter, adapter_name="a")
    model.load_adapter(other, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="linear")
    model.set_adapter("both")
    merged = Checkpoint(out)
    for name, expected in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.read(name), expected, rtol=0, atol=1e-6)


# The proof


def test_a_wrong_merge_is_not_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Factors.merge
    monkeypatch.setattr(Factors, "merge", lambda self, w, dtype: right(self, w, dtype) * 1.01)
    with pytest.raises(QuantkitError, match="differ"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert merge(base, adapter, tmp_path / "out", proof=False)["proof"] is None


# Refusals


@pytest.fixture
def quantized(tiny: Tiny, tmp_path: Path) -> Path:
    """A bitsandbytes base whose linears are NF4."""
    checkpoint = Checkpoint(base_of(tiny, "llama", torch.bfloat16))
    out = tmp_path / "nf4"
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for key in checkpoint.keys():  # noqa: SIM118
        if "proj" in key:
            weight = nf4.quantize(checkpoint.read(key), SCHEME)
            parts = BitsandbytesFormat().pack(weight, torch.bfloat16)
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            tensors[key] = checkpoint.read(key)
    save_file(tensors, out / "model.safetensors")
    config = {**checkpoint.config, "quantization_config": {"quant_method": "bitsandbytes"}}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_quantized_base_is_refused_by_name(
    adapter: Path, quantized: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="quantized already \\(bitsandbytes\\)") as error:
        merge(quantized, adapter, tmp_path / "out")
    assert "--dequantize-base" in (error.value.fix or "")


def test_an_unpacked_base_takes_the_adapter(
    base: Path, adapter: Path, quantized: Path, tmp_path: Path
) -> None:
    packed = open_artifact(quantized)
    manifest = merge(quantized, adapter, tmp_path / "out", dequantize_base=True)
    assert manifest["dequantized_base"] and manifest["dtype"] == "bfloat16"
    assert manifest["proof"]["difference"] < 1e-5
    merged = Checkpoint(tmp_path / "out")
    assert "quantization_config" not in merged.config
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.{}_proj"
    key = f"{name.format('q')}.weight"
    a, b = (tensors[f"base_model.model.{name.format('q')}.lora_{x}.weight"] for x in "AB")
    expected = (packed.read(key).float() + 2 * b @ a).to(torch.bfloat16)
    assert units_apart(merged.read(key), expected) <= 1
    untouched = f"{name.format('k')}.weight"
    assert torch.equal(merged.read(untouched), packed.read(untouched).to(torch.bfloat16))


def test_another_quantized_base_isnt_unpacked(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "awq"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="awq"):
        merge(other, adapter, tmp_path / "out", dequantize_base=True)


def test_an_output_that_exists_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, adapter, out, proof=False)
    with pytest.raises(InputError, match="exists already"):
        merge(base, adapter, out)
    merge(base, adapter, out, proof=False, force=True)


@pytest.mark.parametrize("size", ["2 apples", "", "0GB", "-1GB"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(InputError):
        parse_size(size, "--max-shard-size")


def test_sizes() -> None:
    assert parse_size("2GB", "") == 2_000_000_000
    assert parse_size("1.5 GiB", "") == 3 * 2**29


def test_the_command_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = tmp_path / "out"
    result = run(app, ["merge", str(base), "--adapter", f"{adapter}=0.5", "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest["adapters"][0]["weight"] == 0.5
    assert run(app, ["merge", str(base), str(adapter), "-o", str(out)]).exit_code == 2
    result = run(app, ["merge", str(base), str(adapter), "-o", str(tmp_path / "two")])
    assert result.exit_code == 0 and "logits differ by" in result.stdout
    configure(adapter, base_model_name_or_path="someone/other")
    result = run(app, ["merge", str(base), str(adapter), "-o", str(out), "--strict", "--force"])
    assert result.exit_code == 2 and "someone/other" in result.stderr
    wrong = ["merge", str(base), "--adapter", f"{adapter}=much", "-o", str(tmp_path / "three")]
    assert run(app, wrong).exit_code == 2
    assert run(app, ["merge", str(base), "-o", str(tmp_path / "three")]).exit_code == 2
