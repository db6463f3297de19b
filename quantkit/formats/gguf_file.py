"""GGUF files: planned, and read one tensor at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, alignment 32. The
bytes are laid out by gguf-py, llama.cpp's own writer; dimensions are reversed there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import InputError
from quantkit.formats import gguf_llama as llama
from quantkit.formats import gguf_tokenizer
from quantkit.formats.gguf_mixes import TypeOverride, choose_types, find_mix
from quantkit.quantizers.ggml import GgmlTensor, load_gguf, row_bytes

_UNUSED_SUFFIX = ".rotary_emb.inv_freq"  # a buffer that old checkpoints carry; computed instead
_TOKEN_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class GgufTensorPlan:
    """One tensor of the file to be.

    ``key``: the checkpoint's key, None for a tensor computed from the config. ``shape``: as in
    torch. ``wanted``: the mix's type where ``type`` is a fallback for rows it can't hold.
    ``heads``: rows are permuted within so many heads (0: not at all).
    """

    name: str
    key: str | None
    shape: tuple[int, ...]
    type: str
    wanted: str
    nbytes: int
    heads: int = 0

    @property
    def fallback(self) -> bool:
        return self.type != self.wanted


@dataclass(frozen=True)
class GgufPlan:
    """Everything about a file but the weights themselves."""

    mix: str
    tensors: tuple[GgufTensorPlan, ...]
    metadata: llama.Metadata
    constants: dict[str, Tensor]  # tensors computed from the config, by GGUF name

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / sum(math.prod(tensor.shape) for tensor in self.tensors)


def plan_file(
    source: Checkpoint, mix: str, overrides: Iterable[TypeOverride] = (), *, name: str | None = None
) -> GgufPlan:
    """Decide on every tensor and on the metadata; no weights are read.

    ``name``: ``general.name`` (default: the directory's). An output matrix beside tied embeddings
    is the exception that is read: it must be equal, and is then left out.

    Raises InputError for a model, a tokenizer, a mix or an override that can't be written, and
    when the checkpoint's keys and shapes are not just those that its config asks for.
    """
    recipe = find_mix(mix)
    where = str(source.directory)
    metadata = {
        "general.type": "model",
        "general.name": name or source.directory.resolve().name,
        "general.file_type": recipe.file_type,
        "general.quantization_version": int(load_gguf().GGML_QUANT_VERSION),
        **llama.metadata(source.config),
        **gguf_tokenizer.metadata(source.directory, int(source.config["vocab_size"])),
    }
    keys = _used_keys(source)
    layout = llama.layout(source.config, tied=_OUTPUT not in keys)
    names = {str(llama.gguf_name(key)): key for key in keys}
    shapes = {gguf: source.shape(key) for gguf, key in names.items()}
    freqs = llama.rope_freqs(source.config)
    constants = {} if freqs is None else {llama.ROPE_FREQS: freqs}
    shapes |= {gguf: tuple(tensor.shape) for gguf, tensor in constants.items()}
    try:
        choices = choose_types(shapes, recipe, layout, overrides)
    except InputError as error:
        raise InputError(error.what, where=error.where or where, mend=error.mend) from error
    tensors = tuple(
        GgufTensorPlan(
            name=gguf,
            key=names.get(gguf),
            shape=shape,
            type=choices[gguf].type,
            wanted=choices[gguf].wanted,
            nbytes=math.prod(shape[:-1]) * row_bytes(choices[gguf].type, shape[-1]),
            heads=llama.permuted_heads(gguf, layout.heads, layout.kv_heads),
        )
        for gguf, shape in shapes.items()
    )
    return GgufPlan(mix, tensors, metadata, constants)


class GgufWeights:
    """The weights of a GGUF file under their checkpoint keys. Implements ``Weights``.

    ``types``: checkpoint key → ggml type. Tensors are read, not mapped, and dequantized one at
    a time, in float32, in the shape and order of rows that the checkpoint had.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        """Read the header. Raises InputError for a damaged file and for another architecture."""
        gguf = load_gguf()
        self.path = path
        self.files = [path]
        try:
            reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise InputError("no such file", where=str(path)) from None
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"isn't a readable GGUF file ({error})", where=str(path)) from error
        architecture = _field(reader, "general.architecture")
        if architecture != llama.ARCHITECTURE:
            raise InputError(
                f"is of architecture {architecture!r}; only {llama.ARCHITECTURE!r} can be read",
                where=str(path),
            )
        self._heads = int(_field(reader, "llama.attention.head_count"))
        self._kv_heads = int(_field(reader, "llama.attention.head_count_kv") or self._heads)
        self._tensors = {
            key: (
                tensor.name,
                tuple(int(n) for n in reversed(tensor.shape)),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
            if (key := llama.hf_key(tensor.name)) is not None
        }
        self.types: dict[str, str] = {
            key: tensor.tensor_type.name
            for tensor in reader.tensors
            if (key := llama.hf_key(tensor.name)) is not None
        }
        if (
            _OUTPUT not in self._tensors
        ):  # llama.cpp then uses the embedding; checkpoints may name it
            self._tensors[_OUTPUT] = self._tensors[_TOKEN_EMBEDDING]
            self.types[_OUTPUT] = self.types[_TOKEN_EMBEDDING]

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def parameters(self) -> int:
        shapes = {name: shape for name, shape, *_ in self._tensors.values()}
        return sum(map(math.prod, shapes.values()))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key][1]

    def read(self, key: str) -> Tensor:
        """Return one tensor in float32."""
        name, shape, *_ = self._tensors[key]
        value = self._rows(key, 0, math.prod(shape[:-1])).view(shape)
        return llama.unpermute(value, llama.permuted_heads(name, self._heads, self._kv_heads))

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        name, shape, *_ = self._tensors[key]
        if len(shape) == 1 or llama.permuted_heads(name, self._heads, self._kv_heads):
            return self.read(key)[start:stop]
        return self._rows(key, start, min(stop, shape[0]))

    def _rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows as they lie in the file, (stop - start, columns)."""
        name, shape, offset, nbytes = self._tensors[key]
        row = nbytes // math.prod(shape[:-1])
        blocks = torch.empty(stop - start, row, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(offset + start * row)
            if file.readinto(blocks.numpy().data) != blocks.nbytes:
                raise InputError(f"ended while reading {name}", where=str(self.path))
        return GgmlTensor(self.types[key], blocks, (stop - start, shape[-1])).dequantize()


def _used_keys(source: Checkpoint) -> list[str]:
    """The checkpoint's keys in the file's order, proven to be all there is and all it needs."""
    where = str(source.directory)
    present = [key for key in source.entries if not key.endswith(_UNUSED_SUFFIX)]
    shapes = llama.shapes(source.config, present)
    missing = [key for key in shapes if key not in present]
    leftover = sorted(set(present) - set(shapes))
    if missing:
        raise InputError(f"lacks {_some(missing)}", where=where)
    if leftover:
        raise InputError(
            f"has tensors that GGUF's llama architecture has no place for: {_some(leftover)}",
            where=where,
        )
    for key, shape in shapes.items():
        if source.shape(key) != shape:
            raise InputError(
                f"{key} is {source.shape(key)}; config.json asks for {shape}", where=where
            )
    tied = bool(source.config.get("tie_word_embeddings", False))
    if tied and _OUTPUT in shapes:
        if not torch.equal(source.read(_TOKEN_EMBEDDING), source.read(_OUTPUT)):
            raise InputError(
                f"ties its embeddings, yet {_OUTPUT} differs from {_TOKEN_EMBEDDING}",
                where=where,
                mend='Set "tie_word_embeddings": false in config.json if both were trained.',
            )
        del shapes[_OUTPUT]
    if not tied and _OUTPUT not in shapes:
        raise InputError(f"lacks {_OUTPUT}, and its embeddings aren't tied", where=where)
    return list(shapes)


def _field(reader: Any, key: str) -> Any:
    """The value of a metadata key, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:5])
    return shown if len(keys) <= 5 else f"{shown} and {len(keys) - 5} more"
