"""What figures depend on is read off this machine."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from benchmarks import machine


def test_versions_are_those_of_the_interpreter() -> None:
    installed = machine.installed(sys.executable, ("torch", "no-such-package", "pytest"))
    assert installed == f"torch {metadata.version('torch')}, pytest {metadata.version('pytest')}"


def test_a_machine_without_nvidias_tool_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.gpu() == ""


def test_commit_and_processor_are_never_empty() -> None:
    assert machine.commit() and machine.processor()
