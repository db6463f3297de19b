"""Safetensors written as a stream: no more than one tensor is in memory.

A file is appended to tensor by tensor. Its header comes first in the format and lists all of them,
so room for it is reserved at the beginning and it is written last. Spaces after its JSON are
allowed by the format, and readers ignore them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantkit.base.files import write_at, write_json
from quantkit.checkpoint.header import DTYPE_NAMES, DTYPES, INDEX_FILE, SINGLE_FILE
from quantkit.checkpoint.written import Written

_DEFAULT_SHARD = 5_000_000_000  # bytes; the hub recommends it
_HEADER_PER_TENSOR = 160  # bytes for dtype, shape, offsets and punctuation, without the name
_SHARD, _TAIL = "shard-{}", ".tail"  # the files' names until they are finished


class TensorWriter:
    """Appends tensors to safetensors shards in ``directory``.

    Use it as a context manager: leaving it without an exception completes the last shard, gives
    the shards their final names and writes the index if there are several. Nothing stays in memory
    after ``add``.
    """

    def __init__(
        self,
        directory: Path,
        names: Iterable[str],
        shard_bytes: int = _DEFAULT_SHARD,
        scratch: Path | None = None,
    ) -> None:
        """
        names: of all tensors that will be added, or more, to size the header; shard_bytes: the
        size at which a new shard begins; scratch: a directory for files that aren't part of the
        result, and that another run may resume from.
        """
        self._directory = directory
        self._scratch = scratch
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
            self._shards[-1].close()

    def add(self, tensors: Mapping[str, Tensor]) -> list[Written]:
        """Write tensors (any device) into one shard, since they belong together.

        When this returns the system has their bytes, and killing the process doesn't lose them.
        """
        shard = self._shard_for(sum(tensor.nbytes for tensor in tensors.values()))
        return [
            shard.add(name, tensor.dtype, tuple(tensor.shape), [tensor])
            for name, tensor in tensors.items()
        ]

    def add_parts(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]
    ) -> Written:
        """Write one tensor that is never whole in memory. parts: some of its rows, in order."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._shard_for(nbytes).add(name, dtype, shape, parts)

    def _shard_for(self, nbytes: int) -> _Shard:
        shard = self._shards[-1] if self._shards else None
        if shard is None or (shard.size and shard.size + nbytes > self._shard_bytes):
            if shard is not None:
                shard.finish()
            shard = self._new_shard()
        return shard

    def resume(self, written: Iterable[Written]) -> bool:
        """Continue after the tensors that an earlier run has written.

        Returns False, and continues nothing, where one of them is damaged.
        """
        written = list(written)
        for number, path in enumerate(_finished_shards(self._directory)):
            path.rename(self._directory / _SHARD.format(number))
        with ThreadPoolExecutor() as pool:
            whole = all(pool.map(lambda tensor: tensor.intact(self._place(tensor.file)), written))
        if not whole:
            return False
        for tensor in written:
            name = tensor.file.removesuffix(_TAIL)
            if not self._shards or self._shards[-1].path.name != name:
                if self._shards:
                    self._shards[-1].finish()
                self._new_shard()
            self._shards[-1].count(tensor)
        return True

    def restart(self) -> None:
        """Begin anew after ``resume``: everything written so far is written over."""
        for shard in self._shards:
            shard.close()
        self._shards = []

    def _place(self, file: str) -> Path:
        waits = file.endswith(_TAIL) and self._scratch is not None
        return (self._scratch if waits and self._scratch else self._directory) / file

    def _new_shard(self) -> _Shard:
        name = _SHARD.format(len(self._shards))
        self._shards.append(_Shard(self._place(name), self._place(name + _TAIL), self._room))
        return self._shards[-1]

    def _finish(self) -> None:
        if not self._shards:
            return
        self._shards[-1].finish()
        if self._scratch is None:
            for shard in self._shards:
                shard.tail.unlink(missing_ok=True)
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


def _finished_shards(directory: Path) -> list[Path]:
    """Shards that an earlier run has given their final names, in order."""
    single = directory / SINGLE_FILE
    return [single] if single.is_file() else sorted(directory.glob("model-*-of-*.safetensors"))


class _Shard:
    """One unfinished safetensors file.

    Readers want every tensor aligned to its dtype. Tensors whose size is a multiple of eight bytes
    keep what follows them aligned. The others wait in a second file, the tail, until the end.
    """

    def __init__(self, path: Path, tail: Path, room: int) -> None:
        self.path = path
        self.tail = tail
        self.room = room
        self.size = 0
        self.entries: dict[str, object] = {}
        self._odd: list[Written] = []
        # Unbuffered, since a killed process loses its buffers. Bytes of an earlier run are kept
        # until they are written over, or cut off at the end.
        self._file = _open_to_write(path)

    def add(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Iterable[Tensor]
    ) -> Written:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        odd = bool(nbytes % 8)
        place = self.tail if odd else self.path
        start = sum(o.nbytes for o in self._odd) if odd else 8 + self.room + self.size
        digest, end = hashlib.sha256(), start
        with _open_to_write(place) if odd else nullcontext(self._file) as file:
            for part in parts:
                if part.nbytes:
                    data = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                    write_at(file, end, data)
                    digest.update(data)
                    end += part.nbytes
        if name in self.entries or any(odd.name == name for odd in self._odd):
            raise RuntimeError(f"{name} is written twice")
        if end - start != nbytes:
            raise RuntimeError(f"{name} has {end - start} bytes, and its shape asks for {nbytes}")
        written = Written(
            file=place.name,
            name=name,
            dtype=DTYPE_NAMES[dtype],
            shape=list(shape),
            start=start,
            nbytes=nbytes,
            sha256=digest.hexdigest(),
        )
        self.count(written)
        return written

    def count(self, written: Written) -> None:
        """Note a tensor whose bytes are in the file."""
        if written.file == self.path.name:
            self._enter(written)
        else:
            self._odd.append(written)

    def _enter(self, written: Written) -> None:
        self.entries[written.name] = {
            "dtype": written.dtype,
            "shape": written.shape,
            "data_offsets": [self.size, self.size + written.nbytes],
        }
        self.size += written.nbytes

    def finish(self) -> None:
        # The dtypes of the largest items come first: what follows them needs less alignment.
        for odd in sorted(self._odd, key=lambda odd: -DTYPES[odd.dtype].itemsize):
            with self.tail.open("rb") as file:
                file.seek(odd.start)
                write_at(self._file, 8 + self.room + self.size, file.read(odd.nbytes))
            self._enter(odd)
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")
        ).encode()
        if len(header) > self.room:
            raise RuntimeError(f"the header of {self.path} needs more than its {self.room} bytes")
        write_at(self._file, 0, self.room.to_bytes(8, "little") + header.ljust(self.room))
        self._file.truncate(8 + self.room + self.size)
        self.close()

    def close(self) -> None:
        self._file.close()


def _open_to_write(path: Path) -> FileIO:
    return FileIO(path, "r+" if path.exists() else "w+")
