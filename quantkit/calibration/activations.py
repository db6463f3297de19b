"""The calibration rows' hidden states between two blocks, in memory or on disk.

On disk two files take turns: what a block makes is written beside what it was made of, so that a
run that was killed inside a block starts that block again with the very same inputs. What the
first block starts from can be made again, and has a file of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_FILES = ("start", "a", "b")


@dataclass(frozen=True)
class Snapshot:
    """A file that holds all hidden states, and its digest."""

    file: str
    sha256: str


class HiddenStates:
    """Tensors that are replaced, one by one, by what the next block makes of them.

    directory: where to keep a copy on disk (None: nowhere). budget: bytes that they may take in
    memory; beyond it only the disk holds them (None: no limit). name: what files begin with.
    """

    def __init__(
        self, directory: Path | None = None, budget: int | None = None, name: str = "hidden"
    ) -> None:
        self._directory = directory
        self._files = [f"{name}-{file}" for file in _FILES]
        self._budget = budget
        self._tensors: list[Tensor | None] = []
        self._places: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []
        self._end = 0
        self._current = 0
        self._hash = hashlib.sha256()

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Take in the first hidden states."""
        for tensor in tensors:
            self._places.append((self._end, tensor.shape, tensor.dtype, tensor.device))
            self._end += tensor.nbytes
            self._tensors.append(tensor)
            if self.spilled:  # what came before the budget was passed goes too
                for index, kept in enumerate(self._tensors):
                    if kept is not None:
                        self._put(0, index, kept)
                        self._tensors[index] = None

    @property
    def spilled(self) -> bool:
        """Whether they take more memory than they may."""
        over = self._budget is not None and self._end > self._budget
        return over and self._directory is not None

    def read(self, index: int) -> Tensor:
        """One of the current hidden states."""
        tensor = self._tensors[index]
        if tensor is not None:
            return tensor
        offset, shape, dtype, device = self._places[index]
        tensor = torch.empty(shape, dtype=dtype)
        with self._file(self._current).open("rb") as file:
            file.seek(offset)
            file.readinto(tensor.view(torch.uint8).numpy().data)
        return tensor.to(device)

    def write(self, index: int, tensor: Tensor) -> None:
        """Put down its successor; they are written in order, and current after ``turn``."""
        self._tensors[index] = None if self.spilled else tensor
        if self._directory is not None:
            if index == 0:
                self._hash = hashlib.sha256()
            self._hash.update(self._put(self._next(), index, tensor))

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put another of the same shape in the place of a current one, which is lost."""
        if self.spilled:
            self._put(self._current, index, tensor)
        else:
            self._tensors[index] = tensor

    def turn(self) -> Snapshot | None:
        """Make what was written current. Returns where it lies on disk, if it does."""
        if self._directory is None or not self._tensors:
            return None
        self._current = self._next()
        return Snapshot(self._file(self._current).name, self._hash.hexdigest())

    def restore(self, snapshot: Snapshot) -> bool:
        """Go on from a snapshot; False where it isn't whole."""
        if self._directory is None:
            return False
        path = self._directory / snapshot.file
        if not path.is_file() or path.stat().st_size != self._end:
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != snapshot.sha256:
                return False
        self._current = self._files.index(snapshot.file)
        kept, self._tensors = self._tensors, [None] * len(self._tensors)
        if not self.spilled:
            self._tensors = [self.read(index) for index in range(len(kept))]
        return True

    def _next(self) -> int:
        return 2 if self._current == 1 else 1

    def _put(self, which: int, index: int, tensor: Tensor) -> memoryview:
        data = tensor.cpu().contiguous().view(torch.uint8).numpy().data
        path = self._file(which)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(self._places[index][0])
            file.write(data)
        return data

    def _file(self, which: int) -> Path:
        assert self._directory is not None
        return self._directory / self._files[which]
