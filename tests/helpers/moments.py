"""Second moments that tests make up."""

from __future__ import annotations

from torch import Tensor

from quantkit.calibration.statistics import Diagonal


class Known(Diagonal):
    """The moment of a Gram matrix that there is."""

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    def diagonal(self) -> Tensor:
        return self.gram.diagonal()

    def matrix(self, order: Tensor | None = None) -> Tensor:
        return self.gram.clone() if order is None else self.gram[order][:, order]
