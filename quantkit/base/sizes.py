"""Sizes as people write them, such as 2GB."""

from __future__ import annotations

import re

from quantkit.base.errors import InputError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str, where: str) -> int:
    """Bytes of "500MB", "2GB", "1.5GiB" or a plain number.

    where: the option or key that the text was given to. Raises InputError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip())
    size = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    if size < 1:
        raise InputError(f"isn't a size: {text}", subject=where, fix="Write it as 500MB or 2GB.")
    return size
