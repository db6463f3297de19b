"""The house: a floor imports only from the floors below it, and verbs don't import verbs."""

from __future__ import annotations

import ast
from pathlib import Path

import quantkit

ROOT = Path(quantkit.__file__).parent
VERBS = {
    *("quantize", "merge", "evaluate", "examine", "verify", "measure", "compare"),
    *("locate", "export", "record", "check"),
}
TOP = {"cli", "console"}


def imports(path: Path) -> set[str]:
    """First part below ``quantkit`` of everything a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "quantkit":
                names = [f"quantkit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("quantkit.")}
    return found


def test_every_file_imports_downwards_only():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        above = TOP if room in VERBS else set() if room in TOP else TOP | VERBS
        forbidden = above | (VERBS - {room} if room in VERBS else set())
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imports(path) & forbidden]
    assert not wrong


def test_the_check_sees_imports():
    assert set().union(*(imports(path) for path in (ROOT / "cli").glob("*.py"))) >= VERBS


def test_only_the_console_prints():
    guilty = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not guilty
