"""Reading and writing checkpoints: exact, refused when damaged, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.base.errors import InputError, MachineError
from quantkit.base.output import check_output, new_directory
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.source import locate_model, model_name
from quantkit.checkpoint.writer import TensorWriter
from quantkit.results.manifest import MANIFEST

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
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = tmp_path / "model.safetensors.index.json"
    assert (len(files) > 1) == index.is_file()
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.keys()) == set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
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


def test_directories_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), new_directory(out) as directory:
        (directory / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with new_directory(out) as directory:
        (directory / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_directory(out):
        raise KeyboardInterrupt
    assert (out / "quantkit.json").read_text() == "old"


def test_outputs_that_must_not_be_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new", "an artifact", MANIFEST, force=False, needed=1)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path, "an artifact", MANIFEST, force=False, needed=1)
    with pytest.raises(InputError, match="isn't an artifact of ours"):
        check_output(tmp_path, "an artifact", MANIFEST, force=True, needed=1)
    (tmp_path / "quantkit.json").write_text("{}")
    check_output(tmp_path, "an artifact", MANIFEST, force=True, needed=1)


def test_too_little_disk_is_said_before_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(MachineError, match="this needs"):
        check_output(tmp_path / "new", "an artifact", MANIFEST, force=False, needed=2 * free)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(MachineError, match="can't be read or written"),
        new_directory(blocked / "out"),
    ):
        pass


def test_where_models_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (locate_model("demo") / "config.json").is_file()
    assert locate_model(str(tmp_path)) == tmp_path
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate_model("./demo") == Path("demo") and locate_model("demo") != Path("demo")
    assert model_name("owner/name@main") == "name" and model_name("demo") == "demo"
    assert model_name(str(tmp_path / "demo")) == "demo"
    with pytest.raises(InputError, match="no such directory"):
        locate_model("./nowhere")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is a file"):
        locate_model(str(file))
