"""A worker's answer arrives whole; where it ends without one, that is an error."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.base.errors import ExitCode, InputError, QuantkitError
from quantkit.engines import worker

MODULE = "tests.helpers.obliging_worker"


def ask(what: str, value: object = None) -> dict[str, Any]:
    return worker.ask(MODULE, {"do": what, "value": value}, "the job", {"A_VARIABLE": "set"})


@pytest.mark.parametrize("what", ["answer", "print"])
def test_the_answer_is_what_was_worked_out_and_nothing_else(what: str) -> None:
    value = [1, "ä", {"b": None}]
    assert ask(what, value) == {"given": value, "variable": "set"}


@pytest.mark.parametrize(
    ("what", "kind", "message", "code"),
    [
        ("refuse", InputError, "the job: can't be done", ExitCode.BAD_INPUT),
        (
            "fail",
            worker.WorkerDied,
            "the job: its process ended with code 1: ZeroDivisionError: one by zero",
            ExitCode.MACHINE,
        ),
        (
            "exit",
            worker.WorkerDied,
            "the job: its process ended with code 0: it printed nothing",
            ExitCode.MACHINE,
        ),
        ("be killed", worker.WorkerKilled, "perhaps for want of memory", ExitCode.MACHINE),
    ],
)
def test_ends_without_an_answer(
    what: str, kind: type[QuantkitError], message: str, code: ExitCode
) -> None:
    with pytest.raises(kind, match=message) as caught:
        ask(what)
    assert caught.value.exit_code is code
