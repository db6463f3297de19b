"""Output on terminals that can't show every character."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.base.resources import demo_model

ENCODINGS = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "40"},
]


def quantkit(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "quantkit.cli", *map(os.fsencode, map(str, arguments))],
        env={**os.environ, **environment},
        capture_output=True,
    )


@pytest.mark.parametrize("environment", ENCODINGS)
def test_help_and_tables_in_any_encoding(environment: dict[str, str]) -> None:
    for arguments in (["--help"], ["recipes", "list"]):
        done = quantkit(environment, *arguments)
        assert done.returncode == 0 and done.stdout, done.stderr
    # Errors too: a name that neither ASCII nor UTF-8 can show.
    done = quantkit(environment, "inspect", "no\udcffwhere-é")
    assert done.returncode == 2 and b"where" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("environment", ENCODINGS[:3])
def test_json_loses_no_character_in_any_encoding(
    environment: dict[str, str], tmp_path: Path
) -> None:
    artifact = tmp_path / "demo"
    artifact.mkdir()
    for path in demo_model().iterdir():
        (artifact / path.name).symlink_to(path)
    (artifact / "chat_template.jinja").unlink()
    (artifact / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    name = artifact / "model-é\udcff.safetensors"
    (artifact / "model.safetensors").rename(name)
    done = quantkit(environment, "inspect", artifact, "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout.decode("latin-1"))
    # In an ASCII locale the letter is two bytes that Python couldn't decode.
    names = [os.fsencode(file) for file in value["files"]]
    assert names == [os.fsencode(name.name)]
