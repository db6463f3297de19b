"""Safetensors checkpoints, one tensor at a time.

A tensor is read with ``pread`` into memory of its own: mapped pages would count as resident
memory and stay. The layout is that of https://github.com/huggingface/safetensors#format:
eight bytes of header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from quantkit.base.errors import InputError
from quantkit.base.files import read_json
from quantkit.base.names import dtype_name

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorSource(Protocol):
    """Weights by their checkpoint key, whatever they are stored as."""

    def keys(self) -> Iterable[str]: ...

    def read(self, key: str) -> torch.Tensor: ...

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """``read(key)[start:stop]``, without the rest where the storage allows it."""
        ...


@runtime_checkable
class RoundsInputs(Protocol):
    """A source whose engines round what some linears read, not only their weights."""

    def input_rounding(self, key: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What happens to the inputs of the linear whose weight is ``key``; None for nothing."""
        ...


class Weights(TensorSource, Protocol):
    """All weights of a model on disk, in whatever format.

    directory: where they lie; format: what they are stored as; files: what they are stored in.
    """

    @property
    def directory(self) -> Path: ...

    format: str
    files: list[Path]

    def quantized(self) -> Iterable[str]:
        """The keys whose weights are rounded to something coarser than a float."""
        ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def scheme(self, key: str) -> str:
        """What a weight is rounded to, such as ``int4 g128 sym`` or ``Q4_K``, or its dtype."""
        ...

    def stored_bytes(self, key: str) -> int:
        """Bytes of everything that stands for a weight."""
        ...

    def parameters(self) -> int:
        """Number of weights they stand for."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape and byte range within the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the entries of one safetensors file, checked against the file's real size.

    Raises InputError for a truncated or malformed file.
    """
    size = path.stat().st_size
    again = "The file is damaged or incomplete: download or copy it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError("truncated: its header is incomplete", where=str(path), fix=again)
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError("its header isn't JSON", where=str(path), fix=again) from error
    entries = {}
    for key, value in header.items():
        if key == "__metadata__":
            continue
        start, end = value["data_offsets"]
        if 8 + length + end > size:
            raise InputError(
                f"truncated: tensor {key} ends at byte {8 + length + end:,}, "
                f"the file has {size:,} bytes",
                where=str(path),
                fix=again,
            )
        if value["dtype"] not in DTYPES:
            raise InputError(f"tensor {key} has unknown dtype {value['dtype']}", where=str(path))
        dtype = DTYPES[value["dtype"]]
        shape = tuple(value["shape"])
        if torch.Size(shape).numel() * dtype.itemsize != end - start:
            raise InputError(
                f"tensor {key}: shape {shape} and byte range disagree", where=str(path), fix=again
            )
        entries[key] = TensorEntry(path, dtype, shape, 8 + length + start, end - start)
    return entries


class Checkpoint:
    """A Hugging Face model directory in safetensors, single file or sharded. Read-only.

    ``config`` is config.json as it is. Implements ``Weights``.
    """

    format = "safetensors"

    def __init__(self, directory: Path) -> None:
        """Read config and headers. Raises InputError when the directory isn't usable."""
        self.directory = directory
        if not directory.is_dir():
            raise InputError("no such directory", where=str(directory))
        self.config = read_json(directory / "config.json")
        self.files = _weight_files(directory)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            self.entries.update(read_header(file))

    def keys(self) -> Iterable[str]:
        return self.entries.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self.entries[key].dtype

    def quantized(self) -> Iterable[str]:
        return []

    def scheme(self, key: str) -> str:
        return dtype_name(self.entries[key].dtype)

    def stored_bytes(self, key: str) -> int:
        return self.entries[key].nbytes

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor in memory of its own, in its stored dtype."""
        entry = self.entries[key]
        return _pread(entry, key, entry.shape, entry.start)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of one tensor, in its stored dtype."""
        entry = self.entries[key]
        shape = (max(0, min(stop, entry.shape[0]) - start), *entry.shape[1:])
        row = entry.nbytes // entry.shape[0]
        return _pread(entry, key, shape, entry.start + start * row)

    def expect(self, keys: Iterable[str]) -> None:
        """Ask the system to have these tensors in its cache when they are read, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        for entry in [self.entries[key] for key in keys]:
            with entry.file.open("rb") as file:
                advice = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(file.fileno(), entry.start, entry.nbytes, advice)

    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())


def _pread(entry: TensorEntry, key: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=entry.dtype)
    if tensor.nbytes == 0:
        return tensor
    view = memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        done = 0
        while done < tensor.nbytes:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise InputError(f"ended while reading {key}", subject=str(entry.file))
            done += count
    finally:
        os.close(descriptor)
    return tensor


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        mapping = read_json(index).get("weight_map", {})
        files = [directory / name for name in sorted(set(mapping.values()))]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"names {file.name}, which is missing",
                    subject=str(index),
                    fix="Copy the missing shard beside the others.",
                )
        return files
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    found = sorted(directory.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"has its weights only as pickle ({pickles[0]}), which can run code when loaded "
            "and is never opened",
            subject=str(directory),
            fix="Save it as safetensors: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(DIR), on a machine where you trust the file.",
        )
    raise InputError(
        "holds no *.safetensors file", subject=str(directory), fix="Is this a checkpoint directory?"
    )
