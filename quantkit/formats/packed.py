"""Quantized checkpoints in safetensors, written and read as the weights they stand for.

The formats' own files know one linear's tensors; here is what they share: which keys belong
together, and a linear going by the key that its weight had before it was quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint, Weights
from quantkit.formats import (
    awq as awq_gemm,
)
from quantkit.formats import (
    bitsandbytes as bnb,
)
from quantkit.formats import (
    compressed_tensors as compressed,
)
from quantkit.formats import (
    gptq as gptq_v1,
)
from quantkit.formats.dialects import dialect_of, quantization_of
from quantkit.formats.gguf.reader import GgufWeights, gguf_files
from quantkit.methods.fp8 import Fp8Tensor
from quantkit.methods.grids import Quantized, QuantizedTensor
from quantkit.methods.inputs import Rounding

_FORMATS: dict[str, ModuleType] = {
    "awq": awq_gemm,
    "gptq": gptq_v1,
    "compressed-tensors": compressed,
    "bitsandbytes": bnb,
}


def pack(format_name: str, key: str, tensor: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for the weight ``key`` in a format, by their keys.

    dtype: of the model, in which compressed-tensors keeps scales.
    """
    module, codec = key.removesuffix(".weight"), _FORMATS[format_name]
    if isinstance(tensor, QuantizedTensor | Fp8Tensor):
        tensor = tensor.cpu()
    parts = codec.pack(tensor, dtype) if codec is compressed else codec.pack(tensor)
    return {f"{module}.{suffix}": part for suffix, part in parts.items()}


def packed_keys(format_name: str, key: str) -> list[str]:
    """Every key that ``pack`` may give."""
    module = key.removesuffix(".weight")
    return [f"{module}.{suffix}" for suffix in _FORMATS[format_name].SUFFIXES]


class PackedCheckpoint:
    """A checkpoint whose config.json names one of the formats. Implements ``Weights``.

    ``read`` gives quantized weights dequantized to float32; ``read_quantized`` gives their codes.
    ``dialect`` is what config.json says of them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises InputError when the format is unknown."""
        self.checkpoint = checkpoint
        self.directory = checkpoint.directory
        self.files = checkpoint.files
        quantization = quantization_of(self.directory, checkpoint.config)
        if quantization is None:
            raise InputError("isn't quantized", subject=str(self.directory))
        self.dialect = dialect_of(quantization, str(self.directory))
        self.format = self.dialect.format
        self._codec = _FORMATS[self.format]
        self._modules = {
            key.removesuffix("." + marker): None
            for key in self.checkpoint.entries
            for marker in self._codec.MARKERS
            if key.endswith("." + marker)
        }

    @cached_property
    def _parts(self) -> set[str]:
        return {f"{module}.{suffix}" for module in self._modules for suffix in self._codec.READ}

    def keys(self) -> Iterable[str]:
        yield from (f"{module}.weight" for module in self._modules)
        yield from (key for key in self.checkpoint.entries if key not in self._parts)

    def quantized(self) -> Iterable[str]:
        return [f"{module}.weight" for module in self._modules]

    def shape(self, key: str) -> tuple[int, ...]:
        module = key.removesuffix(".weight")
        if module not in self._modules:
            return self.checkpoint.shape(key)
        try:
            result: tuple[int, ...] = self._codec.weight_shape(
                lambda suffix: self.checkpoint.shape(f"{module}.{suffix}"),
                lambda suffix: self.checkpoint.read(f"{module}.{suffix}"),
            )
        except KeyError as error:
            raise self._lacks(error) from error
        return result

    def scheme(self, key: str) -> str:
        """What a weight is rounded to, such as ``int4 g128 sym``; its dtype where it isn't."""
        module = key.removesuffix(".weight")
        if module not in self._modules:
            return self.checkpoint.scheme(key)
        return f"{self.scheme_of(key)}{' act-order' if self.permuted(key) else ''}"

    def permuted(self, key: str) -> bool:
        """Whether a quantized weight's groups aren't of consecutive columns."""
        module = key.removesuffix(".weight")
        for suffix in self._codec.READ:
            if suffix.endswith("g_idx") and f"{module}.{suffix}" in self.checkpoint.entries:
                groups = self.checkpoint.read(f"{module}.{suffix}")
                return bool((groups[1:] < groups[:-1]).any())
        return False

    def scheme_of(self, key: str) -> object:
        """The grid, or whatever else a quantized weight is rounded to."""
        module = key.removesuffix(".weight")
        try:
            return self._codec.scheme(
                lambda suffix: self.checkpoint.shape(f"{module}.{suffix}"),
                lambda suffix: self.checkpoint.read(f"{module}.{suffix}"),
                self.dialect.settings,
                module,
            )
        except KeyError as error:
            raise self._lacks(error) from error

    def stored_bytes(self, key: str) -> int:
        """Bytes of everything that stands for a weight."""
        module = key.removesuffix(".weight")
        if module not in self._modules:
            return self.checkpoint.stored_bytes(key)
        parts = [f"{module}.{suffix}" for suffix in self._codec.READ]
        entries = self.checkpoint.entries
        return sum(entries[part].nbytes for part in parts if part in entries)

    def parameters(self) -> int:
        return sum(math.prod(self.shape(key)) for key in self.keys())

    def read(self, key: str) -> Tensor:
        if key.removesuffix(".weight") in self._modules:
            return self.read_quantized(key).dequantize()
        return self.checkpoint.read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        if key.removesuffix(".weight") in self._modules:
            return self.read(key)[start:stop]
        return self.checkpoint.read_rows(key, start, stop)

    def read_quantized(self, key: str) -> Quantized:
        module = key.removesuffix(".weight")
        tensors = {
            suffix: self.checkpoint.read(f"{module}.{suffix}")
            for suffix in self._codec.READ
            if f"{module}.{suffix}" in self.checkpoint.entries
        }
        try:
            result: Quantized = self._codec.unpack(tensors, self.dialect.settings, module)
        except KeyError as error:
            raise self._lacks(error, module) from error
        return result

    def input_rounding(self, key: str) -> Rounding | None:
        """What engines do to the inputs of the linear of weight ``key``; None for nothing."""
        module = key.removesuffix(".weight")
        if self._codec is not compressed or module not in self._modules:
            return None
        return compressed.input_rounding(
            module,
            self.dialect.settings,
            lambda suffix: self.checkpoint.read(f"{module}.{suffix}"),
        )

    def _lacks(self, error: KeyError, module: str | None = None) -> InputError:
        name = f"{module}.{error.args[0]}" if module else error.args[0]
        return InputError(f"tensor {name} is missing", where=str(self.directory))


def open_artifact(path: Path) -> Weights:
    """The weights of an artifact, or of a plain checkpoint, by the original's keys.

    ``path``: its directory, or a .gguf file.
    """
    if gguf_files(path):
        return GgufWeights(path)
    checkpoint = Checkpoint(path)
    if quantization_of(path, checkpoint.config):
        return PackedCheckpoint(checkpoint)
    return checkpoint
