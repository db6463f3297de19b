"""The header is read as gguf-py reads it, and every damage is an error that names the file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.reader import GgufHeader
from quantkit.formats.gguf.writer import write_bf16

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("header") / "model.gguf"
    write_bf16(path, Checkpoint(demo_model()))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def file_of(path: Path, *pairs: bytes, version: int = 3, keys: int | None = None) -> Path:
    """A file without tensors, of these keys and values."""
    counts = struct.pack("<IQQ", version, 0, len(pairs) if keys is None else keys)
    path.write_bytes(b"GGUF" + counts + b"".join(pairs))
    return path


def test_it_is_what_gguf_py_reads(demo: Path) -> None:
    reader, header = gguf.GGUFReader(demo), read_header(demo)
    fields = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: field.contents() for key, field in fields.items()}
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 1024
    entries = GgufHeader([demo]).entries
    assert [
        (entry.name, entry.type, list(reversed(entry.shape)), entry.offset, entry.nbytes)
        for entry in entries
    ] == [
        (t.name, t.tensor_type.name, t.shape.tolist(), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]


def test_every_type_of_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    values = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60_000,
        "int16": -30_000,
        "uint32": 4_000_000_000,
        "int32": -2_000_000_000,
        "float32": 0.5,
        "bool": True,
        "string": "ä",
        "uint64": 1 << 63,
        "int64": -(1 << 62),
        "float64": 0.1,
    }
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("texts", ["a", "", "ö"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("switches", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_header(tmp_path / "all.gguf").metadata
    assert metadata == {
        "general.architecture": "llama",
        **values,
        "texts": ["a", "", "ö"],
        "numbers": [1, -2, 3],
        "switches": [True, False],
    }
    assert metadata["bool"] is True and metadata["switches"][1] is False


@pytest.mark.parametrize("size", [0, 3, 10, 30, 400, 5000])
def test_a_file_that_ends_within_its_header(demo: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(demo.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.gguf isn't a readable GGUF file"):
        read_header(path)


def test_a_file_that_ends_within_a_tensor(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(demo.read_bytes()[:-1])
    last = GgufHeader([demo]).entries[-1].name
    with pytest.raises(InputError, match=f"it ends within {last}"):
        GgufHeader([path])


NUMBER = text("a") + struct.pack("<IB", 0, 1)


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([NUMBER, NUMBER], {}, "a is there twice"),
        ([], {"version": 1}, "version 1"),
        ([NUMBER], {"keys": 1 << 62}, "ends within its header"),
        ([text("a") + struct.pack("<IQ", 8, 1 << 62)], {}, "ends within its header"),
        ([text("a") + struct.pack("<IIQ", 9, 12, 1 << 62)], {}, "ends within its header"),
        ([text("a") + struct.pack("<I", 77)], {}, "77"),
        ([text("general.alignment") + struct.pack("<II", 4, 24)], {}, "not a power of two"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, pairs: list[bytes], settings: dict[str, int], message: str
) -> None:
    path = file_of(tmp_path / "model.gguf", *pairs, **settings)
    with pytest.raises(InputError, match=message):
        read_header(path)
