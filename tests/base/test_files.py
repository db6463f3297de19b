"""JSON, files that appear whole, and digests."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest

from quantkit.base import files
from quantkit.base.errors import InputError, MachineError
from quantkit.base.files import (
    as_machine_error,
    digests,
    hash_ahead,
    holds,
    read_json,
    sha256,
    with_home,
    write_json,
    write_whole,
)
from quantkit.base.names import dtype_name, listed


def test_what_is_written_as_json_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"b": "ä", "a": [1, 2.5, None]})
    assert path.read_text(encoding="utf-8").startswith('{\n  "b": "ä"')
    assert read_json(path) == {"b": "ä", "a": [1, 2.5, None]}


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_what_is_no_json_object_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"value\.json"):
        read_json(path)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "text", "one")
    assert (tmp_path / "new" / "text").read_text() == "one"
    with pytest.raises(MachineError, match="can't be read or written"):
        write_whole(tmp_path / "new" / "text" / "below", "two")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text"]


def test_a_digest_is_taken_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"one")
    assert digests([path]) == {"data": hashlib.sha256(b"one").hexdigest()}
    path.write_bytes(b"three")
    assert sha256(path) == hashlib.sha256(b"three").hexdigest()


def test_a_part_of_a_file_holds_what_its_digest_states(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abcdef")
    digest = hashlib.sha256(b"cde").hexdigest()
    assert holds(path, 2, 3, digest)
    assert not holds(path, 1, 3, digest)
    assert not holds(path, 5, 3, digest)
    assert not holds(tmp_path / "none", 2, 3, digest)


def test_a_long_list_of_names_says_how_many_more_there_are() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"


def test_a_dtype_has_the_name_that_config_json_gives_it() -> None:
    import torch

    assert dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("Cannot call rmtree on a symbolic link"), "x: Cannot call rmtree on a"),
        (OSError("Unable to load weights"), "x: Unable to load weights"),
        (shutil.SameFileError("'a' and 'a' are the same file"), "x: 'a' and 'a' are the same file"),
        (OSError(), "x: OSError"),
        (
            OSError("4096 requested and 0 written"),
            "x: no space left to write (4096 requested and 0",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "x: no space left to write"),
        (OSError(errno.EBUSY, "Device busy", "m"), "m: can't be read or written (Device busy)"),
    ],
)
def test_errors_of_the_system_are_called_what_they_are(error: OSError, expected: str) -> None:
    assert str(as_machine_error(error, Path("x"))).startswith(expected)


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_home("~") == tmp_path and with_home("~/a/b") == tmp_path / "a" / "b"
    assert with_home(Path("~/x")) == tmp_path / "x"
    for name in ("a/~/b", "~no-such-user/x", "x~", "/~"):
        assert with_home(name) == Path(name)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(InputError, match="home directory isn't known"):
        with_home("~/x")


def test_a_file_is_read_once_for_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is asked for while another thread is at it; and again once it has changed."""
    read: list[str] = []
    begun, go = threading.Event(), threading.Event()
    compute = files._sha256

    def slow(path: Path, size: int) -> str:
        read.append(path.name)
        begun.set()
        assert go.wait(60)
        return compute(path, size)

    monkeypatch.setattr(files, "_sha256", slow)
    contents = {"a": b"a" * 5_000_000, "b": b"", "c": b"c"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in contents]
    hash_ahead(paths)
    assert begun.wait(60)
    threading.Timer(0.05, go.set).start()
    assert digests(paths) == {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}
    assert sorted(read) == ["a", "b", "c"]
    (tmp_path / "c").write_bytes(b"changed")
    assert sha256(tmp_path / "c") == hashlib.sha256(b"changed").hexdigest()


def test_a_digest_that_failed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"a")

    def fails(path: Path, size: int) -> str:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(files, "_sha256", fails)
        sha256(tmp_path / "a")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()
