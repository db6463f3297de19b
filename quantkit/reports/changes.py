"""The differences between two answers, word by word."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")  # space goes with the word before it
_ALIKE = 0.4  # answers with a smaller share in common are shown whole: marks would only confuse
_MOST_WORDS = 2000  # the time of the comparison grows with the square of the words


@dataclass(frozen=True)
class Piece:
    """A piece of text that both answers have, that only the new one has, or only the old one."""

    text: str
    change: Literal["same", "added", "removed"]


def changes(old: str, new: str) -> list[Piece]:
    """The pieces of both texts in order: without the removed ones they are ``new``, without the
    added ones ``old``."""
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
