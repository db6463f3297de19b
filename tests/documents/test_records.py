"""A file of texts is read by its content: any shape, any name, any packing, with a mark or not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.base.errors import InputError
from quantkit.documents.dataset import digest_of, read_dataset
from quantkit.documents.records import read_records
from tests.helpers.cli import refused, run

TEXTS = ["The cat, it is said, is black.", 'A "white" owl;\nand its song: Uhu', "Лиса — рыжая."]
OBJECTS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(value) + "\n" for value in OBJECTS)
MARK = b"\xef\xbb\xbf"


def pandas(method: str, **options: Any) -> Callable[[], bytes]:
    """What pandas writes of the texts, by one of its ``to_`` methods."""

    def write() -> bytes:
        frame = pytest.importorskip("pandas").DataFrame(OBJECTS)
        written = getattr(frame, f"to_{method}")(**options)
        return written if isinstance(written, bytes) else str(written).encode()

    return write


def zstd() -> bytes:
    return bytes(pytest.importorskip("pyarrow").Codec("zstd").compress(LINES.encode()))


SHAPES: list[tuple[str, str, bytes | Callable[[], bytes]]] = [
    # name, what the output says of it, content
    ("lines.jsonl", "JSON lines", LINES.encode()),
    ("lines.JSONL", "JSON lines", MARK + LINES.encode()),
    ("lines.ndjson", "JSON lines", LINES.replace("\n", "\r\n\r\n").encode()),
    ("twice.txt", "JSON lines", LINES.encode("utf-16")),  # as PowerShell's > writes it
    ("strings.jsonl", "JSON lines", "".join(json.dumps(t) + "\n" for t in TEXTS).encode()),
    ("array.json", "a JSON array", json.dumps(OBJECTS, indent=2).encode()),
    ("array.txt", "a JSON array", MARK + json.dumps(TEXTS).encode()),
    ("within.json", "a JSON array in an object", json.dumps({"v": 1, "data": OBJECTS}).encode()),
    ("jq.json", "JSON values", "\n".join(json.dumps(o, indent=2) for o in OBJECTS).encode()),
    ("columns.json", "a JSON object of columns", pandas("json")),
    ("records.json", "a JSON array", pandas("json", orient="records")),
    ("table.csv", "CSV (columns: id, text)", pandas("csv", index=False)),
    ("index.csv", "CSV (columns: id, text)", pandas("csv")),
    ("europe.txt", "CSV (columns: id, text)", pandas("csv", sep=";", index=False)),
    ("table.tsv", "tab-separated (columns: id, text)", pandas("csv", sep="\t", index=False)),
    ("one", "CSV (columns: text)", pandas("csv", index=False, columns=["text"])),
    ("table.parquet", "Parquet", pandas("parquet")),
    ("table.data", "Parquet", pandas("parquet")),
    ("lines.jsonl.gz", "JSON lines, packed by gzip", gzip.compress(LINES.encode())),
    ("lines.1", "JSON lines, packed by bzip2", bz2.compress(LINES.encode())),
    ("lines.2", "JSON lines, packed by xz", lzma.compress(LINES.encode())),
    ("lines.zst", "JSON lines, packed by zstd", zstd),
    ("packed.csv.gz", "CSV (columns: text), packed by gzip", b""),
]


@pytest.mark.parametrize(("name", "shape", "content"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_every_shape_gives_the_same_documents(
    tmp_path: Path, name: str, shape: str, content: bytes | Callable[[], bytes]
) -> None:
    data = content if isinstance(content, bytes) else content()
    if name == "packed.csv.gz":
        data = gzip.compress(pandas("csv", index=False, columns=["text"])())
    path = tmp_path / name
    path.write_bytes(data)
    texts = read_dataset(path)
    assert [document.content for document in texts.documents] == TEXTS
    assert texts.found == f"{name}: {shape}, 3 documents of text"
    assert texts.digest == digest_of(path)


@pytest.mark.parametrize(
    "text",
    [
        "[Chorus]\nLa la la\n\n[Verse 2]\nLo lo\n",
        "{{ user }} says hello.\n",
        "[1] See below.\n[2] See above.\n",
        "[ ] milk\n[x] bread\n",
        '{"a": 1}\nThis object has one key.\nIt is the shortest of them.\nSo much for it.\n',
        "[INST] Hello [/INST] Hi\n" * 3,
    ],
)
def test_a_text_that_begins_with_a_bracket_is_text_and_the_output_says_so(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "song.txt"
    path.write_bytes(MARK + text.encode())
    texts = read_dataset(path)
    assert [document.content for document in texts.documents] == [text]
    assert texts.found == (
        f"song.txt: plain text (it begins with {text[0]}, but isn't JSON), 1 document"
    )


@pytest.mark.parametrize(
    "text", ['"Hello," she said.\n"Go," he said.\n', "Text\nand more\n", "a,b\n"]
)
def test_other_texts_are_one_document_as_they_are(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert [d.content for d in read_dataset(path).documents] == [text]


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.jsonl", LINES + '{"text": "x\n' + LINES, ":4", "Unterminated string starting at col"),
        ("a.txt", LINES + "[1, 2\n{]\n", ":4", "isn't valid JSON"),
        ("a.txt", '{"text": "x\n', ":1", "Invalid control character at column 12"),
        ("a.json", json.dumps(OBJECTS, indent=1)[:-9], ":12", 'the line is ""text": "'),
        ("a.txt", LINES.replace("\n", ",\n"), ":1", "a comma follows a value"),
        ("a", "{'text': 'x'}\n{'text': 'y'}\n", ":1", "Python prints objects so"),
        ("a.jsonl", "Hello\nthere\n", "", 'holds no JSON that can be used; its first line is "Hel'),
        ("a.json", "<!doctype html>\n<p>", "", 'its first line is "<!doctype html>"'),
        ("a.csv", "review,stars\nGood,5\n", "", 'its first line is "review,stars"'),
        ("a.csv", "text,n\nOne, two,3\n", ":2", "has 3 fields, the first line 2"),
        ("a.csv", 'text,n\n"One,3\n', "", "is a double quote left open?"),
        ("a.json", '{"model_type": "llama"}', ":1", 'it begins with "{"model_type": "llama"}"'),
        ("a.json", '[{"x": 1}, {"x": 2}]', " entry 1", 'messages", "conversations", "instruction"'),
        ("a.jsonl", LINES + '{"txt": "x"}\n', ":4", "but txt"),
        ("a.jsonl", '{"text": 5}\n', ":1", "has text: 5, which is neither text"),
        ("a.jsonl", '{"text": ""}\n{"text": " \\n"}\n', "", "holds only blank records"),
        ("a.jsonl", '{"text": "x", "n": ' + "9" * 5000 + "}\n", ":1", "4300 digits"),
        ("a.json", "[" * 50_000, ":1", "nested too deeply"),
        ("a.txt", " \n\t", "", "is empty"),
        ("a.txt", b"caf\xe9", "", "can't be read as UTF-8 text (unexpected end of data in line 1)"),
        ("a.txt", "Hello there".encode("utf-16-le"), "", "holds binary data"),
        ("a.gz", gzip.compress(b"Hello there" * 9)[:-9], "", "its gzip data is damaged or cut sh"),
        ("a.parquet", b"PAR1" + b"\x00" * 40, "", "can't be read as Parquet"),
        ("a.jsonl", b"PK\x03\x04\x80", "", "is a zip archive, and no text"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "", "a Git LFS pointer"),
        ("a.jsonl", b'{"te\x1b[31mxt": 1}', ":1", 'the line is "{"te\\x1b[31mxt": 1}"'),
    ],
)
def test_what_can_not_be_used_is_refused_by_its_line(
    tmp_path: Path, name: str, content: str | bytes, where: str, what: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_dataset(path)
    assert caught.value.where == f"{path}{where}" and what in caught.value.what


def test_blank_documents_and_marks_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    blank = ['{"text": ""}', '{"text": null}', '{"messages": []}', '{"text": NaN}']
    marked = '{"text": "\\ufeffOne"}'
    path.write_bytes(MARK + marked.encode() + b"\n" + MARK + "\n".join(blank).encode())
    texts = read_dataset(path)
    assert [document.content for document in texts.documents] == ["One"]
    assert texts.found == "a.jsonl: JSON lines, 1 document of text; 4 blank ones dropped"
    path = tmp_path / "a.csv"
    path.write_text("text,label\nOne,1\n,2\n", encoding="utf-8-sig")
    assert read_dataset(path).found.endswith("1 document of text; 1 blank one dropped")


def test_a_pipe_is_read_once_and_asked_twice(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.write(writes, gzip.compress(LINES.encode()))
    os.close(writes)
    path = Path(f"/dev/fd/{reads}")
    assert read_records(path).shape == "JSON lines, packed by gzip"
    assert len(read_dataset(path).documents) == 3
    assert read_dataset(path).digest == digest_of(path)
    os.close(reads)


def test_the_commands_say_what_they_found(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = "".join(f'"The cat, number {n}, is black.",{n}\n' for n in range(40))
    path.write_text(f"text,label\n{rows},41\n")
    small = ("--set", "calibration.samples=1", "--set", "calibration.sequence_length=16")
    recipe = ("gptq-w4-g128", "--model", "demo", "--no-cache", *small)
    made = run("quantize", *recipe, "--set", f"calibration.dataset={path}", "-o", tmp_path / "out")
    found = "mine.csv: CSV (columns: text, label), 40 documents of text; 1 blank one dropped"
    assert made.exit_code == 0 and f"calibration text: {found}" in made.stderr
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "schema: 1\nname: s\nversion: 1.0.0\n"
        "likelihood: {dataset: mine.csv, sequence_length: 16, rows: 2}\n"
    )
    assert f"likelihood: {found};" in run("suite", "check", suite).stdout
    judged = run(
        "eval", tmp_path / "out", "--baseline", "demo", "--suite", suite, "--allow-overlap"
    )
    assert judged.exit_code == 0 and f"likelihood text: {found}" in judged.stderr
    assert "is a folder" in refused(
        *(2, "quantize", *recipe, "--set", f"calibration.dataset={tmp_path}", "-o", tmp_path / "x")
    )
