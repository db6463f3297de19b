"""Damaged files that the command line once crashed on, each with what it says now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.fuzzing import Sources, quantkit

Change = Callable[[Any], Any]


def said(code: int, *arguments: object) -> str:
    """What a command prints that ends with ``code``, on one line."""
    ended, printed = quantkit(*arguments)
    assert ended == code, printed
    assert "Traceback" not in printed
    return " ".join(printed.split())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", ["BF16"]),
        ("dtype", "BF17"),
        ("shape", [64, "64"]),
        ("shape", [64.0, 64]),
        ("shape", [[64], 64]),
        ("shape", [1 << 64, 64]),
        ("shape", [-64, -64]),
        ("shape", 4096),
        ("data_offsets", ["0", 8192]),
        ("data_offsets", [0, {}]),
        ("data_offsets", [0, None]),
        ("data_offsets", [-8192, 0]),
        ("data_offsets", [0]),
    ],
)
def test_headers_of_safetensors(sources: Sources, key: str, value: Any) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    data = (sources.model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name][key] = value
    changed = json.dumps(header).encode()
    content = len(changed).to_bytes(8, "little") + changed + data[8 + length :]
    model = sources.with_changed(sources.model, "model.safetensors", content)
    for command in (["inspect", model], ["merge", model, sources.adapter, "-o", sources.out()]):
        assert name in said(2, *command)
    assert not sources.out().exists()


@pytest.mark.parametrize("depth", [2000, 200_000])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_json_of_any_depth(sources: Sources, name: str, depth: int) -> None:
    model = sources.with_changed(sources.shards, name, b'{"a": ' + b"[" * depth)
    assert f"{name} isn't valid JSON" in said(2, "inspect", model)


@pytest.mark.parametrize(
    ("value", "message"),
    [("awq", "is 'awq'"), (4, "is 4"), (True, "is True"), ([{"bits": 4}], "is [{'bits': 4}]")],
)
def test_quantization_configs_that_are_no_objects(
    sources: Sources, value: Any, message: str
) -> None:
    config = json.loads((sources.model / "config.json").read_text())
    content = json.dumps({**config, "quantization_config": value}).encode()
    model = sources.with_changed(sources.model, "config.json", content)
    for command in (
        ["quantize", sources.recipe, "--model", model, "-o", sources.out()],
        ["merge", model, sources.adapter, "-o", sources.out()],
        ["inspect", model],
    ):
        assert f"quantization_config {message}" in said(2, *command)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "bits": "four"},
        {"quant_method": "gptq", "group_size": "all"},
        {"quant_method": "auto-round", "packing_format": []},
        {"quant_method": "compressed-tensors", "sparsity_config": "dense"},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
    ],
)
def test_quantization_configs_that_make_no_sense(
    sources: Sources, settings: dict[str, Any]
) -> None:
    config = json.loads((sources.artifact / "config.json").read_text())
    content = json.dumps({**config, "quantization_config": settings}).encode()
    artifact = sources.with_changed(sources.artifact, "config.json", content)
    suite = sources.suite / "suite.yaml"
    said(2, "eval", artifact, "--baseline", sources.model, "--suite", suite)


@pytest.mark.parametrize("value", ["512", [512], {"a": 1}, "<|end|>"])
@pytest.mark.parametrize("recipe", ["gguf-q8-0", "rtn-w4-g128"])
def test_a_longest_length_that_is_no_number(sources: Sources, value: Any, recipe: str) -> None:
    name = "tokenizer_config.json"
    content = json.loads((sources.model / name).read_text()) | {"model_max_length": value}
    model = sources.with_changed(sources.model, name, json.dumps(content).encode())
    message = said(2, "quantize", recipe, "--model", model, "-o", sources.out())
    assert f"{name}: model_max_length is {value!r}, which isn't a number" in message


def test_a_longest_length_may_be_missing(sources: Sources) -> None:
    name = "tokenizer_config.json"
    content = json.loads((sources.model / name).read_text()) | {"model_max_length": None}
    model = sources.with_changed(sources.model, name, json.dumps(content).encode())
    said(0, "quantize", "gguf-q8-0", "--model", model, "-o", sources.out())


def test_a_tokenizer_class_that_is_an_object(sources: Sources) -> None:
    content = b'{"tokenizer_class": {"type": "linear"}}'
    said(0, "inspect", sources.with_changed(sources.model, "tokenizer_config.json", content))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", [None]),
        ("target_modules", ["q_proj", 7]),
        ("exclude_modules", [["q_proj"]]),
        ("modules_to_save", [{}]),
        ("layers_pattern", [0]),
        ("base_model_name_or_path", 0.5),
        ("base_model_name_or_path", ["base"]),
    ],
)
def test_names_in_an_adapter_config(sources: Sources, key: str, value: Any) -> None:
    name = "adapter_config.json"
    content = json.loads((sources.adapter / name).read_text()) | {key: value}
    adapter = sources.with_changed(sources.adapter, name, json.dumps(content).encode())
    message = said(2, "merge", sources.model, adapter, "-o", sources.out())
    assert "isn't a LoRA config of PEFT" in message and "is no name of a mod" in message


@pytest.mark.parametrize("key", ["name", "description", "gates"])
def test_half_characters_in_a_suite(sources: Sources, key: str) -> None:
    content = yaml.safe_load((sources.suite / "suite.yaml").read_text())
    content[key] = [{"metric": "\ud83d x"}] if key == "gates" else "\ud83d x"
    data = json.dumps(content).encode()  # which is YAML too
    suite = sources.with_changed(sources.suite, "suite.yaml", data) / "suite.yaml"
    assert str(suite) in said(2, "suite", "check", suite)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 1200, 'a: "\\0"', "a: 2024-99-99", "? [a]\n: b", "&a [*a]"]
)
@pytest.mark.parametrize("kind", ["suite", "recipe"])
def test_yaml_of_any_form(sources: Sources, text: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "document.yaml"
    path.write_text(text)
    command = ["suite", "check", path]
    if kind == "recipe":
        command = ["quantize", path, "--model", sources.model, "--dry-run"]
    assert str(path) in said(2, *command)


@pytest.mark.parametrize("layers", [10**9, 2**31, 2**32 - 1])
def test_more_layers_than_tensors(sources: Sources, layers: int) -> None:
    """Their names alone would take hours to make."""
    [file] = sources.gguf.glob("*.gguf")
    data, key = bytearray(file.read_bytes()), b"llama.block_count"
    place = data.index(key) + len(key) + 4  # the value stands behind its type
    data[place : place + 4] = layers.to_bytes(4, "little")
    changed = sources.with_changed(sources.gguf, file.name, bytes(data))
    suite = sources.suite / "suite.yaml"
    command = ["eval", changed, "--baseline", sources.model, "--suite", suite]
    assert f"block_count is {layers}" in said(2, *command)
    config = json.loads((sources.model / "config.json").read_text())
    content = json.dumps({**config, "num_hidden_layers": layers}).encode()
    model = sources.with_changed(sources.model, "config.json", content)
    command = ["quantize", "gguf-q8-0", "--model", model, "-o", sources.out()]
    assert f"num_hidden_layers is {layers}" in said(2, *command)


@pytest.mark.parametrize(
    "value", [-1, 2**32, 10**12, 10**400], ids=["-1", "2^32", "10^12", "10^400"]
)
def test_positions_that_gguf_has_no_number_for(sources: Sources, value: int) -> None:
    config = json.loads((sources.model / "config.json").read_text())
    content = json.dumps({**config, "max_position_embeddings": value}).encode()
    model = sources.with_changed(sources.model, "config.json", content)
    message = said(2, "quantize", "gguf-q8-0", "--model", model, "-o", sources.out())
    assert f"max_position_embeddings is {value}" in message
    # The model itself has no table of positions, and needs no number.
    said(0, "quantize", sources.recipe, "--model", model, "-o", sources.out())


@pytest.mark.parametrize("name", ["a\udcffb\ud800", "a\0b", "\ud83d.safetensors"])
def test_names_that_no_file_has(sources: Sources, name: str) -> None:
    index = "model.safetensors.index.json"
    content = json.loads((sources.shards / index).read_text())
    content["weight_map"]["lm_head.weight"] = name
    model = sources.with_changed(sources.shards, index, json.dumps(content).encode())
    assert "no weight_map" in said(2, "inspect", model)
    config = json.loads((sources.model / "config.json").read_text())
    changed = json.dumps({**config, "transformers_weights": name}).encode()
    model = sources.with_changed(sources.model, "config.json", changed)
    assert "transformers_weights is" in said(2, "inspect", model)


@pytest.mark.parametrize("key", ["return_dict", "output_attentions", "sliding_window"])
def test_a_config_that_changes_how_a_model_is_run(sources: Sources, key: str) -> None:
    config = json.loads((sources.model / "config.json").read_text())
    value = {"return_dict": False, "output_attentions": True, "sliding_window": "8"}[key]
    model = sources.with_changed(
        sources.model, "config.json", json.dumps({**config, key: value}).encode()
    )
    suite = sources.suite / "suite.yaml"
    command = ["eval", sources.artifact, "--baseline", model, "--suite", suite]
    code = 0 if key == "output_attentions" else 2
    assert code == 0 or "transformers can't run" in said(code, *command)


@pytest.mark.parametrize("shape", [[0], [0, 64], [64, 0]])
def test_tensors_without_elements(sources: Sources, shape: list[int]) -> None:
    data = (sources.model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["empty"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    changed = json.dumps(header).encode()
    content = len(changed).to_bytes(8, "little") + changed + data[8 + length :]
    model = sources.with_changed(sources.model, "model.safetensors", content)
    said(0, "inspect", model)
    # The same in GGUF, where the fuzzer found it.
    [file] = sources.gguf.glob("*.gguf")
    gguf = bytearray(file.read_bytes())
    place = gguf.index(b"output_norm.weight") + len(b"output_norm.weight")
    gguf[place + 4 : place + 12] = bytes(8)
    said(0, "inspect", sources.with_changed(sources.gguf, file.name, bytes(gguf)))
