"""llama.cpp's own code: the package gguf, and ggml's C API through ctypes.

The ``xllamacpp`` wheel has llama.cpp in one shared object, which exports ggml's public functions.
Reference: ``ggml/include/ggml.h`` of llama.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

from quantkit.base.errors import not_installed

_QUANTIZING = (
    *("ggml_quantize_init", "ggml_quantize_requires_imatrix", "ggml_quantize_chunk"),
    "ggml_get_type_traits",
)


def load_gguf() -> Any:
    """The package ``gguf``. Raises MachineError where it isn't installed."""
    try:
        import gguf
    except ImportError as error:
        raise not_installed("gguf", "gguf") from error
    return gguf


@functools.cache
def load_library(symbols: tuple[str, ...]) -> ctypes.CDLL | None:
    """The shared object of xllamacpp that exports these functions, None where there is none."""
    # Any shared object of the wheel may be the one that exports them, and another version of the
    # wheel may lack one: all functions are looked up before any is called.
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
def load_quantizer() -> ctypes.CDLL | None:
    """The library with its quantizing functions declared, None where it isn't installed."""
    library = load_library(_QUANTIZING)
    if library is None:
        return None
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
    return library
