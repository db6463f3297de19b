"""The tests' own order: they mirror the tree, share through helpers, and no file is too long."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LONGEST = 400  # lines
# Folders of their own: what tests share, what they read, and the suite that runs engines.
APART = {"helpers", "data", "compatibility"}
# Tests of these mirror the folder of the same name beside quantkit/.
BESIDE = {"benchmarks", "demo"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_folder_of_tests_mirrors_one_of_the_code() -> None:
    for path in TESTS.rglob("test_*.py"):
        place = path.parent.relative_to(TESTS)
        first = place.parts[0] if place.parts else ""
        if first not in APART:
            code = ROOT / place if first in BESIDE else ROOT / "quantkit" / place
            assert code.is_dir(), f"{path.relative_to(ROOT)} tests nothing in {code}"


def test_tests_share_through_helpers_only() -> None:
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                modules = name.split(".")
                shared = modules[0] != "tests" or not any(m.startswith("test_") for m in modules)
                assert shared, f"{path.relative_to(ROOT)} imports {name}"


def test_every_folder_of_tests_is_a_package() -> None:
    """Or two test files of one name would be one module to pytest and to mypy."""
    for path in TESTS.rglob("test_*.py"):
        assert (path.parent / "__init__.py").is_file(), path.parent


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources("quantkit", "tests", "benchmarks")
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
