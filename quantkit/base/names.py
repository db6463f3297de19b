"""Names as messages and files write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHOWN = 5


def dtype_name(dtype: object) -> str:
    """The name of a ``torch.dtype`` as config.json has it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are: "a, b, c, d, e and 2 more"."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def starred(name: str) -> str:
    """A module's or tensor's name with a star for each number, such as a layer's."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
