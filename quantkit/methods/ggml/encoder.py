"""Tensors quantized to ggml's types by ggml itself, with importance weights where there are any.

Where llama.cpp's library isn't installed, the types that the package gguf quantizes by itself
remain. Reference: ``ggml/src/ggml-quants.c`` of llama.cpp.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from quantkit.base.errors import InputError, MachineError
from quantkit.methods.ggml import library
from quantkit.methods.ggml.types import CASTS, PORTABLE, GgmlTensor, row_bytes

_CHUNK = 1 << 18  # elements of one call: some tens of milliseconds of work


def quantize_by_ggml(
    weight: Tensor, type: str, importance: Tensor | None = None, *, threads: int | None = None
) -> GgmlTensor:
    """Quantize ``weight`` (…, in), of any float dtype, to ``type``, such as ``Q4_K``.

    importance: the weight of every input feature's squared error, (in,), such as the mean of its
    squares over calibration tokens (llama.cpp's importance matrix); threads (default: all) changes
    the speed, never the bytes. Raises what ``Encoder`` raises.
    """
    columns = weight.shape[-1]
    encode = Encoder(type, columns, importance)
    rows = weight.reshape(-1, columns)
    # A call through ctypes releases Python's lock, so that threads quantize side by side.
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        parts = list(pool.map(encode, rows.split(rows_at_once(columns))))
    return GgmlTensor(type, torch.cat(parts), tuple(weight.shape))


def rows_at_once(columns: int) -> int:
    """How many rows one call of an ``Encoder`` should get, so that threads share the work."""
    return max(1, _CHUNK // columns)


class Encoder:
    """Quantizes rows of one length to one type; each row by itself, in any thread."""

    # A failed assertion in ggml ends the process, so all that it asserts is checked here first.

    def __init__(self, type: str, columns: int, importance: Tensor | None = None) -> None:
        """Prepare for rows of ``columns``. importance: (columns,).

        Raises InputError for an unknown type, for rows that its blocks don't divide, and for a type
        that needs importance weights without any; MachineError where this machine can't quantize
        to the type.
        """
        self.type = type
        self.row_bytes = row_bytes(type, columns)
        self._columns = columns
        if type in CASTS:
            return
        self._kind = library.load_gguf().GGMLQuantizationType[type]
        self._importance = _checked_importance(importance, columns)
        self._ggml = library.load_quantizer()
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
        # This fills tables that all threads read, so it comes before any of them quantizes.
        self._ggml.ggml_quantize_init(int(self._kind))

    def __call__(self, rows: Tensor) -> Tensor:
        """Blocks of ``rows`` (n, columns), of any float dtype: (n, row_bytes) uint8.

        Raises InputError where a row holds NaN or infinity.
        """
        if self.type in CASTS:
            values = rows.to(CASTS[self.type]).contiguous()
            _check_finite(values)
            return values.view(torch.uint8)
        values = rows.to(torch.float32).contiguous()
        _check_finite(values)
        if self._ggml is None:
            gguf = library.load_gguf()
            return torch.from_numpy(gguf.quants.quantize(values.numpy(), self._kind))
        blocks = torch.empty((len(values), self.row_bytes), dtype=torch.uint8)
        # The pointers are to tensors that live until the call returns.
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


def _checked_importance(importance: Tensor | None, columns: int) -> Tensor | None:
    """Importance weights (columns,) as ggml can use them; None where all are zero."""
    if importance is None:
        return None
    if tuple(importance.shape) != (columns,):
        raise InputError(
            f"importance weights of shape {tuple(importance.shape)} don't fit rows of {columns}"
        )
    importance = importance.to(torch.float32).contiguous()
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise InputError("importance weights must be finite and not negative")
    largest = importance.max()
    if largest == 0:
        return None
    # ggml sets a block to zero where all of its importance weights are zero. Input features that
    # are zero in all calibration rows must not lose their weights for that.
    return importance.clamp_min(float(largest) * 1e-12)


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InputError("the weight holds NaN or infinity")
