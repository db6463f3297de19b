"""Names of files and directories that aren't UTF-8, as old archives have them, through commands."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Protocol

import pytest

from quantkit.base.files import openable
from quantkit.base.resources import demo_adapter, demo_model
from quantkit.checkpoint.source import model_name
from quantkit.cli import app
from quantkit.recipes.lock import check_lock, read_lock, write_lock
from tests.helpers.cli import refused

NOTE, SECRET = os.fsdecode(b"n\xffte.txt"), os.fsdecode(b"caf\xe9.bin")
BYTES = bytes(range(256))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose name isn't UTF-8, with the demo, its adapter and a small suite in it."""
    place = tmp_path_factory.mktemp("bytes") / os.fsdecode(b"pl\xe4tze")
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    shutil.copytree(demo_model(), place / os.fsdecode(b"m\xf6del"))
    shutil.copytree(demo_adapter(), place / "adapter")
    (place / os.fsdecode(b"m\xf6del") / NOTE).write_bytes(BYTES)
    (place / os.fsdecode(b"m\xf6del") / os.fsdecode(b"d\xff")).mkdir()
    (place / "adapter" / SECRET).write_bytes(BYTES)
    lines = (json.dumps({"text": f"The cat number {n} is black."}) + "\n" for n in range(30))
    (place / os.fsdecode(b"t\xebxt.jsonl")).write_text("".join(lines))
    (place / os.fsdecode(b"pr\xf6mpts.txt")).write_text("What is 2 + 3?\nIs the owl white?\n")
    return place


class Done(Protocol):
    """The fixture ``done``: what a command that succeeds prints on stdout."""

    def __call__(self, *arguments: object) -> str: ...


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Done:
    """Commands on streams like the program's; the runner of other tests has its own."""

    def call(*arguments: object) -> str:
        for stream in (sys.stdout, sys.stderr):  # as main does
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(errors="replace")
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return call


def test_quantize_and_merge_keep_names_and_bytes(place: Path, done: Done) -> None:
    model = place / os.fsdecode(b"m\xf6del")
    for recipe in ("rtn-w4-g128", "gguf-q8-0"):
        out = place / recipe
        done("quantize", recipe, "--model", model, "--out", out)
        assert (out / NOTE).read_bytes() == BYTES
        recorded = json.loads((out / "quantkit.json").read_text())["files"]
        assert recorded[NOTE]["bytes"] == 256
        assert json.loads(done("inspect", out, "--json"))["path"] == str(out)
        done("inspect", out)
    # llama.cpp and transformers load it, each in a process of its own.
    done("verify", place / "gguf-q8-0", "--baseline", model)
    assert model_name(str(model)) == "m_del"
    assert [path.name for path in (place / "gguf-q8-0").glob("*.gguf")] == ["m_del-Q8_0.gguf"]
    done("export", place / "gguf-q8-0", "--to", "ollama", "--out", place / "ollama")
    modelfile = (place / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ../gguf-q8-0/m_del-Q8_0.gguf\n" in modelfile
    merged = place / os.fsdecode(b"m\xebrged")
    done("merge", model, place / "adapter", "--out", merged, "--json")
    assert (merged / NOTE).read_bytes() == BYTES
    done("inspect", merged)


def test_judging_and_reports(place: Path, done: Done) -> None:
    model, suite = place / os.fsdecode(b"m\xf6del"), place / os.fsdecode(b"s\xfcite")
    held, prompts = place / os.fsdecode(b"t\xebxt.jsonl"), place / os.fsdecode(b"pr\xf6mpts.txt")
    done("suite", "init", prompts, "--baseline", model, "--out", suite, "--text", held)
    text = (suite / "suite.yaml").read_text()
    (suite / "suite.yaml").write_text(text[: text.index("gates:")])
    done("suite", "check", suite / "suite.yaml")
    artifact = place / os.fsdecode(b"\xe4rtifact")
    done("quantize", "rtn-w4-g128", "--model", model, "--out", artifact)
    judged = ("--baseline", model, "--suite", suite / "suite.yaml")
    value = json.loads(done("eval", artifact, *judged, "--json"))
    assert value["variants"][0]["path"] == str(artifact)
    reports = place / os.fsdecode(b"r\xebports")
    goal = ("--goal", os.fsdecode(b"f\xfcr"))
    done("compare", artifact, *judged, "--no-bench", "--out", reports, *goal)
    for name in ("report.html", "comparison.md", "comparison.csv", "junit.xml"):
        assert (reports / name).read_text(encoding="utf-8")
        again = place / os.fsdecode(b"\xe4gain" + os.fsencode(Path(name).suffix))
        done("report", reports / "comparison.json", "--out", again)
        assert again.read_bytes() == (reports / name).read_bytes()


def test_libraries_open_such_paths_and_commands_name_them(place: Path, tmp_path: Path) -> None:
    plain, odd = tmp_path / "a.txt", place / os.fsdecode(b"\xff.gguf")
    assert openable(plain) == plain and openable(Path("a/b")) == Path("a/b")
    odd.write_bytes(BYTES)
    for path in (odd, place / "adapter", place / "adapter" / "adapter_config.json"):
        opened = openable(path)
        str(opened).encode()
        assert opened.resolve() == path.resolve() and opened.suffix == path.suffix
    assert "isn't UTF-8" in refused(
        *(2, "quantize", "gptq-w4-g128", "--model", "demo", "--out", place / "out"),
        *("--set", f"calibration.dataset={place / os.fsdecode(b't.jsonl')}"),
    )
    assert "no such file or directory" in refused(2, "inspect", place / os.fsdecode(b"n\xff"))


def test_a_lock_keeps_the_bytes_of_names(place: Path) -> None:
    folder = place / "recipes"
    tasks = folder / os.fsdecode(b"t\xe4sks")
    tasks.mkdir(parents=True)
    (tasks / os.fsdecode(b"\xfe.yaml")).write_text("task: x\n")
    (folder / "text.txt").write_text("Some text.")
    (folder / "s.yaml").write_text(
        "schema: 1\nname: s\nversion: 1.0.0\nlikelihood: {dataset: text.txt}\n"
        "harness: {tasks: [x], include_path: .}\n"
    )
    lock = folder / "recipes.lock"
    report = check_lock(folder, lock)
    write_lock(lock, report)
    assert read_lock(lock) == report.new
    assert ("file", os.fsdecode(b"t\xe4sks/\xfe.yaml")) in report.new
    assert not check_lock(folder, lock).problems
