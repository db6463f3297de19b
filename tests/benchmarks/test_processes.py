"""A process is measured together with its children, and its failure has a readable message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import processes


def test_cpu_time_includes_that_of_children(tmp_path: Path) -> None:
    work = "import time\nwhile time.process_time() < 0.4: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    measured = processes.run([sys.executable, "-c", outer], tmp_path / "log", settings={})
    assert measured.error is None
    assert measured.cpu >= 0.4
    assert measured.wall >= 0.4
    assert measured.peak > 2**20


def test_a_failure_has_the_message_of_its_exception(tmp_path: Path) -> None:
    code = "raise FileNotFoundError('/somewhere/deep/weights.bin, see https://a.org/b/c')"
    measured = processes.run([sys.executable, "-c", code], tmp_path / "log", settings={})
    assert measured.error == "FileNotFoundError: …/weights.bin, see https://a.org/b/c"


def test_a_slow_command_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    measured = processes.run(command, tmp_path / "log", timeout=1.0, settings={})
    assert measured.error == "stopped after 1 s"
    assert measured.wall < 30


def test_settings_are_added_to_the_environment(tmp_path: Path) -> None:
    code = "import os; print(os.environ['COLOR'], len(os.environ) > 1, os.getcwd())"
    log = tmp_path / "log"
    processes.run([sys.executable, "-c", code], log, settings={"COLOR": "red"})
    assert log.read_text().split() == ["red", "True", str(tmp_path)]


def test_a_failure_without_output_has_its_exit_code(tmp_path: Path) -> None:
    code = "import sys; sys.exit(7)"
    measured = processes.run([sys.executable, "-c", code], tmp_path / "log", settings={})
    assert measured.error == "exit code 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ""),
        ("one\n\n  two  \n\n", "two"),
        ("ValueError: early\nTraceback\nKeyError: 'q'\n", "KeyError: 'q'"),
        (
            "torch.OutOfMemoryError: too much\nTry less.\n",
            "torch.OutOfMemoryError: too much Try less.",
        ),
        ("\x1b[31merror: no such file\x1b[0m\n", "error: no such file"),
        ("warning: all is well\ndone\n", "done"),
        ("x" * 400, "x" * 300 + "…"),
        (b"\xff broken\n", "� broken"),
    ],
)
def test_the_last_message_of_a_log(tmp_path: Path, text: str | bytes, message: str) -> None:
    log = tmp_path / "log"
    log.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert processes.last_message(log) == message
