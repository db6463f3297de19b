"""A checkpoint directory whose tensors are read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from quantkit.base.errors import InputError
from quantkit.base.files import read_json
from quantkit.base.names import dtype_name
from quantkit.checkpoint.header import TensorEntry, read_header
from quantkit.checkpoint.sidecars import Sidecars
from quantkit.checkpoint.weight_files import check_is_model, check_overlaps, weight_files
from quantkit.checkpoint.wrappers import unwrap_entries


class Checkpoint:
    """A Hugging Face model directory in safetensors, in one file or in shards.

    config: the content of config.json; files: that hold the tensors; entries: of the tensors, by
    key, without the names of a wrapper that the model was saved in. Implements ``Weights``.
    """

    format = "safetensors"

    def __init__(self, directory: Path) -> None:
        """Read the config and the headers.

        Raises InputError where one is missing or malformed, and for weights stored as pickle.
        """
        self.directory = directory
        if not directory.is_dir():
            raise InputError("no such directory", where=str(directory))
        check_is_model(directory)
        self.config = read_json(directory / "config.json")
        if not isinstance(self.config.get("quantization_config") or {}, dict):
            raise InputError(
                f"quantization_config is {self.config['quantization_config']!r}, no JSON object",
                where=str(directory / "config.json"),
                fix="Remove that key from a checkpoint that isn't quantized.",
            )
        self.files = weight_files(directory, self.config)
        entries: dict[str, TensorEntry] = {}
        headers = {file: read_header(file) for file in self.files}
        check_overlaps(directory, {file: header.keys() for file, header in headers.items()})
        # As in transformers, the last file counts where an indexed tensor is in several.
        for header in headers.values():
            entries.update(header)
        self.entries = unwrap_entries(directory, entries)

    @property
    def sidecars(self) -> Sidecars:
        """The files beside the weights."""
        return Sidecars.of(self.directory)

    @property
    def tokenizer(self) -> Path:
        """The directory with its tokenizer, chat templates and generation config."""
        return self.directory

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
        """One tensor in its stored dtype."""
        entry = self.entries[key]
        return _pread(entry, key, entry.shape, entry.start)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """``read(key)[start:stop]``, without reading the other rows."""
        entry = self.entries[key]
        shape = (max(0, min(stop, entry.shape[0]) - start), *entry.shape[1:])
        row = entry.nbytes // entry.shape[0]
        return _pread(entry, key, shape, entry.start + start * row)

    def expect(self, keys: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache, where it knows such advice."""
        if not hasattr(os, "posix_fadvise"):
            return
        for entry in [self.entries[key] for key in keys]:
            with entry.file.open("rb") as file:
                advice = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(file.fileno(), entry.start, entry.nbytes, advice)

    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())


def _pread(entry: TensorEntry, key: str, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    # Into memory of its own, not mapped: mapped pages count as resident memory, and stay.
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
                raise InputError(f"ends within {key}", subject=str(entry.file))
            done += count
    finally:
        os.close(descriptor)
    return tensor
