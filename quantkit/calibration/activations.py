"""The calibration rows' hidden states between two blocks: on the device, in memory or on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quantkit.base.background import aside, so_far, to_host
from quantkit.base.parallel import pool

# Blocks write the last two files in turn, never the one that they read: a run that was killed
# inside a block starts that block again with the very same inputs. The first hidden states have a
# file of their own: a new run embeds the rows again and writes it before it looks at a snapshot,
# which must still be whole then.
_FILES = ("start", "a", "b")


# When a copy of the hidden states is written, for a later run to resume from: after each block,
# before the next one begins; beside the blocks, after some of them; or not at all.
Copies = Literal["always", "background", "never"]

_SPEED = 1e9  # bytes a second that a copy is guessed to take before one was made


@dataclass(frozen=True)
class Snapshot:
    """A file that holds all hidden states, and its SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class _Slot:
    """Where one tensor is stored in each of the files, what it is, and whether it stays where it
    was made (otherwise it waits in the host's memory)."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stays: bool


class HiddenStates:
    """One tensor for each batch of rows, which every block replaces by its output.

    directory: where a copy is kept on disk (None: nowhere); budget: bytes that the tensors may take
    in memory, beyond which only the disk holds them (None: no limit; without a directory there is
    none); name: what the names of the files begin with; on_device: bytes that may stay on the
    device, where that has memory of its own; what exceeds them waits in the host's, and only that
    counts against ``budget`` (None: all stays, and counts); copies: when a copy is written.
    """

    def __init__(
        self,
        directory: Path | None = None,
        budget: int | None = None,
        name: str = "hidden",
        *,
        on_device: int | None = None,
        copies: Copies = "always",
    ) -> None:
        self.copies: Copies = copies if directory is not None else "never"
        self._directory = directory
        self._files = [f"{name}-{file}" for file in _FILES]
        self._budget = budget
        self._on_device = on_device
        self._tensors: list[Tensor | None] = []  # None: on disk only
        self._slots: list[_Slot] = []
        self._nbytes = 0
        self._in_host = 0  # bytes of those that count against the budget
        self._current = 0  # the file that the last copy was written to
        self._hash = hashlib.sha256()
        self._pool = pool(1) if self.copies == "background" else None
        self._closed = False
        self._copy_seconds: float | None = None

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Add the first hidden states, one tensor for each further batch."""
        for tensor in tensors:
            before = self._nbytes - self._in_host
            stays = self._on_device is not None and before + tensor.nbytes <= self._on_device
            slot = _Slot(self._nbytes, tensor.shape, tensor.dtype, tensor.device, stays)
            self._slots.append(slot)
            self._nbytes += tensor.nbytes
            self._in_host += 0 if stays else tensor.nbytes
            self._tensors.append(self._placed(slot, tensor))
            if self.spilled:
                # The tensors added before the budget was exceeded move to the disk too.
                self._so_far()()
                for index, held in enumerate(self._tensors):
                    if held is not None:
                        self._store(0, index, held)
                        self._tensors[index] = None

    @property
    def empty(self) -> bool:
        """Whether there are no rows."""
        return not self._tensors

    @property
    def spilled(self) -> bool:
        """Whether the tensors exceed their budget, so that only the disk holds them."""
        over = self._budget is not None and self._in_host > self._budget
        return over and self._directory is not None

    @property
    def copy_seconds(self) -> float:
        """How long a copy takes: as the last one did, or a guess."""
        return self._copy_seconds or self._nbytes / _SPEED

    def read(self, index: int) -> Tensor:
        """The current hidden states of batch ``index``."""
        tensor = self._tensors[index]
        slot = self._slots[index]
        if tensor is not None:
            return tensor.to(slot.device, non_blocking=True)
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        with self._path(self._current).open("rb") as file:
            file.seek(slot.offset)
            file.readinto(tensor.view(torch.uint8).numpy().data)
        return tensor.to(slot.device)

    def write(self, index: int, tensor: Tensor) -> None:
        """Set the next hidden states of batch ``index``.

        Batches are written in order; ``commit`` makes all of them current.
        """
        # In memory a batch is replaced at once, since nobody reads it again. On disk the old file
        # stays whole until the next ``commit``.
        self._tensors[index] = None if self.spilled else self._placed(self._slots[index], tensor)
        if self.spilled or self.copies == "always":
            if index == 0:
                self._hash = hashlib.sha256()
            data = self._store(self._next(), index, tensor)
            if self.copies != "never":
                self._hash.update(data)

    def replace(self, index: int, tensor: Tensor) -> None:
        """Overwrite the current hidden states of batch ``index`` by others of the same shape."""
        if self.spilled:
            self._store(self._current, index, tensor)
        else:
            self._tensors[index] = self._placed(self._slots[index], tensor)

    def commit(self, *, copy: bool = True) -> Future[Snapshot] | None:
        """Make what was written current; returns the copy of it on disk, where there is one.

        copy: whether one is to be made, where that is a question: of what is in memory, in the
        background. It is written over one that was made two copies ago.
        """
        if self._tensors and (self.spilled or self.copies == "always"):
            self._current = self._next()
            if self.copies != "never":
                return _done(Snapshot(self._files[self._current], self._hash.hexdigest()))
        elif self._pool is not None and copy and self._tensors:
            self._current = self._next()
            # A block makes new tensors, and leaves those that it was given as they are.
            held, ready = list(self._tensors), self._so_far()
            return self._pool.submit(self._copy, self._current, held, ready)
        return None

    def close(self) -> None:
        """Give up a copy that is being written, and wait until the thread has ended."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def restore(self, snapshot: Snapshot) -> bool:
        """Make the hidden states of a snapshot current; False where it is missing or damaged."""
        if self._directory is None:
            return False
        path = self._directory / snapshot.file
        if not path.is_file() or path.stat().st_size != self._nbytes:
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != snapshot.sha256:
                return False
        self._current = self._files.index(snapshot.file)
        self._tensors = [None] * len(self._tensors)
        if not self.spilled:
            for index, slot in enumerate(self._slots):
                self._tensors[index] = self._placed(slot, self.read(index))
        return True

    def _next(self) -> int:
        return 2 if self._current == 1 else 1

    def _placed(self, slot: _Slot, tensor: Tensor) -> Tensor:
        """The tensor where it waits for the next block."""
        return tensor if slot.stays or self._on_device is None else to_host(tensor)

    def _so_far(self) -> Callable[[], None]:
        """A function that waits until all tensors are complete, on whatever devices they are."""
        waits = [so_far(device) for device in {slot.device for slot in self._slots}]

        def wait() -> None:
            for each in waits:
                each()

        return wait

    def _copy(
        self, which: int, tensors: list[Tensor | None], ready: Callable[[], None]
    ) -> Snapshot:
        """Write the tensors, which are complete when ``ready`` returns; drops each on its way."""
        ready()
        started, digest = time.monotonic(), hashlib.sha256()
        for index in range(len(self._slots)):
            if self._closed:
                raise CancelledError
            tensor = tensors[index]
            assert tensor is not None
            with aside(tensor.device):
                data = to_host(tensor)
            digest.update(self._store(which, index, data))
            tensors[index] = None
        self._copy_seconds = time.monotonic() - started
        return Snapshot(self._files[which], digest.hexdigest())

    def _store(self, which: int, index: int, tensor: Tensor) -> memoryview:
        """Write a tensor to its place in one of the files; returns its bytes."""
        data = tensor.cpu().contiguous().view(torch.uint8).numpy().data
        path = self._path(which)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(self._slots[index].offset)
            file.write(data)
        return data

    def _path(self, which: int) -> Path:
        assert self._directory is not None
        return self._directory / self._files[which]


def _done(snapshot: Snapshot) -> Future[Snapshot]:
    future: Future[Snapshot] = Future()
    future.set_result(snapshot)
    return future
