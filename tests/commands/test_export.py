"""quantkit export --to ollama: the Modelfile, its place, and every mistake named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.chat.gguf import read_chat
from quantkit.chat.layout import render
from quantkit.chat.modelfile import parse_parameters
from quantkit.chat.observe import conversations
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.export import export_ollama
from quantkit.formats.gguf.writer import write_bf16
from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.cli import refused, run
from tests.helpers.gguf_tiny import checkpoint

pytest.importorskip("gguf")

BOS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def gguf_of(model: Path, directory: Path) -> Path:
    """A directory with the model's GGUF alone."""
    directory.mkdir(parents=True)
    write_bf16(directory / "model.gguf", Checkpoint(model))
    return directory


def with_template(model: Path, target: Path, template: str | None, **settings: Any) -> Path:
    """A copy of a checkpoint with another chat template."""
    shutil.copytree(model, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    path = target / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), **settings}
    content.pop("chat_template", None)
    path.write_text(json.dumps({**content, "chat_template": template} if template else content))
    return target


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(demo_model(), tmp_path_factory.mktemp("export") / "demo")


@pytest.fixture
def artifact(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "art"))


def read(path: Path) -> dict[str, list[str]]:
    """A Modelfile's commands, as Ollama reads them: the values of each, in order."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    command = r'(FROM|TEMPLATE|SYSTEM|PARAMETER [a-z_]+) (?:"""(.*?)"""|"([^"\n]*)"|([^"\n]+))\n\s*'
    while text := text.lstrip():
        match = re.match(command, text, re.DOTALL)
        assert match, text[:80]
        found.setdefault(match[1], []).append(match[2] or match[3] or match[4])
        text = text[match.end() :]
    return found


def test_the_demos_modelfile(artifact: Path) -> None:
    before = sorted(artifact.iterdir())
    result = run("export", artifact, "--to", "ollama")
    assert result.exit_code == 0, result.output
    directory = artifact.with_name("art-ollama")
    assert [path.name for path in directory.iterdir()] == ["Modelfile"]
    assert sorted(artifact.iterdir()) == before
    content = read(directory / "Modelfile")
    assert (directory / content["FROM"][0]).samefile(artifact / "model.gguf")
    assert content["PARAMETER stop"] == ["<|end|>", "<|endoftext|>"]
    assert content["PARAMETER num_ctx"] == ["512"]
    assert "<|assistant|>" in content["TEMPLATE"][0]
    assert "SYSTEM" not in content


def test_what_a_user_chooses(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text('Be "brief".\n\n  Always.\n', encoding="utf-8")
    arguments = ["export", artifact, "--to", "ollama", "--out", out, "--system", prompt, "--json"]
    for setting in ("temperature=0.7", "num_ctx=256", 'stop=a "b"', "stop=<|end|>", "seed=3"):
        arguments += ["--parameter", setting]
    value = json.loads(run(*arguments).stdout)
    content = read(Path(value["modelfile"]))
    assert content["FROM"] == [str((artifact / "model.gguf").resolve())]
    assert content["SYSTEM"] == ['Be "brief".\n\n  Always.'] == [value["system"]]
    assert content["PARAMETER stop"] == ["<|end|>", "<|endoftext|>", 'a "b"']
    assert content["PARAMETER num_ctx"] == ["256"]
    assert content["PARAMETER temperature"] == ["0.7"]
    assert value["layout"]["place"] == "turn" and value["template"] == content["TEMPLATE"][0]
    assert "exists already" in refused(2, *arguments)
    assert run(*arguments, "--force", "--system", "Be kind.").exit_code == 0
    assert read(out / "Modelfile")["SYSTEM"] == ["Be kind."]


def test_a_template_of_ones_own(artifact: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.tmpl"
    own.write_text("{{ .System }} {{ .Prompt }}", encoding="utf-8")
    export = export_ollama(artifact, template=own)
    content = read(export.path)
    assert content["TEMPLATE"] == ["{{ .System }} {{ .Prompt }}"]
    assert content["PARAMETER stop"] == ["<|end|>", "<|endoftext|>"]
    assert export.layout is None


@pytest.fixture(scope="module")
def tiny_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts BOS before a text."""
    return checkpoint(tmp_path_factory.mktemp("tiny-bos"), bos=True)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_there_once(tiny_bos: Path, tmp_path: Path, adds_bos: bool) -> None:
    """llama.cpp makes the ids of Ollama's prompt that transformers makes of its own."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    from quantkit.engines.llamacpp import LlamaCpp

    model = with_template(tiny_bos, tmp_path / "model", BOS_TEMPLATE)
    if not adds_bos:
        path = model / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    artifact = gguf_of(model, tmp_path / "art")
    layout = export_ollama(artifact).layout
    assert layout is not None
    assert layout.start == ("" if adds_bos else "<s>")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with LlamaCpp(artifact / "model.gguf", context=256) as engine:
        for messages in conversations(system=True):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            wanted = tokenizer.encode(text, add_special_tokens=False)
            assert wanted.count(0) == 1 and wanted[0] == 0
            assert engine.tokenize(render(layout, messages)) == wanted


def test_a_bos_that_the_template_lacks_is_noted(tiny_bos: Path, tmp_path: Path) -> None:
    source = BOS_TEMPLATE.replace("{{ bos_token }}", "")
    model = with_template(tiny_bos, tmp_path / "model", source)
    export = export_ollama(gguf_of(model, tmp_path / "art"))
    assert any("puts BOS before a prompt" in note for note in export.notes)


@pytest.mark.parametrize("name", ["llama2", "smollm2", "gemma3", "llama3.2", "alpaca", "phi3"])
def test_stops_are_the_ends_of_turns(tiny_bos: Path, tmp_path: Path, name: str) -> None:
    source, *_, end = TEMPLATES[name]
    # The tiny tokenizer's own special tokens stand in for the family's.
    model = with_template(tiny_bos, tmp_path / "model", source)
    export = export_ollama(gguf_of(model, tmp_path / "art"))
    stops = read(export.path)["PARAMETER stop"]
    assert stops == list(dict.fromkeys(["</s>", end]))


def test_no_chat_template(tiny_bos: Path, tmp_path: Path) -> None:
    model = with_template(tiny_bos, tmp_path / "model", None)
    artifact = gguf_of(model, tmp_path / "art")
    result = run("export", artifact, "--to", "ollama")
    assert result.exit_code == 0 and "no chat template" in result.stderr
    assert read(tmp_path / "art-ollama" / "Modelfile")["TEMPLATE"] == ["{{ .Prompt }}"]


def test_other_chat_templates_are_refused(tiny_bos: Path, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ loop.index ~ m.content }}\n{% endfor %}"
    model = with_template(tiny_bos, tmp_path / "model", source)
    artifact = gguf_of(model, tmp_path / "art")
    message = refused(2, "export", artifact, "--to", "ollama")
    for word in ("model.gguf", "no known layout", "Gemma", "--template FILE"):
        assert word in message
    assert not artifact.with_name("art-ollama").exists()


def test_a_system_prompt_that_would_be_ignored(tiny_bos: Path, tmp_path: Path) -> None:
    model = with_template(tiny_bos, tmp_path / "model", TEMPLATES["alpaca"][0])
    artifact = gguf_of(model, tmp_path / "art")
    message = refused(2, "export", artifact, "--to", "ollama", "--system", "Be kind.")
    assert "--system: the chat template ignores system prompts" in message


def test_refusals_write_nothing(artifact: Path, tmp_path: Path) -> None:
    empty, file, other = tmp_path / "empty", tmp_path / "file", tmp_path / "other"
    empty.mkdir()
    file.touch()
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    (sealed / "quantkit.json").write_text("{}")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.gguf").write_bytes(b"GGUF")
    two = Path(shutil.copytree(artifact, tmp_path / "two"))
    shutil.copy(two / "model.gguf", two / "more.gguf")
    unprintable = Path(shutil.copytree(artifact, tmp_path / "zero\u200bwidth"))
    to = ("--to", "ollama", "--out", other)
    expected: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none", *to), "no such directory"),
        ((demo_model(), *to), "holds no .gguf file"),
        ((two, *to), "holds 2 .gguf files"),
        ((damaged, *to), "isn't a readable GGUF file"),
        ((unprintable, *to), "can't hold in a path"),
        ((artifact, "--to", "ollama", "--out", sealed, "--force"), "is an artifact"),
        ((artifact, "--to", "ollama", "--out", file), "isn't a directory"),
        ((artifact, *to, "--template", tmp_path / "none"), "can't be read"),
        ((artifact, *to, "--template", file), "is empty"),
        ((artifact, *to, "--system", " "), "--system is empty"),
        ((artifact, *to, "--system", 'say """'), 'SYSTEM holds """'),
        ((artifact, *to, "--system", "zero\u200bwidth"), "drops from a Modelfile"),
        ((artifact, *to, "--parameter", "num_ctx=4096"), "trained on 512 tokens"),
    ]
    for arguments, words in expected:
        assert words in refused(2, "export", *arguments)
    assert not other.exists()
    assert not list(tmp_path.rglob("Modelfile*"))
    assert "ollama" in refused(2, "export", artifact, "--to", "vllm")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["temprature=0.7"], "no parameter temprature"),
        (["temperature"], "isn't NAME=VALUE"),
        (["temperature="], "isn't NAME=VALUE"),
        (["temperature=warm"], "isn't a number"),
        (["temperature=nan"], "isn't a number"),
        (["top_k=0.5"], "isn't an integer"),
        (["use_mmap=1"], "neither true nor false"),
        (["seed=1", "seed=2"], "given twice"),
    ],
)
def test_parameters_are_checked(settings: list[str], why: str) -> None:
    with pytest.raises(InputError, match=re.escape(why)) as caught:
        parse_parameters(settings)
    assert caught.value.where == f"--parameter {settings[-1]}"


@pytest.mark.parametrize("size", [0, 3, 10, 30, 400, 5000])
def test_a_file_that_ends_early(demo: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((demo / "model.gguf").read_bytes()[:size])
    with pytest.raises(InputError, match="isn't a readable GGUF file"):
        read_chat(path)
