"""Quantization settings of any tool's checkpoint, in the names that the formats' classes read.

Every tool has names of its own for the same layouts. Each format's class knows what other tools
call its settings. Here the class is chosen by ``quant_method``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_json
from quantkit.formats import auto_round
from quantkit.formats.format import Dialect, Unreadable
from quantkit.formats.registry import FORMATS, safetensors_formats


def quantization_of(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A checkpoint's quantization settings, or None for one that isn't quantized.

    They are in ``config``, its config.json, or in a file beside it, where older tools wrote them.
    """
    inside: dict[str, Any] | None = config.get("quantization_config")
    if inside:
        return inside
    for format in safetensors_formats().values():
        if format.old_config and (directory / format.old_config).is_file():
            return {"quant_method": format.name, **read_json(directory / format.old_config)}
    return None


def dialect_of(quantization: Mapping[str, Any], where: str) -> Dialect:
    """Understand a ``quantization_config``; ``where``: the checkpoint's path, for the error.

    Raises InputError, by name, for what can't be read.
    """
    method = str(quantization.get("quant_method")).lower()
    try:
        if method in auto_round.NAMES:
            return auto_round.dialect(quantization)
        if format := safetensors_formats().get(method):
            return format.dialect(quantization)
        raise Unreadable(method)
    except Unreadable as error:
        readable = ", ".join(format.readable for format in FORMATS.values())
        raise InputError(
            f"is quantized as {error.kind}, which can't be read; formats that can: {readable}",
            subject=where,
        ) from None
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"quantization_config isn't one of {method} ({type(error).__name__}: {error})",
            where=where,
        ) from error
