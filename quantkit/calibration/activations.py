"""The calibration rows' hidden states between two blocks, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Blocks write the last two files in turn, never the one that they read: a run that was killed
# inside a block starts that block again with the very same inputs. The first hidden states have a
# file of their own: a new run embeds the rows again and writes it before it looks at a snapshot,
# which must still be whole then.
_FILES = ("start", "a", "b")


@dataclass(frozen=True)
class Snapshot:
    """A file that holds all hidden states, and its SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class _Slot:
    """Where one tensor is stored in each of the files, and what it is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class HiddenStates:
    """One tensor for each batch of rows, which every block replaces by its output.

    directory: where a copy is kept on disk, for a later run to resume from (None: nowhere);
    budget: bytes that the tensors may take in memory, beyond which only the disk holds them (None:
    no limit; without a directory there is none); name: what the names of the files begin with.
    """

    def __init__(
        self, directory: Path | None = None, budget: int | None = None, name: str = "hidden"
    ) -> None:
        self._directory = directory
        self._files = [f"{name}-{file}" for file in _FILES]
        self._budget = budget
        self._tensors: list[Tensor | None] = []  # None: on disk only
        self._slots: list[_Slot] = []
        self._nbytes = 0
        self._current = 0  # the file that holds what ``read`` returns
        self._hash = hashlib.sha256()

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Add the first hidden states, one tensor for each further batch."""
        for tensor in tensors:
            self._slots.append(_Slot(self._nbytes, tensor.shape, tensor.dtype, tensor.device))
            self._nbytes += tensor.nbytes
            self._tensors.append(tensor)
            if self.spilled:
                # The tensors added before the budget was exceeded move to the disk too.
                for index, held in enumerate(self._tensors):
                    if held is not None:
                        self._store(0, index, held)
                        self._tensors[index] = None

    @property
    def spilled(self) -> bool:
        """Whether the tensors exceed their budget, so that only the disk holds them."""
        over = self._budget is not None and self._nbytes > self._budget
        return over and self._directory is not None

    def read(self, index: int) -> Tensor:
        """The current hidden states of batch ``index``."""
        tensor = self._tensors[index]
        if tensor is not None:
            return tensor
        slot = self._slots[index]
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
        self._tensors[index] = None if self.spilled else tensor
        if self._directory is not None:
            if index == 0:
                self._hash = hashlib.sha256()
            self._hash.update(self._store(self._next(), index, tensor))

    def replace(self, index: int, tensor: Tensor) -> None:
        """Overwrite the current hidden states of batch ``index`` by others of the same shape."""
        if self.spilled:
            self._store(self._current, index, tensor)
        else:
            self._tensors[index] = tensor

    def commit(self) -> Snapshot | None:
        """Make what was written current; returns the file that holds it, where there is one."""
        if self._directory is None or not self._tensors:
            return None
        self._current = self._next()
        return Snapshot(self._path(self._current).name, self._hash.hexdigest())

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
        count = len(self._tensors)
        self._tensors = [None] * count
        if not self.spilled:
            self._tensors = [self.read(index) for index in range(count)]
        return True

    def _next(self) -> int:
        return 2 if self._current == 1 else 1

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
