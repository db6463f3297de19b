"""GGUF models, ours and llama.cpp's: which files, what is in them, and the weights themselves.

A model may be stored in several files (``NAME-00001-of-00003.gguf``), of which the first has the
metadata.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.checkpoint.header import check_layers
from quantkit.formats.gguf.architectures.architecture import EMBEDDING
from quantkit.formats.gguf.architectures.parts import MOST_EXPERTS, Dimensions
from quantkit.formats.gguf.architectures.table import ARCHITECTURES, find_architecture
from quantkit.formats.gguf.header import Header, read_header, unreadable
from quantkit.formats.gguf.transforms import Transform
from quantkit.methods.ggml.library import load_gguf
from quantkit.methods.ggml.types import GgmlTensor

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Computed from the config, so that no checkpoint has them.
_CONSTANTS = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor is stored: name, ggml type, shape as in torch, file, offset and bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // math.prod(self.shape[:-1])


def gguf_files(path: Path) -> list[Path]:
    """The files of the GGUF model at ``path``, a file or a directory; none where there is none.

    Raises InputError where a directory holds several models, or a part is missing.
    """
    files = [path] if path.suffix == ".gguf" and not path.is_dir() else sorted(path.glob("*.gguf"))
    # mmproj files hold an encoder of images or sounds, which is a model of its own.
    files = [file for file in files if not file.name.startswith("mmproj")]
    if not files:
        return []
    match = _PART.fullmatch(files[0].name)
    if match is None:
        if len(files) > 1:
            raise InputError(
                f"holds {len(files)} .gguf files, not one",
                subject=str(path),
                fix=f"Name one of them: {files[0]}",
            )
        return files
    folder, name, count = files[0].parent, match[1], match[3]
    parts = [folder / f"{name}-{n:05d}-of-{count}.gguf" for n in range(1, int(count) + 1)]
    for part in parts:
        if not part.is_file():
            raise InputError(f"is missing: the model is in {int(count)} parts", subject=str(part))
    if others := set(files) - set(parts):
        raise InputError(f"holds another model too: {min(others).name}", subject=str(path))
    return parts


class GgufHeader:
    """The metadata and the tensors of a GGUF model, in one file or in parts.

    ``metadata``: every key; ``entries``: its tensors, in the files' order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises InputError for a damaged file."""
        self.files = list(files)
        headers = [read_header(file) for file in files]
        self.metadata = headers[0].metadata
        self.entries = [
            entry
            for file, header in zip(files, headers, strict=True)
            for entry in _entries(file, header)
        ]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def dimensions(self) -> Dimensions:
        """The sizes that the metadata has; 0 for any other.

        Raises InputError for a model whose layers differ in one.
        """

        def number(key: str) -> int:
            value = self.metadata.get(f"{self.architecture}.{key}") or 0
            if isinstance(value, list):  # one for each layer, 0 for those that have no such thing
                given = set(value) - {0}
                if len(given) > 1:
                    raise InputError(
                        f"its layers differ in {key}, which can't be read",
                        where=str(self.files[0]),
                    )
                value = max(given, default=0)
            return int(value)

        heads, hidden = number("attention.head_count"), number("embedding_length")
        known = next((a for a in ARCHITECTURES if a.name == self.architecture), None)
        tokens = next((e.shape[0] for e in self.entries if e.name == EMBEDDING), 0)
        return Dimensions(
            layers=number("block_count"),
            hidden=hidden,
            inner=number("feed_forward_length"),
            heads=heads,
            kv_heads=number("attention.head_count_kv") or heads,
            head_dim=number("attention.key_length") or hidden // max(heads, 1),
            vocabulary=number("vocab_size") or tokens,
            own={name: number(name) for name in known.sizes} if known else {},
        )


