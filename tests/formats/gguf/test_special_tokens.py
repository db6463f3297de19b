"""Special tokens, chat templates and ends: llama.cpp on the written file beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.base.errors import InputError
from quantkit.chat.gguf import read_chat
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.export import export_ollama
from quantkit.formats.gguf.file import GgufPlan, plan_file
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.writer import write_file
from tests.helpers.gguf_tiny import LLAMA3, QWEN2, VOCABULARY
from tests.helpers.gguf_tokens import CHATML, INST, PHI3, ZEPHYR, added, with_tokens
from tests.helpers.llama_vocabulary import llama_vocabulary

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ENDS_TURNS = [added("<|im_start|>"), added("<|im_end|>")]
STRIPPING = [
    *(added(f"<|{role}|>", rstrip=True) for role in ("user", "assistant", "system", "end")),
    added("<|endoftext|>"),
]
LLAMA2 = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
NO_CLASS = {"tokenizer_class": None}
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
ALWAYS = {**FIRST, "prepend_scheme": "always"}
CHATS = (
    [{"role": "user", "content": "Does the lazy dog mind?"}],
    [{"role": "system", "content": "  Be brief."}, {"role": "user", "content": "Why?\n"}],
    [
        {"role": "user", "content": "\n\nadd(a, b)  "},
        {"role": "assistant", "content": " return a + b"},
        {"role": "user", "content": "北京?"},
    ],
)


def written(directory: Path, name: str | None = None) -> tuple[GgufPlan, Path]:
    source = Checkpoint(directory)
    plan = plan_file(source, "q8_0", name=name)
    path = directory / "model.gguf"
    write_file(path, plan, source)
    return plan, path


def differing(directory: Path, path: Path, texts: list[str]) -> list[str]:
    """The texts that llama.cpp doesn't tokenize as transformers does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    with llama_vocabulary(path) as vocabulary:
        return [
            text
            for text in texts
            if vocabulary.tokenize(text) != tokenizer.encode(text, add_special_tokens=False)
        ]


