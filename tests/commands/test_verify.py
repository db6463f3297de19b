"""verify finds what is wrong with an artifact, and nothing wrong with a whole one."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.artifact.findings import Check, Verification
from quantkit.base.errors import InputError, MachineError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.commands.verify import ArtifactChecks, check_answers
from quantkit.engines.trial import Trial, run_trial
from quantkit.formats.packed import open_artifact
from quantkit.reports.findings import checks_table
from tests.helpers.tiny import Tiny


def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on stdout and stderr of a command."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def outcomes(value: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["passed"] for check in value["checks"]}


def test_a_whole_artifact_is_verified(artifact: Path) -> None:
    code, value, _ = run("verify", artifact, "--baseline", "demo")
    assert code == 0 and value["passed"] and value["engine"] == "quantkit-int4"
    found = outcomes(value)
    assert set(found.values()) == {True}
    assert found.keys() == {
        *("digests", "files missing", "files extra", "shapes", "finite"),
        *("chat template", "chats", "tokens", "loads", "logits", "speaks"),
    }


def test_every_damage_has_its_line(artifact: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(artifact, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.scales"][0, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    template = (broken / "chat_template.jinja").read_text()
    (broken / "chat_template.jinja").write_text(f"Answer!{template}")
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    (broken / "generation_config.json").unlink()
    (broken / "notes.txt").write_text("new")
    code, value, _ = run("verify", broken, "--baseline", "demo")
    details = {check["name"]: check["detail"] for check in value["checks"]}
    assert code == 1 and not value["passed"]
    failed = {name for name, passed in outcomes(value).items() if not passed}
    assert failed == {
        *("digests", "files missing", "files extra", "finite"),
        *("chat template", "chats", "tokens", "logits", "speaks"),
    }
    assert details["files missing"] == "the manifest names generation_config.json"
    assert details["files extra"] == "not in the manifest notes.txt"
    assert details["finite"] == "NaN or infinity in model.layers.2.mlp.up_proj.weight"
    checks = tuple(Check(**check) for check in value["checks"])
    page = StringIO()
    shown = Console(width=200, file=page)
    shown.print(checks_table(Verification(str(broken), "demo", value["engine"], checks)))
    text = page.getvalue()
    assert text.count("✗") == len(failed) and text.count("✓") == 2 and "FAILED" in text


@pytest.mark.engine
def test_a_gguf_is_tokenized_by_llamacpp(gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    code, value, _ = run("verify", gguf, "--baseline", "demo")
    assert code == 0 and value["engine"] == "llama.cpp"
    found = outcomes(value)
    assert found.pop("digests") is None  # no manifest beside it
    assert set(found.values()) == {True} and {"tokens", "special tokens"} <= found.keys()
    # Of a baseline with another tokenizer, all that differs is said.
    other = shutil.copytree(demo_model(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    code, value, _ = run("verify", gguf, "--baseline", other)
    found = outcomes(value)
    assert code == 1
    assert [found[name] for name in ("chat template", "chats", "tokens")] == [False] * 3
    assert found["shapes"] and found["speaks"]


def subject(path: Path, baseline: Path | None) -> ArtifactChecks:
    source = None if baseline is None else Checkpoint(baseline)
    return ArtifactChecks(path, path, open_artifact(path), source)


def test_shapes_are_held_against_what_is_there(tiny: Tiny, artifact: Path, gguf: Path) -> None:
    assert subject(artifact, None).shapes().passed is True  # its own config.json
    assert subject(gguf, None).shapes().passed is None
    assert subject(gguf, demo_model()).shapes().passed is True
    other = subject(artifact, tiny("llama", torch.bfloat16)).shapes()
    assert other.passed is False and "config.json asks for" in other.detail


def test_without_a_baseline_tokens_are_left_open(artifact: Path) -> None:
    [check] = subject(artifact, None).tokenizer()
    assert check.passed is None


@pytest.mark.parametrize(
    ("engine", "code", "message"),
    [
        ("vllm", 3, "needs vllm, which isn't installed"),
        ("transformers", 3, "needs gptqmodel for this format"),
        ("llama.cpp", 2, "llama.cpp doesn't run safetensors"),
        ("exllama", 2, "no such engine"),
    ],
)
def test_engines_that_cannot_be_asked(artifact: Path, engine: str, code: int, message: str) -> None:
    if code == 3 and find_spec("gptqmodel" if engine == "transformers" else engine):
        pytest.skip("is installed here")
    got, value, _ = run("verify", artifact, "--engine", engine)
    assert got == code
    assert message in value["error"]["what"] and value["error"]["fix"]


def test_what_is_no_artifact_is_said_so(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        code, value, _ = run(command, tmp_path / "nothing")
        assert code == 2 and value["error"]["what"] == "no such file or directory"
        code, value, _ = run(command, tmp_path)
        assert code == 2 and "config.json" in value["error"]["where"]


def test_engines_that_cannot_load_or_die_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="ended with code 1: KeyError"):
        run_trial(Trial(str(tmp_path), "no such engine", ([1],), 2))
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(MachineError, match="perhaps for want of memory"):
        run_trial(Trial(str(tmp_path), "transformers", ([1],), 2))


def test_loops_and_silence_are_no_answers() -> None:
    assert not check_answers([[], [7] * 20], None).passed
    assert check_answers([[7] * 20, [7, 8] * 10], None).passed
    assert check_answers([[3]], None).passed
