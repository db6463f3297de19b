"""Quantized checkpoints in safetensors, read by the keys of the original checkpoint.

A format's class knows the tensors of one linear. Here is what the formats share: which keys of the
checkpoint belong to which linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import Weights
from quantkit.formats.dialects import dialect_of, quantization_of
from quantkit.formats.format import StoredLinear
from quantkit.formats.gguf.reader import GgufWeights, gguf_files
from quantkit.formats.registry import safetensors_formats
from quantkit.methods.grids import Quantized
from quantkit.methods.inputs import InputRounding


class PackedCheckpoint:
    """A quantized checkpoint, ours or another tool's. Implements ``Weights``.

    Keys are the original's: a linear's is ``MODULE.weight``, whatever tensors it is stored as.
    ``read`` returns quantized weights dequantized to float32, ``read_quantized`` their codes, both
    on ``device``, which unpacks them; tensors that aren't quantized are on the CPU.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None) -> None:
        """Raises InputError when the checkpoint isn't quantized, or its format can't be read."""
        self.checkpoint = checkpoint
        self._device = device or torch.device("cpu")
        self.directory = checkpoint.directory
        self.files = checkpoint.files
        quantization = quantization_of(self.directory, checkpoint.config)
        if quantization is None:
            raise InputError("isn't quantized", subject=str(self.directory))
        self.dialect = dialect_of(quantization, str(self.directory))
        self.format = self.dialect.format
        self._format = safetensors_formats()[self.format]
        self._modules = {
            key.removesuffix("." + marker): None
            for key in self.checkpoint.entries
            for marker in self._format.markers
            if key.endswith("." + marker)
        }

    def keys(self) -> Iterable[str]:
        yield from self.quantized()
        parts = {
            f"{module}.{part}" for module in self._modules for part in self._linear(module).suffixes
        }
        yield from (key for key in self.checkpoint.entries if key not in parts)

    def quantized(self) -> Iterable[str]:
        return [f"{module}.weight" for module in self._modules]

    def shape(self, key: str) -> tuple[int, ...]:
        linear = self._quantized(key)
        if linear is None:
            return self.checkpoint.shape(key)
        with self._fitting(linear.module):
            return self._format.weight_shape(linear)

    def scheme(self, key: str) -> str:
        """What a weight is rounded to, such as ``int4 g128 sym``; its dtype where it isn't."""
        if self._quantized(key) is None:
            return self.checkpoint.scheme(key)
        return f"{self.scheme_of(key)}{' act-order' if self.permuted(key) else ''}"

    def permuted(self, key: str) -> bool:
        """Whether a quantized weight's groups aren't of consecutive columns."""
        linear, suffix = self._linear(key.removesuffix(".weight")), self._format.group_index
        if suffix is None or suffix not in linear.suffixes:
            return False
        groups = linear.read(suffix)
        return bool((groups[1:] < groups[:-1]).any())

    def scheme_of(self, key: str) -> object:
        """The grid or other scheme that a quantized weight is rounded to."""
        linear = self._linear(key.removesuffix(".weight"))
        with self._fitting(linear.module):
            return self._format.scheme(linear)

    def stored_bytes(self, key: str) -> int:
        """Bytes of all tensors that a weight is stored as."""
        linear = self._quantized(key)
        if linear is None:
            return self.checkpoint.stored_bytes(key)
        entries = self.checkpoint.entries
        return sum(entries[f"{linear.module}.{suffix}"].nbytes for suffix in linear.suffixes)

    def parameters(self) -> int:
        return sum(math.prod(self.shape(key)) for key in self.keys())

    def read(self, key: str) -> Tensor:
        if self._quantized(key) is None:
            return self.checkpoint.read(key)
        return self.read_quantized(key).dequantize()

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        if self._quantized(key) is None:
            return self.checkpoint.read_rows(key, start, stop)
        return self.read(key)[start:stop]

    def read_quantized(self, key: str) -> Quantized:
        """The codes of a quantized weight. Raises InputError for a damaged or unknown layout."""
        linear = self._linear(key.removesuffix(".weight"))
        with self._fitting(linear.module):
            return self._format.unpack(linear)

    def input_rounding(self, key: str) -> InputRounding | None:
        """What engines do to the inputs of the linear of weight ``key``; None for nothing."""
        linear = self._quantized(key)
        return None if linear is None else self._format.input_rounding(linear)

    def _quantized(self, key: str) -> StoredLinear | None:
        """The linear of weight ``key``, or None where that isn't quantized."""
        module = key.removesuffix(".weight")
        return self._linear(module) if module in self._modules else None

    def _linear(self, module: str) -> StoredLinear:
        entries = self.checkpoint.entries
        return StoredLinear(
            module,
            self.dialect.settings,
            tuple(s for s in self._format.read_suffixes if f"{module}.{s}" in entries),
            shape=lambda suffix: self.checkpoint.shape(f"{module}.{suffix}"),
            read=lambda suffix: self.checkpoint.read(f"{module}.{suffix}").to(self._device),
        )

    @contextmanager
    def _fitting(self, module: str) -> Iterator[None]:
        """Raise InputError where a linear's tensors aren't there, or aren't those of its format."""
        try:
            yield
        except KeyError as error:
            raise InputError(
                f"tensor {error.args[0]} is missing", where=str(self.directory)
            ) from error
        except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the tensors of {module} aren't those of the format {self.format} ({error})",
                where=str(self.directory),
                fix="Is the download complete, and do config.json and the weights belong together?",
            ) from error


def open_artifact(path: Path, device: torch.device | None = None) -> Weights:
    """The weights of an artifact or of a plain checkpoint, by the original's keys.

    ``path``: a directory, or a .gguf file; device: unpacks tensors in safetensors, None: the CPU.
    Raises InputError for what can't be read.
    """
    if gguf_files(path):
        return GgufWeights(path)
    checkpoint = Checkpoint(path)
    if quantization_of(path, checkpoint.config):
        return PackedCheckpoint(checkpoint, device)
    return checkpoint
