"""Every command as in a container: an unknown user without a home, in ASCII, on a small machine.

The user may read everything and write nothing but one directory; there is no terminal, and 64 KB of
shared memory.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.cli import COMMANDS
from tests.helpers.fuzzing import Sources

ROOT = Path(__file__).parents[2]
USER = 12345  # whom no machine knows
MARK = "=== "
# All commands in one process, since most of what each takes is imports; a line before each output.
SCRIPT = f"""
import json, os, sys
assert os.getuid() == {USER} and "HOME" not in os.environ
from quantkit.cli import main
for arguments in json.load(sys.stdin):
    sys.argv = ["quantkit", *arguments]
    print({MARK!r}, flush=True)
    try:
        main()
    except SystemExit as end:
        print({MARK!r}, end.code, flush=True)
"""
GPTQ = """schema: 1
name: gptq
version: 1.0.0
quantize: {method: gptq, bits: 4, group_size: 32, symmetric: true, format: gptq}
calibration: {dataset: suite/text.jsonl, samples: 2, sequence_length: 64, seed: 0}
"""


def as_stranger(command: list[str]) -> list[str]:
    """``command`` by the unknown user, in name spaces of its own."""
    # The interpreter may lie in somebody's home: reading is allowed everywhere, writing isn't.
    rights = "-all,+dac_read_search"
    change = [
        *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
        *(f"--inh-caps={rights}", f"--ambient-caps={rights}", f"--bounding-set={rights}"),
    ]
    environment = {
        **{"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "40", "LC_ALL": "C"},
        **{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    }
    clean = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    steps = "mount -t tmpfs -o size=64k tmpfs /dev/shm && umask 077 && exec "
    return ["unshare", "-m", "sh", "-c", steps + shlex.join([*change, *clean, *command])]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that a stranger can find, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="quantkit-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_every_command_in_a_container(sources: Sources, place: Path) -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare"))):
        pytest.skip("needs root, setpriv and unshare, to become another user")
    tried = subprocess.run(as_stranger(["true"]), capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this machine doesn't let root change users: {tried.stderr.strip()}")

    given, made = place / "given", place / "made"
    for source in (sources.model, sources.adapter, sources.suite):
        shutil.copytree(source, given / source.name)
    shutil.copy(sources.recipe, given)
    (given / "gptq.yaml").write_text(GPTQ)
    (given / "prompts.txt").write_text("The owl is\nThe cat is\n")
    made.mkdir()
    made.chmod(0o777)
    before = {path: path.stat().st_mtime_ns for path in given.rglob("*")}

    model, suite = f"{given}/model", f"{given}/suite/suite.yaml"
    judged = ["--baseline", model, "--suite", suite, "--allow-overlap"]
    commands: dict[str, tuple[int, list[str]]] = {
        "quantize": (0, [f"{given}/recipe.yaml", "--model", model, "--out", f"{made}/rtn"]),
        "quantize ": (0, ["gguf-q8-0", "--model", model, "--out", f"{made}/gguf"]),
        "sweep": (0, [f"{given}/gptq.yaml", "--model", model, "--out", f"{made}/sweep"]),
        "merge": (0, [model, f"{given}/adapter", "--out", f"{made}/merged"]),
        "eval": (0, [f"{made}/sweep/gptq", *judged]),
        "bench": (0, [f"{made}/gguf", "--prompt-tokens=8", "--new-tokens=2", "--repeats=1"]),
        "compare": (0, [f"{made}/rtn", *judged, "--out", f"{made}/report", "--no-bench"]),
        "report": (0, [f"{made}/report/comparison.json", "--out", f"{made}/again.html"]),
        "inspect": (0, [f"{made}/rtn"]),
        "verify": (0, [f"{made}/gguf"]),
        "export": (0, [f"{made}/gguf", "--to", "ollama", "--out", f"{made}/ollama"]),
        "recipes list": (0, []),
        "recipes show": (0, ["nf4"]),
        "recipes check": (0, []),
        "suite init": (0, [f"{given}/prompts.txt", "--baseline", model, "--out", f"{made}/suite"]),
        "suite check": (0, [suite]),
        "cache list": (3, []),
        "cache clear": (3, []),
    }
    assert {name.strip().replace(" ", "_") for name in commands} == set(COMMANDS)
    lines = [[*name.split(), *arguments] for name, (_, arguments) in commands.items()]
    done = subprocess.run(
        as_stranger(["setsid", sys.executable, "-c", SCRIPT]),
        input=json.dumps([*lines, ["--help"]]).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
    )
    printed = done.stdout.decode("ascii")  # nothing else came through
    assert done.returncode == 0 and "Traceback" not in printed, printed
    outputs = printed.split(f"{MARK}\n")[1:]
    codes = [int(output.rpartition(MARK)[2]) for output in outputs]
    assert codes == [*(code for code, _ in commands.values()), 0], printed
    assert {path: path.stat().st_mtime_ns for path in given.rglob("*")} == before
    assert not [path for path in made.rglob("*") if path.stat().st_uid != USER]
    assert not [path for path in made.iterdir() if path.name.endswith(".partial")]
