"""Which tokenizer and chat template go with base and adapter: the same for whoever asks.

The oracle is transformers' AutoTokenizer on the merged directory.
"""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer

from quantkit.base.progress import Silent
from quantkit.base.resources import demo_adapter, demo_model
from quantkit.calibration.text import load_tokenizer, pack_rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import Sidecars
from quantkit.commands import merge as verb
from quantkit.commands.verify import ArtifactChecks
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.templates import templates_of
from quantkit.formats.packed import open_artifact
from quantkit.lora.open import adapt
from tests.helpers.adapters import base_of, train
from tests.helpers.cli import refused, run
from tests.helpers.tiny import Tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CHAT = [{"role": "user", "content": "t1 t2"}]
WHERE = ("inline", "file", "none")


def template(name: str) -> str:
    return "{% for m in messages %}" + name + " {{ m.content }}{% endfor %}"


def put(directory: Path, name: str, where: str, *, vocabulary: int) -> None:
    """A tokenizer (with a vocabulary, or settings alone for a template inline) and a template."""
    directory.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
    if vocabulary:
        tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocabulary)}, "t0"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.save(str(directory / "tokenizer.json"))
    if where == "inline":
        settings["chat_template"] = template(name)
    if where == "named":
        settings["chat_template"] = [
            {"name": each, "template": template(f"{name}-{each}")}
            for each in ("default", "tool_use")
        ]
    if vocabulary or where in ("inline", "named"):
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if where in ("file", "folder"):
        (directory / "chat_template.jinja").write_text(template(name))
    if where == "folder":
        (directory / "additional_chat_templates").mkdir(exist_ok=True)
        path = directory / "additional_chat_templates" / "tool_use.jinja"
        path.write_text(template(f"{name}-tool_use"))


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"target_modules": ["q_proj"], "layers_to_transform": 0}
    return train(base_of(tiny, "llama"), tmp_path_factory.mktemp("trained") / "a", config)


