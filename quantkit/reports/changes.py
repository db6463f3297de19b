"""What changed between two answers, word by word."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")  # space goes with the word before it
_ALIKE = 0.4  # less than this share in common, and marks would only be confusing
_MOST_WORDS = 2000  # the comparison takes time by the square of it


@dataclass(frozen=True)
class Piece:
    """A stretch of text that both have, that only the new one has, or only the old one."""

    text: str
    change: Literal["same", "added", "removed"]


def changes(old: str, new: str) -> list[Piece]:
    """The pieces that make ``new``, and between them what it lacks of ``old``."""
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    matcher = difflib.SequenceMatcher(None, before, after, False)
    if max(len(before), len(after)) > _MOST_WORDS or matcher.ratio() < _ALIKE:
        return [Piece(old, "removed"), Piece(new, "added")]
    pieces = []
    for tag, i, j, k, end in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(Piece("".join(after[k:end]), "same"))
            continue
        if j > i:
            pieces.append(Piece("".join(before[i:j]), "removed"))
        if end > k:
            pieces.append(Piece("".join(after[k:end]), "added"))
    return pieces
