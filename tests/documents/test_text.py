"""Text that no tokenizer reads, and messages that aren't any, are refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit.base.errors import InputError
from quantkit.base.files import read_json, write_json
from quantkit.documents.dataset import read_dataset
from quantkit.documents.text import lone_surrogate
from quantkit.judging.cases import load_cases
from tests.helpers.cli import refused

GOOD = '{"text": "a whole owl: \\ud83e\\udd89"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "half \\ud83e"}', r"\ud83e is half of a character, in: half \ud83e"),
        ('{"text": "\\udd89\\ud83e the wrong way round"}', r"\udd89 is half"),
        ('{"messages": [{"role": "user", "content": "é \\udfff"}]}', r"in: \xe9 \udfff"),
        ('{"messages": [{"role": "user", "content": [{"text": "\\ud800"}]}]}', r"\ud800 is half"),
        ('{"messages": ["Hello", "Hi"]}', 'messages holds "Hello", which is no object'),
        ('{"messages": [{"role": "user", "content": "a"}, null]}', "messages holds null"),
        ('{"messages": [["user", "a"]]}', 'messages holds ["user", "a"]'),
    ],
)
def test_documents(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_dataset(path)
    assert caught.value.where == f"{path}:3" and message in caught.value.what
    path.write_text(GOOD)
    assert read_dataset(path).documents[0].content == "a whole owl: 🦉"
    recipe = ("--set", f"calibration.dataset={path}", "--out", tmp_path / "out", "--no-cache")
    path.write_text(f"{line}\n")
    said = refused(2, "quantize", "gptq-w4-g128", "--model", "demo", *recipe)
    assert f"{path}:1" in said and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "case",
    [
        {"prompt": "half \ud83e"},
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"prompt": "a", "check": {"contains": "\ud800"}},
        {"prompt": "a", "tags": ["\ud800"]},
        {"prompt": "a", "id": "\ud800"},
        {"prompt": "a", "\ud800": 1},
    ],
)
def test_cases(tmp_path: Path, case: dict[str, object]) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"id": "x", "check": {"exact": "y"}, **case}) + "\n")
    with pytest.raises(InputError, match="is half of a character") as caught:
        load_cases(path)
    assert caught.value.where == f"{path}:1"


def test_what_json_holds_is_searched_whole() -> None:
    assert lone_surrogate({"a": [1, None, {"b": ("c", "🦉")}]}) is None
    assert lone_surrogate({"a": [1, None, {"b": ("c", "\udc80")}]}) == "\udc80"
    assert lone_surrogate({"\ud800": 1}) == "\ud800"


@pytest.mark.parametrize("text", ["\udcff", "a\ud83e and 🦉", "\udd89\ud83e"])
def test_json_keeps_what_utf8_can_not(tmp_path: Path, text: str) -> None:
    write_json(tmp_path / "a.json", {"goal": text})
    assert read_json(tmp_path / "a.json") == {"goal": text}
