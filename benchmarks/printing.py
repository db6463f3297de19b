"""Progress on stderr, and names for files."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print a line of progress; results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def slug(text: str) -> str:
    """``text`` as a file name: letters and digits in lower case, hyphens for anything else."""
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower()).strip("-")
