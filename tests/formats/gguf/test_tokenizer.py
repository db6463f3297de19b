"""Vocabularies: what is written, and pre-tokenizers chosen by what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.base.errors import InputError, MachineError
from quantkit.formats.gguf import vocabulary
from quantkit.formats.gguf.tokenizer import plan_tokenizer
from quantkit.formats.gguf.vocabulary import TokenType
from tests.helpers.gguf_tiny import GPT2, LLAMA3, QWEN2, VOCABULARY, change, checkpoint

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("gguf-model"), num_hidden_layers=1)


def metadata_of(
    directory: Path, pre_tokenizer: str | None = None, size: int = VOCABULARY
) -> dict[str, Any]:
    return plan_tokenizer(directory, size, "tiny", pre_tokenizer).metadata


def split_by(regex: str) -> dict[str, object]:
    """A byte-level pre-tokenizer of tokenizer.json."""
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [step, {**level, "trim_offsets": True}]}


@pytest.mark.parametrize(("split", "name"), [(GPT2, "gpt-2"), (QWEN2, "qwen2"), (LLAMA3, "gpt-4o")])
@pytest.mark.parametrize("bos", [False, True])
def test_byte_level_tokenizer(tmp_path: Path, split: str, name: str, bos: bool) -> None:
    directory = checkpoint(tmp_path, split=split, bos=bos, num_hidden_layers=1)
    values = metadata_of(directory)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == name
    assert len(tokens) == len(types) == VOCABULARY
    assert tokens[:2] == ["<s>", "</s>"] and types[:2] == [TokenType.CONTROL] * 2
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]" and types[-1] == TokenType.UNUSED
    assert values["tokenizer.ggml.bos_token_id"] == 0
    assert values["tokenizer.ggml.eos_token_id"] == 1
    assert values["tokenizer.ggml.add_bos_token"] is bos
    assert values["tokenizer.ggml.add_eos_token"] is False
    assert values["tokenizer.chat_template"].startswith("{% for m in")
    assert all(merge.count(" ") == 1 for merge in values["tokenizer.ggml.merges"])


def test_every_token_that_ends_a_generation_is_named(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 1, 7]}')
    values = metadata_of(directory)
    ends = [values[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert ends == [1, 5, 7]
    (directory / "generation_config.json").unlink()
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    change_config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(change_config))
    with pytest.raises(InputError, match="names no EOS"):
        metadata_of(directory)


def test_tokenizers_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    path = directory / "tokenizer.json"
    good = json.loads(path.read_text())

    def refused(match: str, **changes: object) -> None:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(InputError, match=match):
            metadata_of(directory)

    unlike = "no pre-tokenizer that splits text as this tokenizer does"
    refused(unlike, normalizer={"type": "Lowercase"})
    refused(unlike, pre_tokenizer=None)
    refused(unlike, pre_tokenizer={"type": "Whitespace"})
    refused("tokenizers library can't read it", model={"type": "BPE"})
    wordpiece = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##"}
    more = {"max_input_chars_per_word": 100, "vocab": {"<unk>": 2}}
    refused("a WordPiece tokenizer can't be written", model={**wordpiece, **more})
    refused(unlike, pre_tokenizer=split_by(r"\w+"))
    # The id that it names is unused, and gets this text as a placeholder.
    first = max(good["model"]["vocab"].values()) + 1
    twice = {"id": first, "content": "[PAD500]", "special": False, "normalized": False}
    twice |= {"single_word": False, "lstrip": False, "rstrip": False}
    refused("is the text of two ids", added_tokens=[*good["added_tokens"], twice])
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        path.write_text(json.dumps(good))
        metadata_of(directory, size=100)
    path.unlink()
    with pytest.raises(InputError, match="has no tokenizer, and a GGUF file must hold one"):
        metadata_of(directory)


def test_sentencepiece_scores_order_the_merges(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, split=None, num_hidden_layers=1)
    values = metadata_of(directory)
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    score = dict(zip(tokens, values["tokenizer.ggml.scores"], strict=True))
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert types[:3] == [3, 3, 2] and types[3:259] == [TokenType.BYTE] * 256
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    results = [score["".join(merge)] for merge in merges]
    assert results == sorted(results, reverse=True) and len(merges) > 30


def test_an_override_is_taken_unproven(model: Path, tmp_path: Path) -> None:
    directory = change(model, tmp_path)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "normalizer": {"type": "Lowercase"}}))
    values = metadata_of(directory, "dbrx")
    assert values["tokenizer.ggml.pre"] == "dbrx"
    with pytest.raises(InputError, match="knows no pre-tokenizer 'dbrxx'"):
        metadata_of(directory, "dbrxx")
    spm = checkpoint(tmp_path, split=None, num_hidden_layers=1)
    with pytest.raises(InputError, match="one pre-tokenizer, default, not dbrx"):
        metadata_of(spm, "dbrx")
    values = metadata_of(spm, "default")
    assert values["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("split", "name"), [(QWEN2, "qwen2"), (LLAMA3, "gpt-4o"), (QWEN2.replace("{L}", "{Lu}"), None)]
)
def test_what_the_regex_does_is_found_on_the_same_vocabulary(
    model: Path, tmp_path: Path, split: str, name: str | None
) -> None:
    directory = change(model, tmp_path)
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    data["pre_tokenizer"] = split_by(split)
    path.write_text(json.dumps(data))
    if name is None:
        with pytest.raises(InputError, match="no pre-tokenizer that splits text"):
            metadata_of(directory)
    else:
        assert metadata_of(directory)["tokenizer.ggml.pre"] == name


def test_without_llama_cpp(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "load_library", lambda symbols: None)
    vocabulary.llama_library.cache_clear()
    with pytest.raises(MachineError, match="isn't installed"):
        metadata_of(model)
    values = metadata_of(model, "gpt-2")
    assert values["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stated", [False, True])
def test_bos_is_added_where_transformers_adds_it(tmp_path: Path, bos: bool, stated: bool) -> None:
    from transformers import AutoTokenizer

    directory = checkpoint(tmp_path, bos=bos, num_hidden_layers=1)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": stated}))
    values = metadata_of(directory)
    added = AutoTokenizer.from_pretrained(directory).encode("a")[0] == 0
    assert values["tokenizer.ggml.add_bos_token"] is added is bos
    assert values["tokenizer.ggml.add_eos_token"] is False
