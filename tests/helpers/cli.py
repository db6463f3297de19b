"""The command line as a user meets it."""

from __future__ import annotations

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
