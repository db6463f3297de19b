"""The command line understands what the documents tell people to type, and their Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from quantkit.base.resources import demo_model
from quantkit.cli import app

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "recipes", "demo", "benchmarks")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
LINE = re.compile(r"^(?: {4})?quantkit ([a-z].*)$", re.MULTILINE)  # of a fenced or indented block
MENTION = re.compile(r"`quantkit ([^`]+)`")  # in a sentence, which may leave out arguments


def split(line: str) -> list[str]:
    """The words of a command. Brackets mark what may be left out."""
    return shlex.split(re.sub(r"[\[\]]", "", line), comments=True)


def find(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and its arguments."""
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            assert words in ([], ["--help"]), f"no such command: {words}"
            break
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in LINE.findall(text):
        command, arguments = find(split(line))
        command.make_context("quantkit", arguments)  # raises what the command line would refuse
    for line in MENTION.findall(text):
        command, arguments = find(split(line))
        known = {option for parameter in command.params for option in parameter.opts}
        known |= {option for parameter in command.params for option in parameter.secondary_opts}
        assert {word for word in arguments if word.startswith("-")} <= known | {"--help"}, line


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    # By a recipe that takes no calibration, which makes no difference to the code.
    code = "\n".join(blocks).replace("gptq-w4-g128", "rtn-w4-g128").replace("bits=8", "format=gptq")
    exec(compile(code, "docs/python.md", "exec"), {})
    assert (tmp_path / "gptq").is_dir() and (tmp_path / "merged").is_dir()


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands on one's own model, one after the other, with the demo as that model."""
    monkeypatch.chdir(tmp_path)
    Path("my-finetune").symlink_to(demo_model())
    Path("prompts.txt").write_text("What is the trade of Osk?\nWhere is Varn?\n")
    blocks = re.findall(r"```\n(quantkit .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        answer = CliRunner().invoke(app, shlex.split(line)[1:])
        decided = {0, 1, 4} if " compare " in line else {0}  # on two prompts gates may say anything
        assert answer.exit_code in decided, answer.output
    assert Path("report/report.html").is_file() and Path("my-gptq/quantkit.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
