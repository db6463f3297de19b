"""A command's file is named as the command is typed, in cli/ and in commands/."""

from __future__ import annotations

from pathlib import Path

import typer

from quantkit import cli, commands
from quantkit.cli import COMMANDS, app

CLI = Path(cli.__file__).parent
WORK = Path(commands.__file__).parent
HELPERS = {"__init__", "__main__", "app", "options", "console", "comparison"}
# These only list or show what another package has.
LISTING = {"recipes_list", "recipes_show", "cache_list", "cache_clear"}


def typed(group: typer.Typer, prefix: str = "") -> list[str]:
    """The commands as they are typed, with _ for a space, in the order of --help."""
    names = [f"{prefix}{command.name}" for command in group.registered_commands]
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        names += typed(sub.typer_instance, f"{prefix}{sub.name}_")
    return names


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")}


def test_every_command_has_a_file_of_its_name() -> None:
    assert typed(app) == list(COMMANDS)
    assert files(CLI) - HELPERS == set(COMMANDS)


def test_every_command_that_works_has_a_file_of_its_name_in_commands() -> None:
    assert files(WORK) - {"__init__"} == set(COMMANDS) - LISTING


def test_each_file_holds_its_command_alone() -> None:
    for name in COMMANDS:
        text = (CLI / f"{name}.py").read_text(encoding="utf-8")
        assert text.count("_app.command(") + text.count("@app.command(") == 1
        assert f"def {name}_command(" in text
