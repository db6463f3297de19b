"""Output directories: whole or not at all, and nothing is replaced that we didn't make."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.base.errors import InputError, MachineError
from quantkit.base.output import check_file, check_folder, check_output, new_directory, partial_of

KIND = ("an artifact", "quantkit.json")


def test_directories_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), new_directory(out) as directory:
        (directory / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text("{}")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with new_directory(out) as directory:
        (directory / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_directory(out):
        raise KeyboardInterrupt
    assert (out / "quantkit.json").read_text() == "old"


def test_outputs_that_must_not_be_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new", *KIND, force=False, needed=1)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path, *KIND, force=False, needed=1)
    with pytest.raises(InputError, match="isn't an artifact of ours"):
        check_output(tmp_path, *KIND, force=True, needed=1)
    (tmp_path / "quantkit.json").write_text("{}")
    check_output(tmp_path, *KIND, force=True, needed=1)


def test_too_little_disk_is_refused_before_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(MachineError, match="this needs"):
        check_output(tmp_path / "new", *KIND, force=False, needed=2 * free)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(MachineError, match="can't be read or written"),
        new_directory(blocked / "out"),
    ):
        pass


def write(out: Path, content: str, *, force: bool = False) -> None:
    check_output(out, *KIND, force=force)
    with new_directory(out) as directory:
        (directory / "quantkit.json").write_text(content)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_what_it_points_to_is_written(
    tmp_path: Path, exists: bool, relative: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if exists:
        write(disk / "model", "old")
    (tmp_path / "second").symlink_to("disk/model" if relative else disk / "model")
    (tmp_path / "first").symlink_to("second")
    if exists:
        with pytest.raises(InputError, match="exists already"):
            write(tmp_path / "first", "new")
    write(tmp_path / "first", "new", force=exists)
    assert (tmp_path / "first").is_symlink() and (tmp_path / "second").is_symlink()
    assert (disk / "model" / "quantkit.json").read_text() == "new"
    assert [path.name for path in disk.iterdir()] == ["model"]


def test_links_that_lead_nowhere_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "unmounted").symlink_to(tmp_path / "disk" / "model")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(InputError, match="there is no directory"):
        check_output(tmp_path / "unmounted", *KIND, force=True)
    for name in ("one", "other", "self"):
        with pytest.raises(InputError, match="leads nowhere"):
            check_output(tmp_path / name, *KIND, force=True)


def test_an_empty_directory_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["quantkit.json"]


def test_the_working_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = os.stat(".").st_ino
    for out, content in ((Path("."), "first"), (tmp_path / "here", "second")):
        write(out, content, force=content == "second")
        assert Path("quantkit.json").read_text() == content and os.stat(".").st_ino == inode
    with pytest.raises(ZeroDivisionError), new_directory(Path(".")) as directory:
        (directory / "file").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(".") == ["quantkit.json"]


def test_directories_of_somebody_else_are_not_removed(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis").write_text("precious")
    write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out.old" / "thesis").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.old"]


MOUNTED = """
import os, sys
from pathlib import Path
from tests.base.test_output import write
place = Path(sys.argv[1])
for path in (place / "a volume", place / "disk"):
    write(path, "first")
    for force, expected in ((False, "exists already"), (True, "")):
        try:
            write(path, "second", force=force)
            message = ""
        except Exception as error:
            message = str(error)
        assert expected in message and bool(message) == bool(expected), message
    assert (path / "quantkit.json").read_text() == "second"
    assert sorted(os.listdir(path)) in (["quantkit.json"], ["lost+found", "quantkit.json"])
"""


def test_a_mounted_directory_is_written_into(tmp_path: Path) -> None:
    """A directory of the same file system, and another one with lost+found."""
    for name in ("a volume", "source", "disk"):
        (tmp_path / name).mkdir()
    mounts = (
        'mount --bind "$0/source" "$0/a volume" && mount -t tmpfs none "$0/disk" && '
        'mkdir "$0/disk/lost+found" && exec "$1" -c "$2" "$0"'
    )
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "-rm", "sh", "-c"]
    if unshare is None or subprocess.run([*command, "mount -t tmpfs none /mnt"]).returncode:
        pytest.skip("mounting in a namespace of one's own isn't allowed here")
    arguments = [str(tmp_path), sys.executable, MOUNTED]
    done = subprocess.run([*command, mounts, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "source" / "quantkit.json").read_text() == "second"


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    (tmp_path / "out").mkdir()
    assert partial_of(tmp_path / "out") == tmp_path / "out" / ".partial"
    write(tmp_path / "out", "new")
    write(tmp_path / "out", "newer", force=True)
    assert os.listdir(tmp_path / "out") == ["quantkit.json"]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM, errno.EIO])
def test_a_finished_output_is_kept_where_it_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MachineError, match=r"finished output is kept in .*out\.partial$"):
        write(tmp_path / "out", "hours of work")
    assert (tmp_path / "out.partial" / "quantkit.json").read_text() == "hours of work"


@pytest.mark.parametrize("name", ["file/out", "file/further/out", "a/b/" + "y" * 300])
def test_places_are_tried_before_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / name
    with pytest.raises(MachineError):
        check_output(out, *KIND, force=True)
    with pytest.raises(MachineError):
        check_folder(out)
    with pytest.raises(MachineError):
        check_file(out)
    assert os.listdir(tmp_path) == ["file"]


def test_names_that_are_too_long_only_while_unfinished(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="File name too long"):
        check_output(tmp_path / ("x" * 250), *KIND, force=False)
    check_output(tmp_path / ("é" * 120), *KIND, force=False)


def test_files_and_folders_of_reports(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("new.json")
    with pytest.raises(InputError, match="isn't a directory"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="is a directory"):
        check_file(tmp_path)
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "folder")
    for name in ("file", "link", "new/result.json"):
        check_file(tmp_path / name)
    assert (tmp_path / "file").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
