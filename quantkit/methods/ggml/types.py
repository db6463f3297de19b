"""llama.cpp's block types, quantized by ggml itself.

The ``xllamacpp`` wheel carries llama.cpp in one shared object that exports ggml's public C API;
``ggml_quantize_chunk`` is called through ctypes, with importance weights where there are any.
Where the wheel or one of the symbols is missing, the types that gguf-py quantizes by itself
remain. Reference: ``ggml/include/ggml.h`` and ``ggml/src/ggml-quants.c`` of llama.cpp.

A failed assertion in ggml aborts the process, so everything it asserts is checked here first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError, MachineError, not_installed

CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Quantized by gguf-py too, to the same bytes as long as there are no importance weights.
PORTABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
I_QUANTS = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
TERNARY = ("TQ1_0", "TQ2_0")
TYPES = (*CASTS, *PORTABLE, *K_QUANTS, *I_QUANTS, *TERNARY, "MXFP4")

_SYMBOLS = (
    *("ggml_quantize_init", "ggml_quantize_requires_imatrix", "ggml_quantize_chunk"),
    "ggml_get_type_traits",
)
_CHUNK = 1 << 18  # elements that one call of a worker quantizes


def load_gguf() -> Any:
    """Return the ``gguf`` package. Raises MachineError when it isn't installed."""
    try:
        import gguf
    except ImportError as error:
        raise not_installed("gguf", "gguf") from error
    return gguf


@dataclass(frozen=True)
class GgmlTensor:
    """A tensor in one of ggml's types.

    ``blocks``: uint8 (rows, bytes of a row), rows being the product of all dimensions but the
    last of ``shape``.
    """

    type: str
    blocks: Tensor
    shape: tuple[int, ...]

    def dequantize(self) -> Tensor:
        """The value in float32, of ``shape``: by ggml's decoders, or gguf-py's without them."""
        if self.type in CASTS:
            return self.blocks.view(CASTS[self.type]).float().view(self.shape)
        gguf = load_gguf()
        kind = gguf.GGMLQuantizationType[self.type]
        library = _library()
        if library is None:
            values = gguf.quants.dequantize(self.blocks.numpy(), kind)
            return torch.from_numpy(values).view(self.shape)
        result = torch.empty(self.shape)
        decode = library.ggml_get_type_traits(int(kind)).contents.to_float
        decode(self.blocks.contiguous().data_ptr(), result.data_ptr(), result.numel())
        return result


@functools.cache
def block_size(type: str) -> tuple[int, int]:
    """Return (elements, bytes) of one block. Raises InputError for a type that isn't offered."""
    if type not in TYPES:
        raise InputError(f"unknown ggml type {type!r}", fix=f"Known types: {', '.join(TYPES)}.")
    gguf = load_gguf()
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return int(elements), int(size)


def row_bytes(type: str, columns: int) -> int:
    """Return the bytes of a row. Raises InputError when blocks don't divide it."""
    elements, size = block_size(type)
    if columns % elements:
        raise InputError(f"rows of {columns} can't be cut into {type}'s blocks of {elements}")
    return columns // elements * size


def available() -> tuple[str, ...]:
    """The types that this machine can quantize to."""
    return TYPES if _library() is not None else (*CASTS, *PORTABLE)


def quantize(
    weight: Tensor, type: str, importance: Tensor | None = None, *, threads: int | None = None
) -> GgmlTensor:
    """Quantize ``weight`` (…, in_features; any float dtype) to ``type``, such as ``Q4_K``.

    ``importance``: the weight of every input feature's squared error, (in_features,), such as
    the mean of its squares over calibration tokens (llama.cpp's importance matrix). ``threads``
    (default: all) changes the speed only. Raises what ``Encoder`` raises.
    """
    columns = weight.shape[-1]
    encode = Encoder(type, columns, importance)
    rows = weight.reshape(-1, columns)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        parts = list(pool.map(encode, rows.split(rows_at_once(columns))))
    return GgmlTensor(type, torch.cat(parts), tuple(weight.shape))


