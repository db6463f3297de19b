"""The record of a tensor in a file that is still being written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.base.files import holds


@dataclass(frozen=True)
class Written:
    """Where a tensor's bytes are in an unfinished file, and their digest.

    file: its name; name: the tensor's; dtype: as the format spells it; start: from the file's
    beginning.
    """

    file: str
    name: str
    dtype: str
    shape: list[int]
    start: int
    nbytes: int
    sha256: str

    def intact(self, path: Path) -> bool:
        """Whether the file at ``path`` holds these bytes."""
        return holds(path, self.start, self.nbytes, self.sha256)
