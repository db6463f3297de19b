"""Sizes as people write them."""

from __future__ import annotations

import re

from quantkit.base.errors import InputError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str, where: str) -> int:
    """Bytes of "500MB", "2GB", "1.5GiB" or a plain number.

    Raises InputError, which names ``where``, for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip())
    size = int(float(found[1]) * _UNITS.get(found[2], 1)) if found else 0
    if size < 1:
        raise InputError(f"isn't a size: {text}", subject=where, fix="Write 2GB.")
    return size
