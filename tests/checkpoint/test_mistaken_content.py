"""Files and directories that aren't what they are taken for are named for what they are.

Oracles: transformers 5 and PEFT refuse JSON behind a byte order mark, "auto" as a config's dtype,
and text for a number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_adapter, demo_model
from quantkit.calibration.text import load_tokenizer
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import check_sidecars, write_config
from quantkit.formats.gguf.reader import GgufHeader
from quantkit.lora.adapter import Adapter
from quantkit.model.skeleton import Skeleton
from tests.helpers.cli import refused, run

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 5251576\n"
)
BOM = b"\xef\xbb\xbf"


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model, with changes to its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_in_a_model(tmp_path: Path, name: str) -> None:
    directory = copied(demo_model(), tmp_path / "model")
    (directory / name).write_text(POINTER)
    message = refused(2, "quantize", "rtn-w4-g128", "-m", directory, "-o", tmp_path / "out")
    assert f"{name} is a Git LFS pointer" in message and "git lfs pull" in message
    assert not (tmp_path / "out").exists()


def test_a_git_lfs_pointer_in_a_shard_an_adapter_and_a_gguf(tmp_path: Path) -> None:
    shard = tmp_path / "model-00001-of-00001.safetensors"
    (tmp_path / "config.json").write_text("{}")
    shard.write_text(POINTER)
    index = {"metadata": {}, "weight_map": {"a": shard.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{shard.name} is a Git LFS pointer"):
        Checkpoint(tmp_path)
    adapter = shutil.copytree(demo_adapter(), tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        Adapter.open(adapter)
    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(InputError, match=r"m\.gguf is a Git LFS pointer"):
        GgufHeader([tmp_path / "m.gguf"])


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("config.json", AutoConfig),
        ("tokenizer_config.json", AutoTokenizer),
        ("tokenizer.json", AutoTokenizer),
        ("generation_config.json", GenerationConfig),
    ],
)
def test_a_byte_order_mark_is_refused_as_transformers_does(
    tmp_path: Path, name: str, oracle: Any
) -> None:
    directory = copied(demo_model(), tmp_path / "model")
    (directory / name).write_bytes(BOM + (directory / name).read_bytes())
    with pytest.raises((OSError, json.JSONDecodeError)):
        oracle.from_pretrained(directory)
    for recipe in ("rtn-w4-g128", "gguf-q8-0"):
        message = refused(2, "quantize", recipe, "-m", directory, "-o", tmp_path / "out")
        assert f"{name} begins with a byte order mark" in message
    message = refused(2, "merge", directory, demo_adapter(), "-o", tmp_path / "out")
    assert f"{name} begins with a byte order mark" in message
    if name.startswith("tokenizer"):
        with pytest.raises(InputError, match="begins with a byte order mark"):
            load_tokenizer(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_utf_16_is_named(tmp_path: Path, name: str) -> None:
    directory = copied(demo_model(), tmp_path / "model")
    (directory / name).write_text((directory / name).read_text(), encoding="utf-16")
    message = refused(2, "quantize", "rtn-w4-g128", "-m", directory, "-o", tmp_path / "out")
    assert f"{name} is in UTF-16" in message


def test_a_byte_order_mark_in_an_adapter_is_refused_as_peft_does(tmp_path: Path) -> None:
    adapter = shutil.copytree(demo_adapter(), tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_bytes(BOM + config.read_bytes())
    with pytest.raises(json.JSONDecodeError):
        PeftConfig.from_pretrained(str(adapter))
    with pytest.raises(InputError, match=r"adapter_config\.json begins with a byte order mark"):
        Adapter.open(adapter)


def test_a_template_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(BOM + b"{{ messages }}")
    check_sidecars(tmp_path)  # transformers reads it, mark and all


def test_directories_that_are_no_checkpoints(tmp_path: Path) -> None:
    message = refused(2, "quantize", "nf4", "-m", demo_adapter(), "-o", tmp_path / "out")
    assert "is a LoRA adapter, not a model" in message and "--adapter" in message
    with_config = shutil.copytree(demo_adapter(), tmp_path / "with config")
    shutil.copy(demo_model() / "config.json", with_config)
    assert "is a LoRA adapter, not a model" in refused(2, "inspect", with_config)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model-Q4_K_M.gguf").write_bytes(b"")
    message = refused(2, "merge", gguf, demo_adapter(), "-o", tmp_path / "out")
    assert "holds a model in GGUF (model-Q4_K_M.gguf)" in message
    message = refused(2, "quantize", "nf4", "-m", gguf / "model-Q4_K_M.gguf", "-o", "x")
    assert "is a model in GGUF" in message
    cached = tmp_path / "models--me--demo"
    shutil.copytree(demo_model(), cached / "snapshots" / ("0" * 40))
    message = refused(2, "quantize", "nf4", "-m", cached, "-o", tmp_path / "out")
    assert f"Pass {cached}/snapshots/{'0' * 40}." in message
    trained = tmp_path / "trained"
    shutil.copytree(demo_model(), trained / "checkpoint-500")
    assert "Pass" in refused(2, "inspect", trained) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "auto"}, "dtype is 'auto'"),
        ({"dtype": None, "torch_dtype": "torch.bfloat16"}, "torch_dtype is 'torch.bfloat16'"),
        ({"dtype": "nn"}, "dtype is 'nn'"),
        ({"dtype": None, "torch_dtype": "auto"}, "torch_dtype is 'auto'"),
        ({"vocab_size": "1024"}, "Validation error for field 'vocab_size'"),
        ({"hidden_size": 256.0}, "Validation error for field 'hidden_size'"),
        ({"rms_norm_eps": "1e-6"}, "Validation error for field 'rms_norm_eps'"),
    ],
)
def test_values_that_transformers_refuses(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    directory = copied(demo_model(), tmp_path / "model", **changes)
    with pytest.raises(Exception):  # noqa: B017 (of classes that aren't ValueError)
        AutoConfig.from_pretrained(directory)
    with pytest.raises(InputError, match=message) as caught:
        Skeleton(Checkpoint(directory))
    assert caught.value.fix


def test_the_older_name_of_the_dtype_is_overruled(tmp_path: Path) -> None:
    directory = copied(demo_model(), tmp_path / "model", torch_dtype="auto")
    expected = AutoConfig.from_pretrained(directory).dtype
    assert Skeleton(Checkpoint(directory)).model.dtype == expected == torch.bfloat16


@pytest.mark.parametrize("empty", [{}, None, []])
def test_an_empty_quantization_config_is_none(tmp_path: Path, empty: object) -> None:
    write_config(tmp_path, {"quantization_config": empty}, None)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    write_config(tmp_path, {"quantization_config": empty}, {"bits": 4})
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"bits": 4}


@pytest.mark.parametrize("key", ["layers.1.mlp.down_proj", "layers.3.self_attn.q_proj", "norm"])
def test_values_beyond_the_float16_of_the_config(tmp_path: Path, key: str) -> None:
    directory = copied(demo_model(), tmp_path / "model", dtype="float16")
    file, key = directory / "model.safetensors", f"model.{key}.weight"
    tensors = load_file(file)
    tensors[key].view(-1)[0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(2, "quantize", "rtn-w4-g128", "-m", directory, "-o", tmp_path / "out")
    assert key in message and "float16, the dtype in config.json, can't hold" in message
    tensors[key].view(-1)[0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(2, "quantize", "rtn-w4-g128", "-m", directory, "-o", tmp_path / "out")
    assert f"{key} holds NaN or infinity" in message


@pytest.mark.parametrize("pattern", ["*embed_tokens*", "model.norm", "*layers.0.self_attn.*"])
def test_ignore_may_name_any_module_and_overrides_only_linears(
    tmp_path: Path, pattern: str
) -> None:
    ignore = ("--set", f'quantize.ignore=["lm_head", "{pattern}"]')
    out = tmp_path / "out"
    made = run("quantize", "rtn-w4-g128", *ignore, "-m", "demo", "-o", out, "--dry-run")
    assert made.exit_code == 0, made.output
    absent = ("--set", 'quantize.ignore=["*no_such_module*"]')
    assert "matches no" in refused(
        2, "quantize", "rtn-w4-g128", *absent, "-m", "demo", "-o", out, "--dry-run"
    )
