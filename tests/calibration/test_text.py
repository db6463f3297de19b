"""Rows of tokens: what they begin with, and what lies in them, beside transformers' own ids."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from quantkit.artifact.manifest import read_manifest
from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.calibration.text import beginning_of, count_tokens, load_tokenizer, pack_rows
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.vocabulary import llama_library
from quantkit.results.manifest import QuantizedManifest
from tests.helpers.cli import run
from tests.helpers.gguf_tiny import checkpoint
from tests.helpers.llama_vocabulary import llama_vocabulary
from tests.helpers.present import present

BOS, EOS = 0, 1
TEXTS = ["The quick brown fox", "In 1998 there were 12345 foxes", "Köln, naïve café " * 4, "def a"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma with a tokenizer of SentencePiece's kind that puts BOS first."""
    directory = tmp_path_factory.mktemp("gemma")
    return checkpoint(directory, model_type="gemma", split=None, bos=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def packed(path: Path, tokenizer: Any, length: int = 8, *, bos: bool = True) -> list[list[int]]:
    rows = pack_rows(path, tokenizer, sequence_length=length, rows=None, seed=None, bos=bos)
    table: list[list[int]] = rows.ids.tolist()
    return table


def cut(documents: list[list[int]], length: int, begin: list[int]) -> list[list[int]]:
    """Rows of documents, of which each has its own beginning: the rule, said once more."""
    stream = [(id_, place) for ids in documents for place, id_ in enumerate(ids)]
    rows: list[list[int]] = []
    while stream:
        row = [] if stream[0][1] == 0 else list(begin)
        room = length - len(row)
        row, stream = row + [id_ for id_, _ in stream[:room]], stream[room:]
        rows.append(row)
    return [row for row in rows if len(row) == length]


def test_rows_and_documents_begin_as_the_tokenizer_begins_a_text(gemma: Path, data: Path) -> None:
    tokenizer = load_tokenizer(gemma)
    assert beginning_of(tokenizer) == [BOS]
    own = [[*tokenizer(text)["input_ids"], EOS] for text in TEXTS]  # transformers puts BOS first
    assert all(ids[0] == BOS for ids in own)
    for length in (8, 13, 30):
        rows = packed(data, tokenizer, length)
        assert rows == cut(own, length, [BOS]) and all(row[0] == BOS for row in rows)
    assert count_tokens(data, tokenizer, bos=True) == sum(map(len, own))
    without = packed(data, tokenizer, bos=False)
    assert not any(BOS in row for row in without)  # what published recipes do
    assert list(chain(*without)) == [i for ids in own for i in ids[1:]][: 8 * len(without)]
    limited = pack_rows(data, tokenizer, sequence_length=8, rows=2, seed=None, bos=True)
    assert limited.ids.tolist() == packed(data, tokenizer)[:2]
    assert limited.beginning == ("<s>",) and limited.remark is None
    assert limited.found.endswith("4 documents of text; rows begin with <s>")


def chat_with_bos(tokenizer: Any) -> list[int]:
    tokenizer.chat_template = TEMPLATE
    return [BOS]


def chat_without_bos(tokenizer: Any) -> list[int]:
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "").replace("{{ eos_token }}", "")
    return [BOS]


def bos_is_eos(tokenizer: Any) -> list[int]:
    """As in OPT."""
    tokenizer.eos_token = "<s>"
    return [BOS]