def rendered(directory: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [
        tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        for chat in CHATS
    ]


def first_space(scheme: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": None, "pre_tokenizer": scheme}


@pytest.mark.parametrize(
    ("given", "prefix"),
    [
        ({"tokens": ENDS_TURNS, "template": CHATML, "settings": LLAMA2}, False),
        ({"template": INST, "settings": LLAMA2}, False),
        ({"tokens": ENDS_TURNS, "template": CHATML, "parts": first_space(FIRST)}, False),
        ({"tokens": ENDS_TURNS, "template": CHATML, "parts": first_space(ALWAYS)}, True),
        ({"tokens": ENDS_TURNS, "template": CHATML, "settings": NO_CLASS}, True),
        ({"template": INST, "settings": NO_CLASS}, True),
        (
            {"template": INST, "settings": NO_CLASS, "model_type": "gemma", "head_dim": 96},
            False,
        ),
        ({"tokens": ENDS_TURNS, "template": CHATML, "settings": {**LLAMA2, "legacy": True}}, True),
        ({"tokens": STRIPPING, "template": PHI3, "settings": LLAMA2}, False),
        ({"tokens": STRIPPING, "template": PHI3, "model_type": "phi3", "pad_token_id": 0}, True),
        ({"tokens": STRIPPING, "template": PHI3, "split": QWEN2}, None),
        ({"tokens": ENDS_TURNS, "template": CHATML, "split": LLAMA3, "settings": NO_CLASS}, None),
    ],
)
def test_chats_have_transformers_ids(
    tmp_path: Path, given: dict[str, Any], prefix: bool | None
) -> None:
    directory = with_tokens(tmp_path, **given)
    plan, path = written(directory)
    assert plan.metadata.get("tokenizer.ggml.add_space_prefix") is prefix
    assert differing(directory, path, rendered(directory)) == []
    assert not any("chats by the model's own" in note for note in plan.notes)
    plain = ["Nobody minds", "x = [1,\n\t2]", "北京 café"]
    marked = any("put a space before such prompts" in note for note in plan.notes)
    if marked:
        assert differing(directory, path, plain) == plain
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    with llama_vocabulary(path) as vocabulary:
        for text in plain:
            got = vocabulary.tokenize(f" {text}" if marked else text)
            assert got == tokenizer.encode(text, add_special_tokens=False)


def test_the_name_decides_whether_special_tokens_drop_white_space(tmp_path: Path) -> None:
    directory = with_tokens(tmp_path, tokens=STRIPPING, template=PHI3)
    for name in ("my-model", "Phi-3-mini", "tuned-phi3"):
        plan, path = written(directory, name)
        used = plan.metadata["general.name"]
        assert used == (f"{name} (Phi-3 tokens)" if name == "my-model" else name)
        assert any(used in note for note in plan.notes) is (used != name)
        assert differing(directory, path, rendered(directory)) == []


@pytest.mark.parametrize("name", ["Phi-3-tuned", "my-phi3", "PHI3"])
def test_a_name_with_phi_3_that_llama_cpp_would_not_load(tmp_path: Path, name: str) -> None:
    # llama.cpp looks for "<|endoftext|>" then, which this vocabulary lacks.
    directory = with_tokens(tmp_path, tokens=ENDS_TURNS, template=CHATML, split=QWEN2)
    plan, path = written(directory, name)
    assert plan.metadata["general.name"] == name.replace("Phi-3", "Phi 3").replace(
        "phi3", "Phi 3"
    ).replace("PHI3", "Phi 3")
    assert differing(directory, path, rendered(directory)) == []


def test_verify_names_what_is_right_only_after_a_space(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    with_tokens(directory, tokens=ENDS_TURNS, template=CHATML, settings=LLAMA2)
    quantkit.quantize("gguf-q8-0", model=directory, out=tmp_path / "artifact")
    result = quantkit.verify(tmp_path / "artifact", baseline=directory)
    [tokens] = [check for check in result.checks if check.name == "tokens"]
    assert result.passed and tokens.passed
    assert tokens.detail.endswith("only after a space: llama.cpp marks no beginnings")


def test_added_tokens_may_be_ordinary_words(tmp_path: Path) -> None:
    lines = [added("\n\n", special=False), added("\n", special=False)]
    words = [added("hello", special=False), added("naïve", special=False, normalized=True)]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (lines, NO_CLASS),
        (words, LLAMA2),
        (words[:1], NO_CLASS),
        ([*lines, *words], LLAMA2),
    ]
    for count, (tokens, settings) in enumerate(cases):
        directory = tmp_path / str(count)
        directory.mkdir()
        with_tokens(directory, tokens=tokens, settings=settings)
        plan, path = written(directory)
        assert plan.metadata["tokenizer.ggml.add_space_prefix"] is (count < 3)
        special = ["</s>x = 1", "</s>hello"] if count == 3 else ["x = 1", "Does it mind?"]
        assert differing(directory, path, special) == []


def test_what_llama_cpp_cannot_do_is_noted_with_an_example(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "lstrip": {"tokens": [added("<|im_start|>", lstrip=True), added("<|im_end|>")]},
        "rstrip": {"tokens": [added("<|im_start|>"), added("<|im_end|>", rstrip=True)]},
        "first": {"template": ZEPHYR, "settings": LLAMA2},
    }
    for name, given in cases.items():
        directory = tmp_path / name
        directory.mkdir()
        with_tokens(directory, **{"template": CHATML, **given})
        plan, path = written(directory)
        [note] = [note for note in plan.notes if "chats by the model's own template" in note]
        assert note.startswith("llama.cpp splits 5 of 5 chats")
        assert "where it should be" in note
        assert len(differing(directory, path, rendered(directory))) == len(CHATS)


@pytest.mark.parametrize("flag", ["normalized", "single_word"])
def test_special_tokens_that_llama_cpp_sees_elsewhere_are_refused(
    tmp_path: Path, flag: str
) -> None:
    token = added("<|im_start|>", special=False, **{flag: True})
    directory = with_tokens(tmp_path, tokens=[token, added("<|im_end|>")], template=CHATML)
    with pytest.raises(InputError, match="doesn't see the special tokens of this model's chats"):
        plan_file(Checkpoint(directory), "q8_0")
    plan = plan_file(Checkpoint(directory), "q8_0", pre_tokenizer="default")
    assert any("chats by the model's own template" in note for note in plan.notes)


def test_every_chat_template_is_written(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": CHATML + "{# tools #}"},
        {"name": "rag-2", "template": INST},
    ]
    for count, templates in enumerate((named, named[1:], named[2:])):
        directory = tmp_path / str(count)
        directory.mkdir()
        with_tokens(directory, tokens=ENDS_TURNS, template=templates)
        plan, path = written(directory)
        names = [template["name"].replace("-", "_") for template in templates]
        others = sorted(set(names) - {"default"})
        assert plan.metadata["tokenizer.chat_templates"] == others
        with llama_vocabulary(path) as vocabulary:
            assert vocabulary.template() == (CHATML if count == 0 else None)
            for name, template in zip(names, templates, strict=True):
                if name != "default":
                    assert vocabulary.template(name) == template["template"]


def test_verify_and_export_know_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool-use", "template": CHATML}, {"name": "rag", "template": INST}]
    for count, default in enumerate(([], [{"name": "default", "template": CHATML}])):
        directory = tmp_path / str(count)
        directory.mkdir()
        with_tokens(directory, tokens=ENDS_TURNS, split=QWEN2, template=[*templates, *default])
        artifact = tmp_path / f"artifact-{count}"
        quantkit.quantize("gguf-q8-0", model=directory, out=artifact)
        assert quantkit.verify(artifact, baseline=directory).passed
        notes = export_ollama(artifact, out=tmp_path / f"ollama-{count}").notes
        expected = "The model has no chat template but rag, tool_use"
        assert any(note.startswith(expected) for note in notes) is (not default)


def test_a_modelfile_stops_at_every_end(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    with_tokens(directory, split=QWEN2, eos_token_id=[1, 300, 301, 302, 303])
    (directory / "generation_config.json").unlink(missing_ok=True)
    artifact = tmp_path / "artifact"
    quantkit.quantize("gguf-q8-0", model=directory, out=artifact)
    [gguf] = artifact.glob("*.gguf")
    tokens = read_header(gguf).metadata["tokenizer.ggml.tokens"]
    text = export_ollama(artifact, out=tmp_path / "ollama").path.read_text()
    assert text.count("PARAMETER stop") >= 5 and tokens[300] in text and tokens[303] in text
    assert read_chat(gguf).ends == tuple(tokens[n] for n in (1, 300, 301, 302, 303))


def test_templates_that_have_one_name_in_gguf_are_noted(tmp_path: Path) -> None:
    templates = [{"name": name, "template": CHATML + name} for name in ("a-b", "a_b", "c")]
    directory = with_tokens(tmp_path, tokens=ENDS_TURNS, split=QWEN2, template=templates)
    plan, _ = written(directory)
    assert plan.metadata["tokenizer.chat_templates"] == ["a_b", "c"]
    [note] = plan.notes
    assert "'a-b', 'a_b'" in note and "'c'" not in note


def test_ordinary_tokens_that_llama_cpp_takes_for_special_ones(tmp_path: Path) -> None:
    for number, token in enumerate(("<|end|>", "<EOT>", "<end_of_turn>")):
        directory = tmp_path / str(number)
        directory.mkdir()
        with_tokens(directory, split=QWEN2)
        path = directory / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["vocab"][token] = 400
        path.write_text(json.dumps(data))
        [note] = plan_file(Checkpoint(directory), "q8_0").notes
        assert "beside special tokens" in note and repr(token) in note


def test_chat_templates_in_files_of_their_own(tmp_path: Path) -> None:
    directory = with_tokens(tmp_path, tokens=ENDS_TURNS, template=INST)
    (directory / "chat_template.jinja").write_text(CHATML)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(INST)
    plan, path = written(directory)
    assert plan.metadata["tokenizer.chat_templates"] == ["tool_use"]
    with llama_vocabulary(path) as vocabulary:
        assert (vocabulary.template(), vocabulary.template("tool_use")) == (CHATML, INST)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ([4, 0], None, {1, 4, 0}),
        ([1, 300], None, {1, 300}),
        (1, [300, 301, 1], {1, 300, 301}),
        ([5, 6], [300], {1, 300}),
    ],
)
def test_ends_are_those_of_the_generation_config(
    tmp_path: Path, config: int | list[int], generation: list[int] | None, ends: set[int]
) -> None:
    directory = with_tokens(tmp_path, split=QWEN2, eos_token_id=config)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        content = json.dumps({"eos_token_id": generation})
        (directory / "generation_config.json").write_text(content)
    plan, path = written(directory)
    with llama_vocabulary(path) as vocabulary:
        assert vocabulary.ends(VOCABULARY) == ends
    assert plan.metadata["tokenizer.ggml.eos_token_id"] == 1
    assert plan.notes == ()


def test_ends_that_gguf_has_no_key_for_are_noted(tmp_path: Path) -> None:
    directory = with_tokens(tmp_path, split=QWEN2, tokens=ENDS_TURNS)
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    known = next(token["id"] for token in tokens if token["content"] == "<|im_end|>")
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, known, 300, 301]}))
    plan, file = written(directory)
    assert plan.notes == ()  # llama.cpp knows <|im_end|> by its text
    with llama_vocabulary(file) as vocabulary:
        assert vocabulary.ends(VOCABULARY) == {1, known, 300, 301}
    path.write_text(json.dumps({"eos_token_id": [1, known, 300, 301, 302]}))
    plan, file = written(directory)
    [note] = plan.notes
    assert repr(plan.metadata["tokenizer.ggml.tokens"][302]) in note
    with llama_vocabulary(file) as vocabulary:
        assert vocabulary.ends(VOCABULARY) == {1, known, 300, 301}


