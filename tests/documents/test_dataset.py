"""Data sets of the Hub, read from folders in their form: the same code, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quantkit.base.errors import InputError, MachineError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import load_tokenizer, pack_rows
from quantkit.documents.dataset import check_exists, digest_of, read_dataset, resolve_dataset
from quantkit.documents.hub import HubDataset
from quantkit.recipes.recipe import load_recipe

COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
TEXTS = ["The cat is black.", "", "  ", "The owl is white.", "The fox is red."]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "set"
    (place / "data").mkdir(parents=True)
    lines = [{"text": text, "other": "x", "number": 3} for text in TEXTS]
    (place / "data" / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    chat = [{"messages": [{"role": "user", "content": f"Hello {i}"}]} for i in range(3)]
    (place / "data" / "test.jsonl").write_text("".join(json.dumps(x) + "\n" for x in chat))
    (place / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: plain, data_files: [{split: train, path: data/train.jsonl}]}\n"
        "- {config_name: chat, data_files: [{split: test, path: data/test.jsonl}]}\n---\n"
    )
    return place


def test_rows_become_documents_and_a_digest(folder: Path) -> None:
    plain = HubDataset(hub=str(folder), config="plain")
    texts = read_dataset(plain)
    assert [d.content for d in texts.documents] == [text for text in TEXTS if text.strip()]
    assert texts.found.endswith(":plain:train:text: 3 documents of text; 2 blank ones dropped")
    assert texts.digest == digest_of(plain) and len(texts.digest) == 64
    first = read_dataset(plain.model_copy(update={"rows": 4}))  # streamed
    assert [d.content for d in first.documents] == ["The cat is black.", "The owl is white."]
    assert first.digest != texts.digest
    joined = read_dataset(plain.model_copy(update={"join": "\n\n"}))
    (document,) = joined.documents
    assert document.content == "The cat is black.\n\nThe owl is white.\n\nThe fox is red."
    assert joined.digest == texts.digest


def test_messages_go_through_the_template(folder: Path) -> None:
    chat = HubDataset(hub=str(folder), config="chat", split="test", column="messages")
    tokenizer = load_tokenizer(demo_model())
    rows = pack_rows(chat, tokenizer, sequence_length=8, rows=None, seed=None)
    assert tokenizer.decode(rows.ids[0]).startswith("<|user|>\nHello 0<|end|>")
    assert rows.digest == read_dataset(chat).digest


def test_columns_of_instructions_are_rows_in_a_known_form(folder: Path) -> None:
    """Alpaca's columns, as files may have them; the recipe names no column."""
    rows = [{"instruction": f"Add {i}.", "input": "2", "output": str(2 + i)} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "alpaca.jsonl").write_text(lines)
    readme = folder / "README.md"
    more = "- {config_name: alpaca, data_files: [{split: train, path: data/alpaca.jsonl}]}\n---\n"
    readme.write_text(readme.read_text().removesuffix("---\n") + more)
    alpaca = HubDataset(hub=str(folder), config="alpaca")
    texts = read_dataset(alpaca)
    file = read_dataset(folder / "data" / "alpaca.jsonl")
    assert [d.content for d in texts.documents] == [d.content for d in file.documents]
    assert texts.found.endswith("3 documents of instructions")
    assert texts.digest == digest_of(alpaca)
    with pytest.raises(InputError, match="has no column answer; it has instruction"):
        read_dataset(alpaca.model_copy(update={"column": "answer"}))


def test_what_can_not_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has no column nothing; it has text, other, number"):
        read_dataset(HubDataset(hub=str(folder), config="plain", column="nothing"))
    with pytest.raises(InputError, match="row 0 is neither text nor a list of chat messages"):
        read_dataset(HubDataset(hub=str(folder), config="plain", column="number"))
    with pytest.raises(InputError, match="datasets can't load it"):
        read_dataset(HubDataset(hub=str(folder), config="no such config"))
    with pytest.raises(InputError, match="no such file or folder"):
        check_exists(HubDataset(hub=str(folder / "nowhere")))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MachineError) as caught:
        check_exists(HubDataset(hub=str(folder)))
    assert caught.value.fix == "pip install 'quantkit[datasets]'"


def test_a_data_set_of_the_hub_must_be_pinned(tmp_path: Path) -> None:
    assert HubDataset(hub="owner/name", revision=COMMIT).revision == COMMIT
    for revision in (None, "main", COMMIT[:12]):
        with pytest.raises(ValidationError, match="must pin owner/name to a commit"):
            HubDataset(hub="owner/name", revision=revision)
    with pytest.raises(ValidationError, match="a folder has no revision"):
        HubDataset(hub="./here", revision=COMMIT)
    assert resolve_dataset(HubDataset(hub="../set"), tmp_path) == HubDataset(
        hub=str(tmp_path.parent / "set")
    )
    assert resolve_dataset("a.txt", tmp_path) == tmp_path / "a.txt"


def recipe_with(dataset: object, tmp_path: Path) -> str:
    import yaml

    from quantkit.base import resources

    content = yaml.safe_load((resources.recipes() / "gptq-w4-g128.yaml").read_text())
    content["calibration"]["dataset"] = dataset
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"hub": "owner/name"}, "calibration.dataset: revision must pin owner/name"),
        ({"hub": "owner/name", "revison": COMMIT}, "calibration.dataset.revison: unknown key; did"),
        ({"revision": COMMIT}, "calibration.dataset.hub is missing"),
        (3, "calibration.dataset: input should be a valid string, not 3"),
    ],
)
def test_mistakes_in_a_recipe_are_named(
    tmp_path: Path, dataset: dict[str, Any] | int, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_with(dataset, tmp_path))
    assert message in str(caught.value)


def test_a_recipe_calibrates_on_a_folder(folder: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe_with({"hub": "./set", "config": "plain"}, tmp_path))
    dataset = loaded.calibration_dataset()
    assert isinstance(dataset, HubDataset) and dataset.hub == str(folder)
    assert len(read_dataset(dataset).documents) == 3
    # paths given on the command line are relative to the working directory
    plain = load_recipe("gptq-w4-g128", ["calibration.dataset={hub: ./x}"]).calibration_dataset()
    assert isinstance(plain, HubDataset) and plain.hub.endswith("/x")
