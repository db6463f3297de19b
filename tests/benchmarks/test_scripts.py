"""Scripts that other interpreters run import nothing of this checkout but their neighbors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.compatibility.engines import ENGINES
from tests.compatibility.engines import SCRIPTS as ENGINE_SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
OURS = {"quantkit", "benchmarks", "tests", "demo"}
FOLDERS = (ROOT / "benchmarks" / "peer_jobs", ROOT / "benchmarks" / "foreign_jobs", ENGINE_SCRIPTS)
# llama.cpp runs in quantkit's own environment.
WITH_QUANTKIT = {engine.script for engine in ENGINES.values() if engine.environment is None}
SCRIPTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_needs_nothing_of_ours(path: Path) -> None:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
    allowed = {"quantkit"} if path.name in WITH_QUANTKIT else set()
    assert not packages & OURS - allowed
