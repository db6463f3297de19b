"""The command line as a user meets it."""

from __future__ import annotations

from collections.abc import Sequence

from typer.testing import CliRunner, Result

from quantkit.cli import app


def run(*arguments: object) -> Result:
    """What the command line answers to these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(code: int, *arguments: object) -> str:
    """Run, expect ``code`` and no traceback; the message on one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def assert_parses(command: Sequence[str]) -> None:
    """A command line of ``python -m quantkit.cli`` has the options that quantkit has now."""
    program = command.index("quantkit.cli")
    # With --help the arguments are parsed, an unknown option is refused, and nothing runs.
    result = run(*command[program + 1 :], "--help")
    assert result.exit_code == 0, result.output
