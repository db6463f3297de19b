"""Statistics kept on disk, so that another recipe on the same model needs no calibration.

    ~/.cache/quantkit/statistics/KEY/layer-0000.safetensors …, index.json

The key is a digest of everything that the statistics depend on. An entry is made under another
name and appears when it is whole; its index holds the digest of every file. The entries used
longest ago go when the limit is passed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load, save_file

from quantkit.base.errors import MachineError
from quantkit.base.files import read_json, sha256, write_json
from quantkit.base.parallel import Ahead
from quantkit.calibration.statistics import InputStatistics, Kind, new_moment

_INDEX = "index.json"
_DEFAULT_LIMIT = 20.0  # GB


@dataclass(frozen=True)
class Entry:
    """The statistics of one model, data set and setting. ``about``: what they are of."""

    path: Path
    nbytes: int
    about: dict[str, str]


def directory() -> Path:
    """Where statistics are kept: ``$QUANTKIT_CACHE``, or in the user's cache directory."""
    if chosen := os.environ.get("QUANTKIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"


def limit() -> int:
    """Bytes that all entries may take: ``$QUANTKIT_CACHE_LIMIT`` (GB), 20 GB if unset.

    Raises MachineError when it is no number.
    """
    text = os.environ.get("QUANTKIT_CACHE_LIMIT", str(_DEFAULT_LIMIT))
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise MachineError(
            f"{text!r} is no number of GB",
            where="QUANTKIT_CACHE_LIMIT",
            fix="Set it to a number such as 20, or to 0 to keep nothing.",
        ) from None


def entries() -> list[Entry]:
    """What is kept, the longest unused first."""
    found = []
    for index in sorted(_root().glob(f"*/{_INDEX}"), key=lambda path: path.stat().st_mtime):
        nbytes = sum(path.stat().st_size for path in index.parent.iterdir())
        found.append(Entry(index.parent, nbytes, read_json(index)["about"]))
    return found


def clear() -> int:
    """Remove everything, unfinished entries too; returns the bytes that were freed."""
    root = _root()
    freed = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    shutil.rmtree(root, ignore_errors=True)
    return freed


def find(about: Mapping[str, str], kind: Kind) -> Kept | None:
    """The statistics of ``about`` if they are kept; Gram matrices serve for a diagonal too."""
    kinds: tuple[Kind, ...] = ("gram",) if kind == "gram" else (kind, "gram")
    for holds in kinds:
        path = _root() / _key(about, holds)
        if (path / _INDEX).is_file():
            os.utime(path / _INDEX)
            return Kept(path)
    return None


class Kept:
    """A whole entry."""

    def __init__(self, path: Path) -> None:
        index = read_json(path / _INDEX)
        self._path = path
        self._digests: dict[str, str] = index["files"]
        self._kind: Kind = index["kind"]

    def load(self, index: int, device: torch.device) -> list[InputStatistics]:
        """The statistics of layer ``index``. Raises MachineError where they are damaged."""
        name = _file_name(index)
        try:
            data = (self._path / name).read_bytes()
        except OSError:
            data = b""
        if hashlib.sha256(data).hexdigest() != self._digests.get(name):
            shutil.rmtree(self._path, ignore_errors=True)
            raise MachineError(
                "kept statistics are damaged; they have been removed",
                where=str(self._path / name),
                fix="Run the same command again: it calibrates anew.",
            )
        tensors = load(data)
        groups = []
        for number, group in enumerate(json.loads(bytes(tensors["about"].numpy()))):
            moment = new_moment(self._kind, group["width"], device)
            for place, part in enumerate(moment.parts()):
                part.copy_(tensors[f"{number}.{place}"])
            energy = {
                name: torch.tensor(value, dtype=torch.float64, device=device)
                for name, value in group["energy"].items()
            }
            groups.append(
                InputStatistics(group["consumers"], group["width"], moment, group["tokens"], energy)
            )
        return groups


class Keeper:
    """An entry under way. Use as a context manager; it is dropped unless the block ends well."""

    def __init__(self, about: Mapping[str, str], kind: Kind, layers: int) -> None:
        self._about = dict(about)
        self._kind = kind
        self._layers = layers
        self._final = _root() / _key(about, kind)
        self._path = self._final.with_name(f"{self._final.name}.{os.getpid()}.partial")
        self._digests: dict[str, str] = {}
        self._writing = Ahead()
        self._pending: int | None = None
        self._open = False  # until the first layer has shown how much room it takes

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._wait()
        if kind is None and self._open and len(self._digests) == self._layers:
            content = {"about": self._about, "kind": self._kind, "files": self._digests}
            write_json(self._path / _INDEX, content)
            if not self._final.exists():
                self._path.rename(self._final)
        shutil.rmtree(self._path, ignore_errors=True)

    def save(self, index: int, inputs: Sequence[InputStatistics]) -> None:
        """Keep the statistics of layer ``index``, in the background. Full disks end the keeping."""
        self._wait()
        if index == 0:
            self._open = self._make_room(_nbytes(inputs) * self._layers)
        if self._open:
            self._writing.start(index, lambda: self._write(index, inputs))
            self._pending = index

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._open = self._writing.result(pending, lambda: True) and self._open

    def _write(self, index: int, inputs: Sequence[InputStatistics]) -> bool:
        tensors = {
            f"{number}.{place}": part.cpu().contiguous()
            for number, group in enumerate(inputs)
            for place, part in enumerate(group.moment.parts())
        }
        about: list[dict[str, Any]] = [
            {
                "consumers": group.consumers,
                "width": group.width,
                "tokens": group.tokens,
                "energy": {name: float(value) for name, value in group.energy.items()},
            }
            for group in inputs
        ]
        text = json.dumps(about).encode()
        tensors["about"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        path = self._path / _file_name(index)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
            self._digests[path.name] = sha256(path)
        except Exception:  # safetensors raises its own; without a cache the work goes on
            return False
        return True

    def _make_room(self, nbytes: int) -> bool:
        """Remove the entries used longest ago until the new one fits; False if it can't."""
        allowed = limit()
        root = _root()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        for path in root.glob("*.partial"):  # left by a run that was killed
            if not psutil.pid_exists(int(path.name.split(".")[1])):
                shutil.rmtree(path, ignore_errors=True)
        if nbytes > allowed or nbytes > shutil.disk_usage(root).free // 2:
            return False
        kept = entries()
        total = sum(entry.nbytes for entry in kept)
        while kept and total + nbytes > allowed:
            oldest = kept.pop(0)
            total -= oldest.nbytes
            shutil.rmtree(oldest.path, ignore_errors=True)
        return True


def _nbytes(inputs: Sequence[InputStatistics]) -> int:
    return sum(part.nbytes for group in inputs for part in group.moment.parts())


def _root() -> Path:
    return directory() / "statistics"


def _key(about: Mapping[str, str], kind: Kind) -> str:
    text = json.dumps({**about, "kind": kind}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file_name(index: int) -> str:
    return f"layer-{index:04d}.safetensors"