def two_tokens(tokenizer: Any) -> list[int]:
    """As in ChatGLM."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> <s> $A", special_tokens=[("<s>", BOS), ("<unk>", 2)]
    )
    return [2, BOS]


def eos_too(tokenizer: Any) -> list[int]:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return [BOS]


@pytest.mark.parametrize(
    "change", [chat_with_bos, chat_without_bos, bos_is_eos, two_tokens, eos_too]
)
def test_other_tokenizers_and_templates(
    tmp_path: Path, gemma: Path, data: Path, change: Callable[[Any], list[int]]
) -> None:
    tokenizer, path = load_tokenizer(gemma), data
    begin = change(tokenizer)
    assert beginning_of(tokenizer) == begin
    own = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    if change in (chat_with_bos, chat_without_bos):
        path = tmp_path / "chats.jsonl"
        chats = [[{"role": "user", "content": text}] for text in TEXTS]
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        own = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    if change is chat_without_bos:
        # A chat is as its template writes it; a row begins as the tokenizer begins a text.
        rows, stream = packed(path, tokenizer), [id_ for ids in own for id_ in [*ids, EOS]]
        assert rows == [[BOS, *stream[start : start + 7]] for start in range(0, len(stream) - 6, 7)]
        return
    if change is two_tokens:
        own = [[*ids, EOS] for ids in own]
    ends = EOS if change is not bos_is_eos else None
    assert ends is None or all(ids[-1] == EOS != ids[-2] for ids in own)  # one, never two
    assert packed(path, tokenizer) == cut(own, 8, begin)


def test_a_tokenizer_that_adds_nothing_gives_the_same_rows(data: Path) -> None:
    tokenizer = load_tokenizer(demo_model())
    assert beginning_of(tokenizer) == []
    rows = [
        pack_rows(data, tokenizer, sequence_length=8, rows=None, seed=3, bos=bos)
        for bos in (False, True)
    ]
    assert torch.equal(rows[0].ids, rows[1].ids) and rows[0].found == rows[1].found
    assert [r.beginning for r in rows] == [None, ()] and [r.remark for r in rows] == [None, None]


def test_rows_without_room_for_the_beginning_are_refused(gemma: Path, data: Path) -> None:
    tokenizer = load_tokenizer(gemma)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> " * 9 + "$A", special_tokens=[("<s>", BOS)]
    )
    with pytest.raises(InputError, match="begins every text with 9 tokens"):
        packed(data, tokenizer)


def test_perplexity_is_that_of_transformers_on_rows_that_begin_with_bos(
    tmp_path: Path, gemma: Path
) -> None:
    text, suite = tmp_path / "held.txt", tmp_path / "suite.yaml"
    text.write_text("The quick brown fox jumps over 12345 lazy dogs. " * 12)
    dataset = "likelihood: {dataset: held.txt, sequence_length: 16"
    suite.write_text(f"schema: 1\nname: s\nversion: 1.0.0\n{dataset}, bos: true}}\n")
    model = AutoModelForCausalLM.from_pretrained(gemma).eval()
    bare = load_tokenizer(gemma)(text.read_text(), add_special_tokens=False)["input_ids"] + [EOS]
    rows = torch.tensor([[BOS, *bare[i : i + 15]] for i in range(0, len(bare) - 14, 15)])
    with torch.inference_mode():
        expected = math.exp(model(rows, labels=rows).loss.item())

    out = tmp_path / "q8"
    recipe = ("gguf-q4-k-m", "--set", "quantize.mix=q8_0", "--set", f"calibration.dataset={text}")
    small = [f"calibration.{key}" for key in ("samples=4", "sequence_length=16", "bos=true")]
    settings = [part for setting in small for part in ("--set", setting)]
    made = run("quantize", *recipe, *settings, "--model", gemma, "--out", out, "--no-cache")
    assert made.exit_code == 0, made.output
    manifest = read_manifest(out)
    assert isinstance(manifest, QuantizedManifest)
    assert present(manifest.calibration).beginning == ("<s>",)
    # llama.cpp begins a text in the same way, by the file's own metadata.
    (path,) = out.glob("*.gguf")
    assert read_header(path).metadata["tokenizer.ggml.add_bos_token"] is True
    with llama_vocabulary(path) as vocabulary:
        adds_bos = llama_library().llama_vocab_get_add_bos
        adds_bos.argtypes, adds_bos.restype = [ctypes.c_void_p], ctypes.c_bool
        assert adds_bos(vocabulary.handle) is True

    arguments = ("eval", out, "--baseline", gemma, "--suite", suite, "--allow-overlap", "--json")
    value = json.loads(run(*arguments).stdout)
    qualities = [value["baseline"]["quality"], value["variants"][0]["quality"]]
    assert qualities[0]["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert [quality["beginning"] for quality in qualities] == [["<s>"]] * 2
    assert qualities[1]["kl_divergence"]["mean"] < 0.01
    suite.write_text(f"schema: 1\nname: s\nversion: 1.0.0\n{dataset}}}\n")
    value = json.loads(run(*arguments).stdout)
    assert "beginning" not in value["baseline"]["quality"]
    assert any("set likelihood.bos to true" in text for text in value["differences"])
