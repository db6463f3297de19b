"""What a method may ask to be measured while the calibration rows pass through the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.calibration.statistics import Kind

# The weights that a block has when the calibration rows pass through it: those of the checkpoint,
# the quantized ones, or both side by side, so that the drift between them can be corrected (GPTAQ).
Propagate = Literal["original", "quantized", "corrected"]


@dataclass(frozen=True)
class Needs:
    """What a method needs to know of the inputs of linears.

    kind: the second moment that is summed, XᵀX (``gram``) or its diagonal alone (``diagonal``);
    folds: whether the method rescales inputs, so that folds must be found; propagate: the weights
    that the rows pass through; apart: whether each input is used by itself, on whatever device its
    statistics are.
    """

    kind: Kind
    folds: bool = False
    propagate: Propagate = "original"
    apart: bool = False

    @property
    def independent(self) -> bool:
        """Whether the statistics depend on the checkpoint alone, not on how it is quantized."""
        return self.propagate == "original"
