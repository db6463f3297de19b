"""No damaged file makes the command line crash, hang or leave half an output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from quantkit.base.errors import InputError
from quantkit.base.resources import recipes
from quantkit.commands import verify
from quantkit.engines.trial import Trial
from quantkit.formats.gguf.header import read_header
from tests.helpers import mutations
from tests.helpers.fuzzing import Sources, answers, fuzz
from tests.helpers.mutations import Content

MORE_CONFIG: dict[str, list[Any]] = {
    "model_type": ["gpt2", "qwen3", "mixtral", "bert", "t5", "mamba", "phi3", "gemma3", "opt"],
    "layer_types": [["full_attention"], ["sliding_attention"], ["linear_attention"]],
    "rope_scaling": [{"rope_type": "yarn", "factor": 2.0}, {"type": "dynamic"}],
    "rope_parameters": [{"rope_type": "longrope"}, {"rope_theta": 0}],
    "quantization_config": [{"quant_method": "awq"}, {"quant_method": "gptq", "bits": "4"}],
    "sliding_window": [4],
    "auto_map": [{"AutoModelForCausalLM": "modeling_mine.Mine"}],
    "text_config": [{"model_type": "llama"}],
    "transformers_weights": ["model.safetensors"],
    "is_encoder_decoder": [True],
    "dtype": ["float16", "float32", "float8_e4m3fn", "int8"],
    "hidden_act": ["gelu", "none"],
    "attention_bias": [True],
}
QUANTIZATIONS: list[dict[str, Any]] = [
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    },
]
MORE_ADAPTER: dict[str, list[Any]] = {
    "use_dora": [True],
    "bias": ["all"],
    "target_modules": ["all-linear", ".*", "("],
    "exclude_modules": [["q_proj"]],
    "layers_to_transform": [0, [0]],
    "layers_pattern": ["layers"],
    "modules_to_save": [["lm_head"]],
    "rank_pattern": [{"q_proj": 4}, {"(": 4}],
    "alpha_pattern": [{"q_proj": 4}],
    "peft_type": ["IA3", "LOHA"],
    "target_parameters": [["mlp.weight"]],
    "init_lora_weights": ["pissa"],
}


@pytest.fixture(autouse=True)
def engines_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """``verify`` would start a process with an engine each time: here every engine refuses."""

    def refuse(trial: Trial) -> None:
        raise InputError(f"{trial.engine} isn't tried here")

    monkeypatch.setattr(verify, "run_trial", refuse)


def test_config(sources: Sources) -> None:
    def attempt(data: Content) -> None:
        model = sources.with_changed(sources.model, "config.json", data)
        out = sources.out()
        answers("quantize", sources.recipe, "--model", model, "--out", out, out=out)
        answers("inspect", model)

    config = json.loads((sources.model / "config.json").read_text())
    fuzz(mutations.texts(config, MORE_CONFIG), attempt, 30)


def test_config_of_an_artifact(sources: Sources) -> None:
    """An artifact's own settings, and those of other tools."""

    def attempt(data: Content) -> None:
        changed = sources.with_changed(sources.artifact, "config.json", data)
        suite = sources.suite / "suite.yaml"
        answers("inspect", changed)
        answers("verify", changed, "--baseline", sources.model)
        answers("eval", changed, "--baseline", sources.model, "--suite", suite)

    config = json.loads((sources.artifact / "config.json").read_text())
    kinds = [config | {"quantization_config": settings} for settings in QUANTIZATIONS]
    fuzz(st.sampled_from([config, *kinds]).flatmap(mutations.texts), attempt, 8)


@pytest.mark.parametrize("name", ["quantkit.json", "run.json"])
def test_manifests(sources: Sources, name: str) -> None:
    def attempt(data: Content) -> None:
        changed = sources.with_changed(sources.artifact, name, data)
        answers("inspect", changed)
        answers("verify", changed, "--baseline", sources.model)

    content = json.loads((sources.artifact / name).read_text())
    fuzz(mutations.texts(content), attempt, 12)


