"""Statistics cached on disk, so that another recipe on the same model needs no calibration.

    ~/.cache/quantkit/statistics/KEY/layer-0000.safetensors …, index.json

The key is a digest of everything that the statistics depend on, and the index holds the digest of
every file. One more file than the model has layers: the last holds what the output embedding
reads. An entry is written under another name and renamed when it is complete. When the cache would
exceed its limit, the entries used longest ago are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from quantkit.base.background import Background, aside, so_far, to_host
from quantkit.base.errors import MachineError
from quantkit.base.files import openable, read_json, sha256, write_json
from quantkit.calibration.statistics import InputStatistics, Kind, new_moment

_INDEX = "index.json"
_DEFAULT_LIMIT = 20.0  # GB


@dataclass(frozen=True)
class CacheEntry:
    """The statistics of one model on one set of rows.

    nbytes: of all its files; about: what decides the statistics, such as the digests of checkpoint
    and rows, by name.
    """

    path: Path
    nbytes: int
    about: dict[str, str]


def directory() -> Path:
    """The cache: ``$QUANTKIT_CACHE``, or ``quantkit`` in the user's cache directory.

    Raises MachineError for a user without a home directory, as in ``docker run -u 12345``.
    """
    if chosen := os.environ.get("QUANTKIT_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
    except RuntimeError:
        raise MachineError(
            "this user has no home directory, so there is no cache",
            fix="Set HOME, or QUANTKIT_CACHE to a directory.",
        ) from None


def limit() -> int:
    """Bytes that all entries may take: ``$QUANTKIT_CACHE_LIMIT`` (GB), 20 GB if unset.

    Raises MachineError where the variable is not a number.
    """
    text = os.environ.get("QUANTKIT_CACHE_LIMIT", str(_DEFAULT_LIMIT))
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise MachineError(
            f"{text!r} is not a number of gigabytes",
            where="QUANTKIT_CACHE_LIMIT",
            fix="Set it to a number such as 20, or to 0 to keep nothing.",
        ) from None


def entries() -> list[CacheEntry]:
    """All complete entries, the one used longest ago first."""
    result = []
    for index in sorted(_root().glob(f"*/{_INDEX}"), key=lambda path: path.stat().st_mtime):
        nbytes = sum(path.stat().st_size for path in index.parent.iterdir())
        result.append(CacheEntry(index.parent, nbytes, read_json(index)["about"]))
    return result


def clear() -> int:
    """Remove all entries, unfinished ones too; returns the number of bytes freed."""
    root = _root()
    freed = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    shutil.rmtree(root, ignore_errors=True)
    return freed


def find_statistics(about: Mapping[str, str], kind: Kind) -> CachedStatistics | None:
    """The cached statistics of ``about``, None where there are none of this kind.

    Gram matrices are returned for ``diagonal`` too, since they hold the same diagonal.
    """
    root = _root_if_any()
    kinds: tuple[Kind, ...] = ("gram",) if kind == "gram" else (kind, "gram")
    for stored in kinds:
        if root is None:
            break
        path = root / _key(about, stored)
        if (path / _INDEX).is_file():
            # The index's time of change is when the entry was last used: see ``entries``. A cache
            # that others filled may be one that this user can only read.
            with suppress(OSError):
                os.utime(path / _INDEX)
            return CachedStatistics(path)
    return None


class CachedStatistics:
    """A complete entry, read one layer at a time."""

    def __init__(self, path: Path) -> None:
        index = read_json(path / _INDEX)
        self._path = path
        self._digests: dict[str, str] = index["files"]
        self._kind: Kind = index["kind"]

    def load(self, index: int, device: torch.device) -> list[InputStatistics]:
        """The statistics of layer ``index``, with their tensors on ``device``.

        Raises MachineError where they are damaged, after removing the entry.
        """
        name = _file_name(index)
        try:
            data = (self._path / name).read_bytes()
        except OSError:
            data = b""
        # A damaged matrix would give a plausible artifact that is worse: nothing is used unread.
        if hashlib.sha256(data).hexdigest() != self._digests.get(name):
            shutil.rmtree(self._path, ignore_errors=True)
            raise MachineError(
                "the cached statistics were damaged and have been removed",
                where=str(self._path / name),
                fix="Run the same command again, which measures them again.",
            )
        tensors = load(data)
        groups = []
        for number, group in enumerate(json.loads(bytes(tensors["about"].numpy()))):
            moment = new_moment(self._kind, group["width"], device)
            for part_number, part in enumerate(moment.parts()):
                part.copy_(tensors[f"{number}.{part_number}"])
            energy = {
                name: torch.tensor(value, dtype=torch.float64, device=device)
                for name, value in group["energy"].items()
            }
            groups.append(
                InputStatistics(
                    group["consumers"],
                    group["width"],
                    moment,
                    group["tokens"],
                    energy,
                    routed=_routed(group.get("routed"), group["consumers"]),
                )
            )
        return groups


class CacheWriter:
    """Writes an entry of ``layers`` files, one layer at a time.

    A context manager: the entry is discarded where the ``with`` block ends by an exception, or
    where not all layers were saved. A full disk ends the writing, never the run. patient: wait for
    the disk; otherwise an entry that takes longer to write than to measure is given up.
    """

    def __init__(
        self, about: Mapping[str, str], kind: Kind, layers: int, *, patient: bool = True
    ) -> None:
        self._about = dict(about)
        self._kind = kind
        self._layers = layers
        root = _root_if_any()
        self._has_place = root is not None
        self._final = (root or Path()) / _key(about, kind)
        self._path = self._final.with_name(f"{self._final.name}.{os.getpid()}.partial")
        self._digests: dict[str, str] = {}
        self._patient = patient
        self._writing = Background(threaded=True)
        self._pending: Future[bool] | None = None
        self._open = False  # until the first layer shows how much space the entry takes

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._wait()
        self._writing.close()
        if error is None and self._open and len(self._digests) == self._layers:
            content = {"about": self._about, "kind": self._kind, "files": self._digests}
            with suppress(OSError):
                # The index comes last: an entry without one doesn't count.
                write_json(self._path / _INDEX, content)
                # Another process may have finished the same entry meanwhile.
                if not self._final.exists():
                    self._path.rename(self._final)
        shutil.rmtree(self._path, ignore_errors=True)

    def save(self, index: int, inputs: Sequence[InputStatistics]) -> None:
        """Write the statistics of layer ``index`` in the background."""
        # At most one layer is being written: more would keep their statistics in memory.
        if not self._patient and self._pending is not None and not self._pending.done():
            self._open = False
            return
        self._wait()
        if index == 0 and self._has_place:
            self._open = self._make_room(_nbytes(inputs) * self._layers)
        if self._open:
            devices = {part.device for group in inputs for part in group.moment.parts()}
            ready = [so_far(device) for device in devices]
            self._pending = self._writing.submit(partial(self._write, index, inputs, ready))

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._open = pending.result() and self._open

    def _write(
        self,
        index: int,
        inputs: Sequence[InputStatistics],
        ready: Sequence[Callable[[], None]],
    ) -> bool:
        for wait in ready:
            wait()
        tensors = {
            f"{number}.{part_number}": _copied(part).contiguous()
            for number, group in enumerate(inputs)
            for part_number, part in enumerate(group.moment.parts())
        }
        about: list[dict[str, Any]] = [
            {
                "consumers": group.consumers,
                "width": group.width,
                "tokens": group.tokens,
                "routed": group.routed,
                "energy": {name: float(value) for name, value in group.energy.items()},
            }
            for group in inputs
        ]
        text = json.dumps(about).encode()
        # Safetensors' own metadata isn't returned by ``load``, which reads from bytes.
        tensors["about"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        path = self._path / _file_name(index)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            save_file(tensors, openable(self._path) / path.name)
            self._digests[path.name] = sha256(path)
        except Exception:  # safetensors has exceptions of its own, and no run fails for its cache
            return False
        return True

    def _make_room(self, nbytes: int) -> bool:
        """Remove the entries used longest ago until ``nbytes`` more fit; False if they can't."""
        allowed = limit()
        root = _root()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        # A run that was killed leaves its unfinished entry, whose name holds its process id.
        for path in root.glob("*.partial"):
            if not psutil.pid_exists(int(path.name.split(".")[1])):
                shutil.rmtree(path, ignore_errors=True)
        if nbytes > allowed or nbytes > shutil.disk_usage(root).free // 2:
            return False
        remaining = entries()
        total = sum(entry.nbytes for entry in remaining)
        while remaining and total + nbytes > allowed:
            oldest = remaining.pop(0)
            total -= oldest.nbytes
            shutil.rmtree(oldest.path, ignore_errors=True)
        return True


def _routed(value: Any, consumers: Sequence[str]) -> dict[str, int]:
    """Tokens by consumer; an older entry has one number for all, or none."""
    if isinstance(value, dict):
        return value
    return {} if value is None else dict.fromkeys(consumers, value)


def _copied(part: Tensor) -> Tensor:
    with aside(part.device):
        return to_host(part)


def _nbytes(inputs: Sequence[InputStatistics]) -> int:
    return sum(part.nbytes for group in inputs for part in group.moment.parts())


def _root_if_any() -> Path | None:
    """The entries' directory; None where there is no place for one, which ends no run."""
    try:
        return _root()
    except MachineError:
        return None


def _root() -> Path:
    return directory() / "statistics"


def _key(about: Mapping[str, str], kind: Kind) -> str:
    text = json.dumps({**about, "kind": kind}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file_name(index: int) -> str:
    return f"layer-{index:04d}.safetensors"
