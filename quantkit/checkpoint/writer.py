"""Writing what must never be seen half-done: an output directory, and safetensors as a stream.

A directory is built under ``OUT.partial`` and renamed when it is whole. A safetensors file is
appended to tensor by tensor; its header, whose room was reserved, is written last. (Spaces after
the JSON are allowed by the format and ignored by every reader.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantkit.checkpoint.reader import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE
from quantkit.errors import InputError, MachineError

MANIFEST = "quantkit.json"
_DEFAULT_SHARD = 5_000_000_000  # bytes, as the hub recommends
_HEADER_PER_TENSOR = 160  # dtype, shape, offsets and punctuation; names come on top
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(out: Path, *, force: bool, needed: int) -> None:
    """Refuse an existing output, one that is no artifact even with ``force``, and a full disk.

    Raises InputError or MachineError; changes nothing.
    """
    if out.exists():
        if not force:
            raise InputError(
                "exists already", where=str(out), mend="Choose another --out, or pass --force."
            )
        if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
            raise InputError(
                f"isn't an artifact of ours (no {MANIFEST}), so --force doesn't replace it",
                where=str(out),
                mend="Choose another --out, or remove it yourself.",
            )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise MachineError(
            f"the disk has {free / 1e9:.2f} GB free, the artifact needs {needed / 1e9:.2f} GB",
            where=str(parent),
            mend="Free some space, or choose another --out.",
        )


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory that appears at ``out`` when the block ends well, and not at all otherwise.

    An artifact already there (``check_output`` has allowed it) is replaced at that moment.
    Raises MachineError when the disk is full or the place can't be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        old = out.with_name(out.name + ".old")
        if old.exists():  # likewise
            shutil.rmtree(old)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        # numpy reports a write that stopped short without an errno.
        if error.errno in _FULL or error.errno is None:
            what = f"no space left to write ({error.strerror or error})"
            mend = "Free some space (or raise the file size limit) and run it again."
        else:
            what = f"can't be read or written ({error.strerror or error})"
            mend = "Check its owner and permissions."
        where = str(error.filename or out)
        raise MachineError(what, where=where, mend=mend) from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


class TensorWriter:
    """Appends tensors to safetensors shards in ``directory``.

    Use as a context manager: leaving it without an exception completes the last shard, gives
    the shards their final names and writes the index where there is more than one. Nothing
    stays in memory after ``add``, except tensors too small and odd in size to lie before others
    without breaking their alignment: they end their shard.
    """

    def __init__(
        self, directory: Path, names: Iterable[str], shard_bytes: int = _DEFAULT_SHARD
    ) -> None:
        """``names``: at least those of all tensors that will be added, to size the header."""
        self._directory = directory
        room = sum(len(name.encode()) + _HEADER_PER_TENSOR for name in names) + 64
        self._room = -(-room // 8) * 8
        self._shard_bytes = shard_bytes
        self._shards: list[_Shard] = []

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        elif self._shards:
            self._shards[-1].file.close()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors (any device) that belong together: they share a shard."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        shard = self._shards[-1] if self._shards else None
        if shard is None or (shard.size and shard.size + nbytes > self._shard_bytes):
            if shard is not None:
                shard.finish()
            shard = _Shard(self._directory / f"shard-{len(self._shards)}", self._room)
            self._shards.append(shard)
        for name, tensor in tensors.items():
            shard.add(name, tensor.detach().cpu().contiguous())

    def _finish(self) -> None:
        if not self._shards:
            return
        self._shards[-1].finish()
        count = len(self._shards)
        if count == 1:
            self._shards[0].path.rename(self._directory / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self._directory / name)
            weight_map.update(dict.fromkeys(shard.entries, name))
        index = {
            "metadata": {"total_size": sum(shard.size for shard in self._shards)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self._directory / INDEX_FILE, index)


class _Shard:
    """One safetensors file under way."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.room = room
        self.size = 0
        self.entries: dict[str, object] = {}
        self._odd: list[tuple[str, Tensor]] = []
        self.file = path.open("wb")
        self.file.seek(8 + room)

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.nbytes % 8:
            self._odd.append((name, tensor))
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:

        if tensor.nbytes:
            self.file.write(tensor.flatten().view(torch.uint8).numpy().data)
        self.entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        self.size += tensor.nbytes

    def finish(self) -> None:
        # The largest alignment first: what follows is then aligned to its own, smaller one.
        for name, tensor in sorted(self._odd, key=lambda item: -item[1].itemsize):
            self._append(name, tensor)
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")
        ).encode()
        if len(header) > self.room:
            raise RuntimeError(f"header of {self.path} outgrew its {self.room} bytes")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()


def write_json(path: Path, value: object) -> None:
    """Write readable JSON that is the same for the same value."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
