"""The house: one order of packages, calls that one can read, and only the console prints."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantkit

ROOT = Path(quantkit.__file__).parent
TESTS = Path(__file__).parent
SETTINGS = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = SETTINGS["tool"]["quantkit"]["packages"]
API = "quantkit"  # the modules at the root


def imported(source: str) -> Iterator[str]:
    """The package below ``quantkit`` of everything that a source imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for first, _, rest in (name.partition(".") for name in names):
            if first == "quantkit":
                package = rest.partition(".")[0]
                yield package if package in PACKAGES else API


def upward(package: str, source: str) -> list[str]:
    """Packages that a file of ``package`` imports though they stand above it."""
    place = PACKAGES.index(package)
    return [name for name in imported(source) if PACKAGES.index(name) < place]


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else API


def test_every_import_goes_down_the_list() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.rglob("*.py")
        for name in upward(package_of(path), path.read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_the_list_names_every_package_and_no_other() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {*folders, API} == set(PACKAGES)
    assert len(set(PACKAGES)) == len(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES[1:])
@pytest.mark.parametrize(
    "planted",
    [
        "from quantkit.{above} import thing",
        "import quantkit.{above}.thing",
        "def f():\n    from quantkit.{above}.deep import thing",
        "if TYPE_CHECKING:\n    from quantkit import {above}",
    ],
)
def test_a_planted_upward_import_is_seen(package: str, planted: str) -> None:
    for above in PACKAGES[: PACKAGES.index(package)]:
        if above != API:
            assert upward(package, planted.format(above=above)) == [above]
    if PACKAGES.index(package) > PACKAGES.index(API):
        assert upward(package, "from quantkit import quantize") == [API]


def test_the_root_holds_folders_and_at_most_four_files() -> None:
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 4


def test_only_the_console_prints() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not guilty


def test_the_architecture_page_draws_the_list_and_a_tensors_way() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.findall(r"^      (\w+)(?:/|\.py) ", page, re.MULTILINE)
    assert [API if name == "api" else name for name in tree] == PACKAGES
    way = re.findall(r"^\| `(\S+\.py)` \|", page, re.MULTILINE)
    assert 0 < len(way) <= 9
    assert all((ROOT / file).is_file() for file in way)


MOST_POSITIONAL = 7


def crowded_calls(source: str) -> Iterator[tuple[int, str]]:
    """The line and the function of every call with more positional arguments than one can read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            yield node.lineno, ast.unparse(node.func)


def test_calls_with_eight_or_more_positional_arguments_take_keywords() -> None:
    assert list(crowded_calls("f(1, 2, 3, 4, 5, 6, 7)\ng.h(1, 2, 3, 4, 5, 6, 7, *x)")) == [
        (2, "g.h")
    ]
    crowded = [
        f"{path.relative_to(ROOT)}:{line} {function}"
        for path in ROOT.rglob("*.py")
        for line, function in crowded_calls(path.read_text(encoding="utf-8"))
    ]
    assert not crowded


def test_a_name_that_says_little_is_no_public_function_of_two_modules() -> None:
    owners: dict[str, list[str]] = {"check": [], "locate": []}
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name in owners:
                owners[node.name].append(str(path.relative_to(ROOT)))
    assert all(len(paths) < 2 for paths in owners.values()), owners


def test_no_test_imports_a_private_name() -> None:
    private = [
        f"{path.relative_to(TESTS)} imports {alias.name}"
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("quantkit")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not private
