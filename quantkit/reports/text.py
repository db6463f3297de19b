"""Text of unknown origin, such as a model's answer, made fit for HTML and XML."""

from __future__ import annotations

import re

# What XML 1.0 and HTML have no way to write, https://www.w3.org/TR/xml/#charsets
_UNWRITABLE = re.compile(
    "[^\t\n\r\u0020-\u007e\u0085\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)


def writable(text: str) -> str:
    """``text`` with control characters and lone surrogates replaced by U+FFFD."""
    return _UNWRITABLE.sub("\ufffd", text)
