"""What merging asks of a model: which parameters are embeddings, and how weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.model.names import renaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAVES = ("weight", "bias")


class Modules:
    """The modules of a model whose parameters may be on the meta device.

    names: parameter name → checkpoint key; conv1d: names of modules that store their weight as
    (in, out); input: the name of the input embedding's weight; vocabulary: the names of all
    parameters that have a row for each token.
    """

    def __init__(self, model: PreTrainedModel, names: Mapping[str, str]) -> None:
        from transformers.pytorch_utils import Conv1D

        self.names = names
        self._rename = renaming(model)
        modules = list(model.named_modules())
        self.conv1d = {name for name, module in modules if isinstance(module, Conv1D)}
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        self.input = next((f"{name}.weight" for name, m in modules if m is first), "")
        ends = [f"{n}.{leaf}" for n, m in modules if m in (first, last) for leaf in _LEAVES]
        self.vocabulary = [name for name in ends if name in names]

    def find(self, name: str) -> str:
        """The parameter that a name in an adapter's file means.

        The layout may be an older one, which transformers renames, or that of the model without
        its head. A name that leads to no parameter is returned as it is.
        """
        found = name if name in self.names else self._rename(name)[0]
        return found if found in self.names else name
