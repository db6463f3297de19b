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
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, Weights
from quantkit.errors import InputError
from quantkit.formats import awq_gemm, bnb, compressed, gptq_v1
from quantkit.quantizers.fp8 import Fp8Tensor
from quantkit.quantizers.grid import Quantized, QuantizedTensor
from quantkit.quantizers.inputs import Rounding

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
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises InputError when the format is unknown."""
        self.checkpoint = checkpoint
        self.directory = checkpoint.directory
        self.files = checkpoint.files
        self._quantization: dict[str, Any] = checkpoint.config["quantization_config"]
        self.format = str(self._quantization.get("quant_method"))
        if self.format not in _FORMATS:
            raise InputError(
                f"is quantized as {self.format}, which can't be read; "
                f"formats that can: {', '.join(_FORMATS)}, gguf",
                where=str(self.directory),
            )
        self._codec = _FORMATS[self.format]
        self._modules = {
            key.removesuffix("." + self._marker): key
            for key in self.checkpoint.entries
            if key.endswith("." + self._marker)
        }

    @property
    def _marker(self) -> str:
        """The suffix that only a quantized linear has."""
        marker: str = self._codec.MARKER
        return marker

    @cached_property
    def _parts(self) -> set[str]:
        suffixes = self._codec.SUFFIXES
        return {f"{module}.{suffix}" for module in self._modules for suffix in suffixes}

    def keys(self) -> Iterable[str]:
        yield from (f"{module}.weight" for module in self._modules)
        yield from (key for key in self.checkpoint.entries if key not in self._parts)

    def quantized(self) -> Iterable[str]:
        return [f"{module}.weight" for module in self._modules]

    def shape(self, key: str) -> tuple[int, ...]:
        module = key.removesuffix(".weight")
        if module not in self._modules:
            return self.checkpoint.shape(key)
        result: tuple[int, ...] = self._codec.weight_shape(
            lambda suffix: self.checkpoint.shape(f"{module}.{suffix}"),
            lambda suffix: self.checkpoint.read(f"{module}.{suffix}"),
        )
        return result

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
            for suffix in self._codec.SUFFIXES
            if f"{module}.{suffix}" in self.checkpoint.entries
        }
        try:
            result: Quantized = self._codec.unpack(tensors, self._quantization, module)
        except KeyError as error:
            raise InputError(
                f"tensor {module}.{error.args[0]} is missing", where=str(self.directory)
            ) from error
        return result

    def input_rounding(self, key: str) -> Rounding | None:
        """What engines do to the inputs of the linear of weight ``key``; None for nothing."""
        module = key.removesuffix(".weight")
        if self._codec is not compressed or module not in self._modules:
            return None
        return compressed.input_rounding(module, self._quantization)


def open_artifact(directory: Path) -> Weights:
    """The weights of an artifact, or of a plain checkpoint, by the original's keys."""
    if files := sorted(directory.glob("*.gguf")):
        from quantkit.formats.gguf_file import GgufWeights

        if len(files) > 1:
            raise InputError(f"holds {len(files)} .gguf files, not one", where=str(directory))
        return GgufWeights(files[0])
    checkpoint = Checkpoint(directory)
    if checkpoint.config.get("quantization_config"):
        return PackedCheckpoint(checkpoint)
    return checkpoint
