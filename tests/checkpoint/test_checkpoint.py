"""Checkpoints are read as they were written, and refused where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import TensorWriter

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "a": torch.randn(3, 5),
    "half": torch.randn(4, 4).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "words": torch.arange(12, dtype=torch.int32).view(3, 4),
    "odd16": torch.randn(3).to(torch.float16),
}


def write(directory: Path, **options: Any) -> None:
    directory.mkdir(exist_ok=True)
    with TensorWriter(directory, TENSORS, **options) as writer:
        for name, tensor in TENSORS.items():
            writer.add({name: tensor})
    (directory / "config.json").write_text("{}")


@pytest.mark.parametrize("shard_bytes", [10**9, 64, 1])
def test_what_is_written_is_read_by_safetensors_and_by_us(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        loaded |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = tmp_path / "model.safetensors.index.json"
    assert (len(files) > 1) == index.is_file()
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    if index.is_file():
        mapping = json.loads(index.read_text())["weight_map"]
        assert {(tmp_path / name).is_file() for name in mapping.values()} == {True}


def test_a_truncated_file_is_refused_with_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for keep in (4, 100, len(whole) - 1):
        file.write_bytes(whole[:keep])
        with pytest.raises(InputError, match=r"model\.safetensors: the file is truncated"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "the header isn't JSON"),
        (b"[]", "the header isn't a JSON object"),
        (b'{"a": {"dtype": "F32"}}', "the header's entry of a is malformed"),
        (b'{"a": {"dtype": "F3", "shape": [], "data_offsets": [0, 0]}}', "unknown dtype F3"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 0]}}', "of another size"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=64)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=f"names {victim.name}, which is missing"):
        Checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InputError, match=r"only as pickle \(pytorch_model.bin\)"):
        Checkpoint(tmp_path)


def test_a_directory_without_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json isn't valid JSON"):
        Checkpoint(tmp_path)
