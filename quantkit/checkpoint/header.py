"""The header of a safetensors file: where each tensor is, and what it is.

The layout is that of https://github.com/huggingface/safetensors#format: eight bytes with the
length of the header, the header as JSON, then the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.base.contents import mistaken_content
from quantkit.base.errors import InputError

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


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file. start: of its bytes, from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by key.

    Raises InputError for a malformed header and for a truncated file.
    """
    size = path.stat().st_size
    again = "The file is damaged or incomplete: download or copy it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            if mistaken := mistaken_content(path):
                raise mistaken
            raise InputError(
                "the file is truncated: its header is incomplete", where=str(path), fix=again
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise InputError("the header isn't JSON", where=str(path), fix=again) from error
    if not isinstance(header, dict):
        raise InputError("the header isn't a JSON object", where=str(path), fix=again)
    entries = {}
    for key, value in header.items():
        if key == "__metadata__":
            continue
        try:
            start, end = _counts(value["data_offsets"])
            shape, label = _counts(value["shape"]), str(value["dtype"])
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"the header's entry of {key} is malformed", where=str(path), fix=again
            ) from error
        if 8 + length + end > size:
            raise InputError(
                f"the file is truncated: tensor {key} ends at byte {8 + length + end:,}, "
                f"and there are {size:,} bytes",
                where=str(path),
                fix=again,
            )
        if label not in DTYPES:
            raise InputError(f"tensor {key} has the unknown dtype {label}", where=str(path))
        dtype = DTYPES[label]
        if math.prod(shape) * dtype.itemsize != end - start:
            raise InputError(
                f"tensor {key} has the shape {shape}, and its byte range is of another size",
                where=str(path),
                fix=again,
            )
        entries[key] = TensorEntry(path, dtype, shape, 8 + length + start, end - start)
    return entries


def check_layers(key: str, layers: int, tensors: int, where: str) -> None:
    """Raise InputError for more layers than tensors: their names alone might take hours to make."""
    if layers > tensors:
        raise InputError(
            f"{key} is {layers}, and there are only {tensors} tensors",
            where=where,
            fix="Do the settings and the weights belong together?",
        )


def _counts(values: object) -> tuple[int, ...]:
    """A list of whole numbers that aren't negative. Raises TypeError or ValueError for others."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError(values)
    if any(value < 0 or value >= 1 << 63 for value in values):
        raise ValueError(values)
    return tuple(values)