class GgufWeights:
    """The weights of a GGUF model under their checkpoint keys. Implements ``Weights``.

    ``types``: checkpoint key → ggml type. Tensors are read, not mapped, and dequantized one at
    a time, in float32, in the shape and order of rows that the checkpoint had.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        """Read the header of the file, or of the one model in a directory.

        Raises InputError for a damaged file, an unknown architecture, and tensors that models of
        the architecture don't have.
        """
        self.path = path
        self.files = gguf_files(path)
        if not self.files:
            raise InputError("holds no .gguf file", subject=str(path))
        self.directory = self.files[0].parent
        self.header = GgufHeader(self.files)
        where = str(self.files[0])
        try:
            self._architecture = find_architecture(self.header.architecture)
        except InputError as error:
            raise InputError(error.what, where=where, fix=error.fix) from error
        # What the names of the decoder's and the output embedding's tensors begin with.
        self.text_names = (
            self._architecture.blocks.rpartition(".")[0],
            self._architecture.head,
        )
        self._dimensions = self.header.dimensions()
        check_layers("block_count", self._dimensions.layers, len(self.header.entries), where)
        experts = self._dimensions.own.get("expert_count", 0)
        if experts > MOST_EXPERTS:
            raise InputError(
                f"expert_count is {experts}, and llama.cpp knows at most {MOST_EXPERTS}",
                subject=where,
            )
        keys = self._architecture.names(self._dimensions.layers)
        stacks = self._architecture.stacks(self._dimensions)
        known = keys.keys() | stacks.keys()
        unknown = [
            entry.name
            for entry in self.header.entries
            if entry.name not in known and not _CONSTANTS.fullmatch(entry.name)
        ]
        if unknown:
            raise InputError(
                f"holds {unknown[0]}, which {self.header.architecture} models don't have "
                f"({len(unknown)} such tensors)",
                subject=where,
            )
        self._tensors = {keys[e.name]: e for e in self.header.entries if e.name in keys}
        for entry in self.header.entries:
            if entry.name in stacks:
                self._tensors |= _experts(entry, stacks[entry.name])
        self._parts = self._split(where)
        output = f"{self._architecture.head}.weight"
        embedding = f"{self._architecture.embedding}.weight"
        if output not in self._tensors and embedding in self._tensors:
            # Where a file has no output matrix, llama.cpp uses the embedding; a checkpoint that it
            # is compared with may have both.
            self._tensors[output] = self._tensors[embedding]
        self.types = {key: entry.type for key, entry in self._tensors.items()}

    def _split(self, where: str) -> dict[str, list[tuple[GgufEntry, Transform]]]:
        """What the tensors that a file splits are put together from, by their checkpoint key."""
        entries = {entry.name: entry for entry in self.header.entries}
        found = {}
        for key, parts in self._architecture.splits(self._dimensions).items():
            if missing := [name for name in parts if name not in entries]:
                raise InputError(f"lacks {missing[0]}", subject=where)
            found[key] = [(entries[name], transform) for name, transform in parts.items()]
        return found

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def quantized(self) -> Iterable[str]:
        return [key for key, type in self.types.items() if type not in ("F32", "F16", "BF16")]

    def parameters(self) -> int:
        parts = [entry for split in self._parts.values() for entry, _ in split]
        shapes = {entry.name: entry.shape for entry in (*self._tensors.values(), *parts)}
        return sum(map(math.prod, shapes.values()))

    def shape(self, key: str) -> tuple[int, ...]:
        entry, transform = self._pieces(key)[0]
        return tuple(transform.undo(torch.empty(entry.shape, device="meta")).shape)

    def scheme(self, key: str) -> str:
        return self._tensors[key].type

    def stored_bytes(self, key: str) -> int:
        return sum(entry.nbytes for entry, _ in self._pieces(key))

    def read(self, key: str) -> Tensor:
        """Return one tensor in float32."""
        values = [
            transform.undo(_rows(entry, 0, math.prod(entry.shape[:-1])).view(entry.shape))
            for entry, transform in self._pieces(key)
        ]
        # Each part has zeros where the others are.
        return functools.reduce(Tensor.add_, values)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        pieces = self._pieces(key)
        entry, transform = pieces[0]
        if len(pieces) > 1 or len(entry.shape) == 1 or transform.rows != 1:
            return self.read(key)[start:stop]
        return transform.undo(_rows(entry, start, min(stop, entry.shape[0])))

    def _pieces(self, key: str) -> list[tuple[GgufEntry, Transform]]:
        """What a tensor is read from; several where the file splits it."""
        if key in self._parts:
            return self._parts[key]
        return [(self._tensors[key], self._architecture.transform(key, self._dimensions))]


def _rows(entry: GgufEntry, start: int, stop: int) -> Tensor:
    """Rows in the file's order, dequantized to float32, (stop - start, columns)."""
    blocks = torch.empty(stop - start, entry.row_bytes, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.offset + start * entry.row_bytes)
        if file.readinto(blocks.numpy().data) != blocks.nbytes:
            raise InputError(f"ends within {entry.name}", subject=str(entry.file))
    return GgmlTensor(entry.type, blocks, (stop - start, entry.shape[-1])).dequantize()


def _experts(stack: GgufEntry, keys: Sequence[str]) -> dict[str, GgufEntry]:
    """The experts that a stack holds, by their keys. Raises InputError for another number."""
    if len(stack.shape) < 2 or stack.shape[0] != len(keys) or not keys:
        raise InputError(
            f"{stack.name} is {stack.shape}, where the metadata has {len(keys)} experts",
            subject=str(stack.file),
        )
    nbytes = stack.nbytes // len(keys)
    return {
        key: replace(
            stack,
            name=f"{stack.name}[{number}]",
            shape=stack.shape[1:],
            offset=stack.offset + number * nbytes,
            nbytes=nbytes,
        )
        for number, key in enumerate(keys)
    }


def _entries(file: Path, header: Header) -> Iterator[GgufEntry]:
    gguf = load_gguf()
    for info in header.tensors:
        try:
            kind = gguf.GGMLQuantizationType(info.type)
        except ValueError as error:
            raise unreadable(file, error) from error
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(info.shape) * size // elements
        if info.offset + nbytes > header.nbytes:
            raise unreadable(file, ValueError(f"it ends within {info.name}"))
        yield GgufEntry(
            name=info.name,
            type=kind.name,
            shape=info.shape,
            file=file,
            offset=info.offset,
            nbytes=nbytes,
        )
