"""A tokenizer whose packages lack: the package that its file needs is named, not another one."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import pytest

from quantkit.base.errors import MachineError
from quantkit.base.resources import demo_model
from quantkit.checkpoint import tokenizer_files
from quantkit.checkpoint.tokenizer_files import check_packages
from tests.helpers.cli import refused

# The first piece of SentencePiece's ModelProto, and tokens of tiktoken's files.
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "there", "lacking"),
    [
        ("tokenizer.model", SENTENCEPIECE, (), "sentencepiece protobuf"),
        ("tokenizer.model", SENTENCEPIECE, ("sentencepiece",), "protobuf"),
        ("spiece.model", SENTENCEPIECE, ("google.protobuf",), "sentencepiece"),
        ("tokenizer.model", TIKTOKEN, ("sentencepiece", "google.protobuf"), "tiktoken"),
        ("tokenizer.model", SENTENCEPIECE, ("sentencepiece", "google.protobuf"), None),
        ("tokenizer.model", TIKTOKEN, ("tiktoken",), None),
        ("tokenizer.model", POINTER, (), None),
        ("tokenizer.model", b"", (), None),
    ],
)
def test_the_package_that_lacks_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    there: tuple[str, ...],
    lacking: str | None,
) -> None:
    monkeypatch.setattr(tokenizer_files, "_is_there", lambda module: module in there)
    (tmp_path / name).write_bytes(content)
    if lacking is None:
        check_packages(tmp_path)
        return
    with pytest.raises(MachineError) as caught:
        check_packages(tmp_path)
    assert str(caught.value.fix).startswith(f"pip install {lacking},")
    (tmp_path / "tokenizer.json").write_text("{}")  # is read instead
    check_packages(tmp_path)


@pytest.mark.parametrize("recipe", ["gptq-w4-g128", "gguf-q8-0"])
def test_quantize_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setattr(tokenizer_files, "_is_there", lambda module: False)
    model = tmp_path / "model"
    shutil.copytree(demo_model(), model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(SENTENCEPIECE)
    said = refused(3, "quantize", recipe, "--model", model, "--out", tmp_path / "out", "--no-cache")
    assert "pip install sentencepiece protobuf" in said and "tiktoken" not in said