def made(tiny: Tiny, trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of a base and an adapter, without any tokenizer."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base_of(tiny, "llama"), base)
    shutil.copytree(trained, adapter)
    return base, adapter


def rendered(tokenizer: Any) -> str | None:
    if tokenizer.chat_template is None:
        return None
    return str(tokenizer.apply_chat_template(CHAT, tokenize=False))


@pytest.mark.parametrize(
    ("of_base", "brings", "of_adapter"),
    [*product(WHERE, (True, False), WHERE), *product(("named", "folder"), (True, False), WHERE)],
)
def test_base_and_adapter_have_one_tokenizer_and_template(
    tiny: Tiny, trained: Path, tmp_path: Path, of_base: str, brings: bool, of_adapter: str
) -> None:
    base, adapter = made(tiny, trained, tmp_path)
    put(base, "base", of_base, vocabulary=90)
    put(adapter, "adapter", of_adapter, vocabulary=96 if brings else 0)
    adapted = adapt(Checkpoint(base), [(str(adapter), 1.0)], str(base))
    ours = load_tokenizer(adapted.tokenizer)
    verb.merge(str(base), [(str(adapter), 1.0)], tmp_path / "out", proof=False, progress=Silent())
    oracle = AutoTokenizer.from_pretrained(tmp_path / "out")
    owner = "adapter" if of_adapter != "none" else "base" if of_base != "none" else None
    name = {"base": f"base{'-default' if of_base == 'named' else ''}"}.get(owner or "", owner)
    assert rendered(oracle) == rendered(ours) == (f"{name} t1 t2" if owner else None)
    assert oracle.get_vocab() == ours.get_vocab()
    assert len(oracle) == (96 if brings else 90)
    if owner == "base":
        original = AutoTokenizer.from_pretrained(base)
        assert oracle.chat_template == ours.chat_template == original.chat_template
    else:
        assert oracle.chat_template == ours.chat_template
        assert not (tmp_path / "out" / "additional_chat_templates").exists()


def test_without_an_adapter_files_are_the_bases(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    base, adapter = made(tiny, trained, tmp_path)
    put(base, "base", "file", vocabulary=90)
    adapted = adapt(Checkpoint(base), [(str(adapter), 1.0)], str(base))
    assert adapted.tokenizer == Checkpoint(base).tokenizer == base
    put(adapter, "adapter", "file", vocabulary=0)
    adapted = adapt(Checkpoint(base), [(str(adapter), 1.0)], str(base))
    folder = adapted.tokenizer
    assert folder.is_dir() and folder == adapted.tokenizer
    del adapted
    assert not folder.exists()


def test_named_templates_reach_the_artifact_and_its_manifest(tmp_path: Path) -> None:
    base = tmp_path / "demo"
    shutil.copytree(demo_model(), base)
    put(base, "base", "folder", vocabulary=0)
    name = "additional_chat_templates/tool_use.jinja"

    def wrong(out: Path) -> list[str]:
        checks = ArtifactChecks(out, out, open_artifact(out), Checkpoint(base))
        found = [*checks.files(), *checks.tokenizer()]
        return [f"{check.name}: {check.detail}" for check in found if check.passed is False]

    for recipe in ("nf4", "gguf-q8-0"):
        out = tmp_path / recipe
        result = run("quantize", recipe, "--model", base, "--out", out)
        assert result.exit_code == 0, result.output
        assert name in json.loads((out / "quantkit.json").read_text())["files"]
        assert AutoTokenizer.from_pretrained(out if recipe == "nf4" else base).chat_template == {
            "default": template("base"),
            "tool_use": template("base-tool_use"),
        }
        assert wrong(out) == []
    out = tmp_path / "nf4"
    (out / name).write_text("another")
    (out / "additional_chat_templates" / "more.jinja").write_text("more")
    said = wrong(out)
    assert f"digests: changed {name}" in said
    assert "files extra: not in the manifest additional_chat_templates/more.jinja" in said
    assert any(each.startswith("chat template: differs") for each in said)
    shutil.rmtree(out / "additional_chat_templates")
    assert f"files missing: the manifest names {name}" in wrong(out)


@pytest.mark.parametrize("where", ["file", "inline", "folder"])
def test_gguf_and_calibration_have_the_adapters_template(tmp_path: Path, where: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(demo_adapter(), adapter)
    put(adapter, "adapter", where, vocabulary=0)
    if where == "inline":  # as trainers save it: all of the tokenizer
        settings = json.loads((demo_model() / "tokenizer_config.json").read_text())
        settings["chat_template"] = template("adapter")
        (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    result = run("quantize", "gguf-q8-0", "--model", "demo", "--adapter", adapter, "--out", out)
    assert result.exit_code == 0, result.output
    metadata = read_header(next(out.glob("*.gguf"))).metadata
    expected = {"default": template("adapter")}
    if where == "folder":
        expected["tool_use"] = template("adapter-tool_use")
    assert templates_of(metadata) == expected
    checked = run("verify", out, "--baseline", "demo", "--adapter", adapter)
    assert checked.exit_code == 0, checked.output
    adapted = adapt(Checkpoint(demo_model()), [(str(adapter), 1.0)], "demo")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"messages": CHAT}) + "\n")
    tokenizer = load_tokenizer(adapted.tokenizer)
    assert rendered(tokenizer) == "adapter t1 t2"
    rows = pack_rows(text, tokenizer, sequence_length=4, rows=1, seed=None)
    assert tokenizer.decode(rows.ids[0]).startswith("adapter"[:4])


def test_a_tokenizer_that_the_adapter_makes_too_large_is_refused(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    base, adapter = made(tiny, trained, tmp_path)
    put(base, "base", "none", vocabulary=90)
    put(adapter, "adapter", "none", vocabulary=97)
    for command in (
        ("merge", base, adapter),
        ("quantize", "nf4", "--model", base, "--adapter", adapter),
    ):
        message = refused(2, *command, "--out", tmp_path / "out")
        assert "the tokenizer has 97 tokens" in message and str(adapter) in message


@pytest.mark.parametrize("text", ['{"model": null}', "{}", '{"model": {"vocab": 5}}'])
def test_a_tokenizer_that_is_none_is_refused(
    tiny: Tiny, trained: Path, tmp_path: Path, text: str
) -> None:
    base, adapter = made(tiny, trained, tmp_path)
    (adapter / "tokenizer.json").write_text(text)
    message = refused(2, "merge", base, adapter, "--out", tmp_path / "out")
    assert "isn't a tokenizer of the tokenizers library" in message


def test_names_of_templates_that_gguf_cant_tell_apart_are_noted(tmp_path: Path) -> None:
    base = tmp_path / "demo"
    shutil.copytree(demo_model(), base)
    put(base, "base", "folder", vocabulary=0)
    for name in ("a-b", "a_b"):
        (base / "additional_chat_templates" / f"{name}.jinja").write_text(template(name))
    result = run("quantize", "gguf-q8-0", "--model", base, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "only the last of each name" in result.stderr


def test_what_isnt_the_models_is_found_before_it_is_published(
    tiny: Tiny, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that lost a file of its tokenizer, for whatever reason, isn't written."""
    base, adapter = made(tiny, trained, tmp_path)
    put(base, "base", "file", vocabulary=90)
    copy = Sidecars.copy

    def forgetful(self: Sidecars, target: Path, *, link: bool = False) -> None:
        copy(self, target, link=link)
        (target / "chat_template.jinja").unlink()

    monkeypatch.setattr(Sidecars, "copy", forgetful)
    for command in (("merge", base, adapter), ("quantize", "nf4", "--model", base)):
        assert "chat template: is missing" in refused(2, *command, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