def test_tokenizer_config(sources: Sources) -> None:
    def attempt(data: Content) -> None:
        model = sources.with_changed(sources.model, "tokenizer_config.json", data)
        out = sources.out()
        answers("quantize", "gguf-q8-0", "--model", model, "--out", out, out=out)
        answers("inspect", model)

    content = json.loads((sources.model / "tokenizer_config.json").read_text())
    fuzz(mutations.texts(content), attempt, 8)


def test_adapter_config(sources: Sources) -> None:
    def attempt(data: Content) -> None:
        adapter = sources.with_changed(sources.adapter, "adapter_config.json", data)
        out = sources.out()
        answers("merge", sources.model, adapter, "--out", out, out=out)

    content = json.loads((sources.adapter / "adapter_config.json").read_text())
    fuzz(mutations.texts(content, MORE_ADAPTER), attempt, 30)


@pytest.mark.parametrize("kind", ["model", "adapter", "artifact"])
def test_safetensors_headers(sources: Sources, kind: str) -> None:
    source: Path = getattr(sources, kind)
    [file] = source.glob("*.safetensors")

    def attempt(data: Content) -> None:
        changed = sources.with_changed(source, file.name, data)
        out = sources.out()
        if kind == "adapter":
            answers("merge", sources.model, changed, "--no-proof", "--out", out, out=out)
            return
        answers("inspect", changed)
        if kind == "model":
            answers("quantize", sources.recipe, "--model", changed, "--out", out, out=out)
        else:
            suite = sources.suite / "suite.yaml"
            answers("verify", changed, "--baseline", sources.model)
            answers("eval", changed, "--baseline", sources.model, "--suite", suite)

    fuzz(mutations.safetensors(Content(file.read_bytes())), attempt, 16)


def test_index(sources: Sources) -> None:
    name = "model.safetensors.index.json"

    def attempt(data: Content) -> None:
        model = sources.with_changed(sources.shards, name, data)
        out = sources.out()
        answers("inspect", model)
        answers("merge", model, sources.adapter, "--no-proof", "--out", out, out=out)

    content = json.loads((sources.shards / name).read_text())
    fuzz(mutations.texts(content), attempt, 15)


def test_gguf_headers(sources: Sources) -> None:
    [file] = sources.gguf.glob("*.gguf")

    def attempt(data: Content) -> None:
        changed = sources.with_changed(sources.gguf, file.name, data)
        answers("inspect", changed)
        answers("verify", changed, "--baseline", sources.model)
        suite = sources.suite / "suite.yaml"
        answers("eval", changed / file.name, "--baseline", sources.model, "--suite", suite)

    header = read_header(file)
    names = [*header.metadata, *(tensor.name for tensor in header.tensors)]
    fuzz(mutations.gguf(Content(file.read_bytes()), names), attempt, 12)


def test_recipes(sources: Sources) -> None:
    shipped = [yaml.safe_load(path.read_text()) for path in sorted(recipes().glob("*.yaml"))]

    def attempt(content: Any) -> None:
        data = json.dumps(content).encode()  # which is YAML too
        place = sources.with_changed(sources.suite, "recipe.yaml", data)
        answers("quantize", place / "recipe.yaml", "--model", sources.model, "--dry-run")

    fuzz(st.sampled_from(shipped).flatmap(mutations.values), attempt, 20)


def test_suites(sources: Sources) -> None:
    content = yaml.safe_load((sources.suite / "suite.yaml").read_text())

    def attempt(data: Content) -> None:
        suite = sources.with_changed(sources.suite, "suite.yaml", data) / "suite.yaml"
        answers("suite", "check", suite)

    fuzz(mutations.texts(content), attempt, 20)


@pytest.mark.parametrize("name", ["cases.jsonl", "text.jsonl"])
def test_json_lines(sources: Sources, name: str) -> None:
    rows = [json.loads(line) for line in (sources.suite / name).read_text().splitlines()]

    def attempt(data: Content) -> None:
        suite = sources.with_changed(sources.suite, name, data) / "suite.yaml"
        answers("suite", "check", suite)
        answers("eval", sources.artifact, "--baseline", sources.model, "--suite", suite)

    fuzz(mutations.lines(rows), attempt, 6)
