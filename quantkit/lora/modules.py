"""What merging asks of a model: which parameters are embeddings, and how weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.views import View
from quantkit.model.experts import LAST, Experts
from quantkit.model.names import renaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAVES = ("weight", "bias")


class Modules:
    """The modules of a model whose parameters may be on the meta device.

    names: parameter name → checkpoint key; views: those keys that stand for a part of a tensor;
    conv1d: names of modules that store their weight as (in, out); experts: mixtures of experts by
    name; named: names of all modules that transformers has; input: the name of the input
    embedding's weight; vocabulary: the names of all parameters that have a row for each token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Mapping[str, str],
        views: Mapping[str, View] | None = None,
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        self.names, self.views = names, views or {}
        self._rename = renaming(model)
        modules = list(model.named_modules())
        self.conv1d = {name for name, module in modules if isinstance(module, Conv1D)}
        self.experts = {name: module for name, module in modules if isinstance(module, Experts)}
        inside = tuple(f"{name}." for name in self.experts)
        self.named = [name for name, _ in modules if not (inside and name.startswith(inside))]
        self._modules = dict(modules)
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        self.input = next((f"{name}.weight" for name, m in modules if m is first), "")
        ends = [f"{n}.{leaf}" for n, m in modules if m in (first, last) for leaf in _LEAVES]
        self.vocabulary = [name for name in ends if name in names]
        self._expert_keys = {k: n for n, k in names.items() if inside and n.startswith(inside)}

    def find(self, name: str) -> str:
        """The parameter that a name in an adapter's file means.

        The layout may be an older one, which transformers renames, or that of the model without
        its head. A name that leads to no parameter is returned as it is.
        """
        if name in self.names:
            return name
        if name in self._expert_keys:  # older versions had modules with the checkpoint's names
            return self._expert_keys[name]
        found = self._rename(name)[0]
        return found if found in self.names else name

    def find_module(self, name: str) -> str:
        """The module that a name in an adapter's file means."""
        if name in self._modules:
            return name
        return self._rename(f"{name}.{LAST}")[0].removesuffix(f".{LAST}")

    def parameters_of(self, module: str) -> list[str]:
        """Names of a module's own parameters in transformers, in the order of their definition."""
        found = self._modules.get(module)
        whole: Any = found.original if isinstance(found, Experts) else found
        return [] if whole is None else [n for n, _ in whole.named_parameters(recurse=False)]

    def is_expert(self, name: str) -> bool:
        """Whether a parameter is one expert's, which transformers has none of by itself."""
        return any(name.startswith(f"{module}.") for module in self.experts)

    def shape(self, base: Checkpoint, name: str) -> tuple[int, ...]:
        """The shape of a parameter in ``base``."""
        key = self.names[name]
        view = self.views.get(key)
        return base.shape(key) if view is None else view.shape(base.shape(view.key))

    def read(self, base: Checkpoint, name: str) -> Tensor:
        """A parameter as ``base`` has it."""
        key = self.names[name]
        view = self.views.get(key)
        return base.read(key) if view is None else view.of(base.read, base.read_rows)