def test_an_eos_that_only_special_tokens_map_names(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for number, token in enumerate(("<|im_end|>", "<|im_start|>", "<unk>")):
        directory = tmp_path / str(number)
        directory.mkdir()
        with_tokens(directory, tokens=ENDS_TURNS, split=QWEN2, settings={"eos_token": None})
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
        plan = plan_file(Checkpoint(directory), "q8_0")
        expected = AutoTokenizer.from_pretrained(directory).eos_token_id
        assert plan.metadata["tokenizer.ggml.eos_token_id"] == expected
        assert plan.metadata["tokenizer.ggml.tokens"][expected] == token


def test_tokens_that_only_added_tokens_decoder_has(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = with_tokens(tmp_path, split=QWEN2, tokens=ENDS_TURNS[:1], template=CHATML)
    path = directory / "tokenizer_config.json"
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in tokens}
    for number, flags in ((473, {}), (474, {"special": False}), (475, {"rstrip": True})):
        decoder[str(number)] = added(f"<|extra_{number}|>", **flags)
    decoder["476"] = added("<|im_end|>")
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": decoder}))
    plan, file = written(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = plan.metadata["tokenizer.ggml.tokens"]
    for token in decoder.values():
        assert texts[tokenizer.convert_tokens_to_ids(token["content"])] == token["content"]
    assert differing(directory, file, rendered(directory)) == []
    assert differing(directory, file, ["a<|extra_473|>b", "a <|extra_474|> b"]) == []
