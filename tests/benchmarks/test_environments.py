"""An environment is made once, made anew when its pins change, and its failure has a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.environments import ENVIRONMENTS, TORCH, Environment, EnvironmentFailed

ONE = Environment(installs=((TORCH, "one==1"), ("two==2",)), shown=("one",), removes=("three",))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The installers' commands, none of which runs."""
    calls: list[list[str]] = []

    def run(command: list[str], settings: dict[str, str] | None = None) -> None:
        calls.append(command)
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir(parents=True)

    monkeypatch.setattr(environments, "run", run)
    return calls


def test_an_environment_is_made_once(commands: list[list[str]], tmp_path: Path) -> None:
    target = tmp_path / "one"
    environments.make_at(target, ONE)
    pip = [str(target / "bin" / "python"), "-m", "pip"]
    assert commands[1:] == [
        [*pip, "install", "--quiet", TORCH, "one==1"],
        [*pip, "install", "--quiet", "two==2"],
        [*pip, "uninstall", "--quiet", "--yes", "three"],
    ]
    environments.make_at(target, ONE)
    assert len(commands) == 4


def test_other_pins_make_it_anew(commands: list[list[str]], tmp_path: Path) -> None:
    target = tmp_path / "one"
    environments.make_at(target, ONE)
    (target / "old").touch()
    environments.make_at(target, replace(ONE, installs=((TORCH, "one==1.1"),)))
    assert not (target / "old").exists() and len(commands) == 4 + 3


def test_an_environment_that_failed_half_way_is_made_again(
    commands: list[list[str]], tmp_path: Path
) -> None:
    def build(directory: Path) -> None:
        assert directory == tmp_path / "one"
        raise EnvironmentFailed("no compiler")

    with pytest.raises(EnvironmentFailed, match="no compiler"):
        environments.make_at(tmp_path / "one", replace(ONE, build=build))
    environments.make_at(tmp_path / "one", ONE)
    assert len(commands) == 2 * 4


def test_what_is_installed_decides_the_digest_and_what_is_shown_does_not() -> None:
    others = [
        replace(ONE, installs=((TORCH, "one==1"),)),
        replace(ONE, removes=()),
        replace(ONE, build=lambda directory: None),
    ]
    assert len({ONE.digest, *(other.digest for other in others)}) == 4
    assert replace(ONE, shown=()).digest == ONE.digest


def test_a_failure_has_the_installers_last_line() -> None:
    with pytest.raises(EnvironmentFailed, match=r"^no space left$"):
        environments.run(["bash", "-c", "echo first; echo 'no space left'; echo; exit 1"])
    with pytest.raises(EnvironmentFailed, match=r"^exit code 3$"):
        environments.run(["bash", "-c", "exit 3"])
    environments.run(["bash", "-c", 'test "$COLOR" = red'], {"COLOR": "red"})


def test_every_peer_is_pinned_and_has_the_same_torch() -> None:
    for name, environment in ENVIRONMENTS.items():
        assert environment.installs[0][0] == TORCH, name
        assert "torch" in environment.shown, name


def test_an_unknown_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["environments", "exllama"])
    with pytest.raises(SystemExit):
        environments.main()
    assert "there is no environment exllama; there are llm-compressor," in capsys.readouterr().err