def rows_at_once(columns: int) -> int:
    """How many rows one call of ``Encoder`` should get: some tens of milliseconds of work."""
    return max(1, _CHUNK // columns)


class Encoder:
    """Quantizes rows of one length to one type, in any thread; each row is independent."""

    def __init__(self, type: str, columns: int, importance: Tensor | None = None) -> None:
        """Raises InputError for an unknown type, for rows that its blocks don't divide, and for
        a type that can't do without importance; MachineError when this machine can't quantize
        to the type."""
        self.type = type
        self.row_bytes = row_bytes(type, columns)
        self._columns = columns
        if type in CASTS:
            return
        self._kind = load_gguf().GGMLQuantizationType[type]
        self._importance = _check_importance(importance, columns)
        self._ggml = _library()
        if self._ggml is None:
            if type in PORTABLE and self._importance is None:
                return
            weighted = " with importance weights" if type in PORTABLE else ""
            raise MachineError(
                f"quantizing to {type}{weighted} needs llama.cpp's library, "
                "which is not installed (package xllamacpp)",
                fix="pip install 'quantkit[gguf]'",
            )
        if self._importance is None and self._ggml.ggml_quantize_requires_imatrix(int(self._kind)):
            raise InputError(
                f"{type} can't be quantized without importance weights",
                fix="Add a calibration section to the recipe, or choose another type.",
            )
        self._ggml.ggml_quantize_init(int(self._kind))  # fills global tables: before any thread

    def __call__(self, rows: Tensor) -> Tensor:
        """Blocks of ``rows`` (n, columns; any float dtype): uint8 (n, row_bytes).

        Raises InputError for NaN and infinite values.
        """
        if self.type in CASTS:
            values = rows.to(CASTS[self.type]).contiguous()
            _check_finite(values)
            return values.view(torch.uint8)
        values = rows.to(torch.float32).contiguous()
        _check_finite(values)
        if self._ggml is None:
            return torch.from_numpy(load_gguf().quants.quantize(values.numpy(), self._kind))
        blocks = torch.empty((len(values), self.row_bytes), dtype=torch.uint8)
        written = self._ggml.ggml_quantize_chunk(
            int(self._kind),
            values.data_ptr(),
            blocks.data_ptr(),
            0,
            len(values),
            self._columns,
            None if self._importance is None else self._importance.data_ptr(),
        )
        if written != blocks.numel():
            raise MachineError(f"ggml wrote {written} bytes of {self.type}, not {blocks.numel()}")
        return blocks


@functools.cache
def load_library(symbols: tuple[str, ...]) -> ctypes.CDLL | None:
    """The shared object of xllamacpp that exports the functions, or None."""
    spec = importlib.util.find_spec("xllamacpp")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for path in sorted([*Path(folder).glob("*.so"), *Path(folder).glob("*.pyd")]):
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                continue
            if all(hasattr(library, symbol) for symbol in symbols):
                return library
    return None


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h, up to the decoder (blocks, floats, elements)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """llama.cpp's library with its quantizing functions declared, or None."""
    library = load_library(_SYMBOLS)
    if library is not None:
        _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # float * source
        ctypes.c_void_p,  # blocks
        ctypes.c_int64,  # first element
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # columns
        ctypes.c_void_p,  # float * importance, or NULL
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)


def _check_importance(importance: Tensor | None, columns: int) -> Tensor | None:
    if importance is None:
        return None
    if tuple(importance.shape) != (columns,):
        raise InputError(f"importance {tuple(importance.shape)} for rows of {columns}")
    importance = importance.to(torch.float32).contiguous()
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise InputError("importance must be finite and not negative")
    largest = importance.max()
    if largest == 0:
        return None
    # ggml sets a block whose weights are all zero to zero; an input that calibration never
    # excited must not lose its weights for that.
    return importance.clamp_min(float(largest) * 1e-12)


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InputError("holds NaN or infinite values")
