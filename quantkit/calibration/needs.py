"""What a method may ask to be measured while the calibration rows pass through the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.calibration.statistics import Kind

# Which weights the calibration rows pass through: those of the checkpoint, those that were
# written, or both side by side, so that the drift between them can be corrected (GPTAQ).
Propagate = Literal["original", "quantized", "corrected"]


@dataclass(frozen=True)
class Needs:
    """What a method needs to know of the inputs of linears.

    kind: the second moment that is summed, XᵀX (``gram``) or its diagonal; folds: whether it must
    be observed which inputs may be rescaled; propagate: which weights the rows pass through.
    """

    kind: Kind
    folds: bool = False
    propagate: Propagate = "original"

    @property
    def independent(self) -> bool:
        """Whether the statistics are those of the checkpoint, whatever is done to its weights."""
        return self.propagate == "original"
