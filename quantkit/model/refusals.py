"""What transformers says against a config or a model, as errors that name the file and the key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

from quantkit.base.errors import InputError
from quantkit.base.files import read_json

# Keys of sizes and counts, in the spelling of any family.
_COUNT = re.compile(r"(num|n)_\w+|\w+_(size|dim|heads|layers)")
_NO_IMAGE = re.compile(
    "(missing|specify|Exactly 1 of).*(pixel_values|image_embeds|patches|encoder_outputs)"
    "|Bbox is required"
)
_NO_MEMORY = re.compile("allocate memory|out of memory", re.IGNORECASE)


def refused_config(error: Exception, config_file: Path) -> InputError:
    """The error for a config.json of which transformers can't make a decoder: it raised ``error``.

    Where that doesn't name a key itself, keys with values that no model has are named.
    """
    said = " ".join(str(error).split())
    where = str(config_file)
    if isinstance(error, StrictDataclassFieldValidationError):
        fix = "Correct that key: a number has no quotes, and a count no decimal point."
        return InputError(f"transformers refuses it: {said}", where=where, fix=fix)
    odd = [f"{key} is {value!r} there." for key, value in _odd(read_json(config_file), error)]
    return InputError(
        f"transformers can't build a decoder from it: {type(error).__name__}: {said}",
        where=where,
        fix=" ".join([*odd, "Correct it, or copy the model's own config.json again."])
        if odd
        else None,
    )


@contextmanager
def running(model: nn.Module, directory: Path) -> Iterator[None]:
    """Raise InputError where transformers' own code for ``model`` fails, with what it said.

    Failures of other code, and want of memory, are raised as they are.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_transformers(error) or _NO_MEMORY.search(str(error)):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if _NO_IMAGE.search(said):
            raise InputError(
                f"{type(model).__name__} reads no text without an image, a sound or a place beside "
                f"it ({said}), and quantkit calibrates and judges by text",
                where=str(directory / "config.json"),
            ) from error
        raise InputError(
            f"transformers can't run {type(model).__name__} with it: {said}",
            where=str(directory / "config.json"),
        ) from error


def _is_of_transformers(error: Exception) -> bool:
    """Whether the innermost of our and transformers' functions that ``error`` passed is theirs."""
    import transformers

    theirs, ours = str(Path(transformers.__file__).parent), str(Path(__file__).parents[1])
    innermost, step = None, error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        innermost = next((home for home in (theirs, ours) if name.startswith(home)), innermost)
        step = step.tb_next
    return innermost == theirs


def _odd(config: Mapping[str, Any], error: Exception) -> Iterator[tuple[str, Any]]:
    """Keys of a config, with their values, that are likely causes of ``error``."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", odd) for inner, odd in _odd(value, error))
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int | float):
            rows = config.get("vocab_size")
            padding = key == "pad_token_id" and isinstance(rows, int) and value >= rows
            if padding or (_COUNT.fullmatch(key) and value < 1):
                yield key, value
        elif isinstance(value, str) and (value in error.args or _is_number(value)):
            yield key, value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
