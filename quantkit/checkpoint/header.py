"""The header of a safetensors file: where each tensor is, and what it is.

The layout is that of https://github.com/huggingface/safetensors#format: eight bytes with the
length of the header, the header as JSON, then the data.
"""

from __future__ import annotations

import json
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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError("the header isn't JSON", where=str(path), fix=again) from error
    if not isinstance(header, dict):
        raise InputError("the header isn't a JSON object", where=str(path), fix=again)
    entries = {}
    for key, value in header.items():
        if key == "__metadata__":
            continue
        try:
            start, end = value["data_offsets"]
            shape, label = tuple(value["shape"]), value["dtype"]
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
        if torch.Size(shape).numel() * dtype.itemsize != end - start:
            raise InputError(
                f"tensor {key} has the shape {shape}, and its byte range is of another size",
                where=str(path),
                fix=again,
            )
        entries[key] = TensorEntry(path, dtype, shape, 8 + length + start, end - start)
    return entries
