"""Parameters that transformers makes of several tensors of a checkpoint, or of parts of one.

Its converters say how, as code. What they do to a tensor's elements is found by running them on
tensors whose values are their own places: no converter is described here.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quantkit.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform


class Shapes(Protocol):
    """A checkpoint whose tensors' shapes can be asked for."""

    def shape(self, key: str) -> tuple[int, ...]: ...


def transforms(model: PreTrainedModel) -> tuple[list[WeightTransform], list[WeightConverter]]:
    """How transformers renames a checkpoint's keys, and how it makes new tensors, for ``model``."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(model)
    converters = [item for item in found if isinstance(item, WeightConverter)]
    return [item for item in found if not isinstance(item, WeightConverter)], converters


class Fusion:
    """The tensors that one converter of transformers takes together.

    name: of the first parameter that it makes; keys: of the checkpoint's tensors, in the order in
    which transformers hands them over.
    """

    def __init__(
        self,
        name: str,
        patterns: Mapping[str, str],
        model: PreTrainedModel,
        renamings: Sequence[WeightTransform],
        converters: Sequence[WeightConverter],
    ) -> None:
        """patterns: for each key, the pattern of the converter that it matches; renamings,
        converters: see ``transforms``.
        """
        from transformers.core_model_loading import apply_renamings, dot_natural_key

        self.name = name
        self.keys = sorted(patterns, key=dot_natural_key)
        self._patterns, self._model = patterns, model
        renamed = apply_renamings(self.keys[0], renamings)
        fitting = [c for c in converters if c.rename_source_key(renamed)[1]]
        # Some renamings depend on the keys before, which these haven't seen.
        pattern = patterns[self.keys[0]]
        self._converter = next(c for c in (*fitting, *converters) if pattern in c.source_patterns)

    def targets(
        self, checkpoint: Shapes, wanted: Mapping[str, tuple[int, ...]], where: str
    ) -> list[str]:
        """The parameters that are made. Raises InputError where they don't fit ``wanted``."""
        made = self.convert(
            lambda key: torch.empty(checkpoint.shape(key), device="meta"), self._model, where
        )
        for name, value in made.items():
            if name not in wanted or tuple(value.shape) != wanted[name]:
                asked = wanted.get(name, "no such parameter")
                raise InputError(
                    f"transformers makes {name} of {len(self.keys)} tensors such as "
                    f"{self.keys[0]}, which gives {tuple(value.shape)}; config.json asks for "
                    f"{asked}",
                    where=where,
                    fix="Is the download complete, and do config.json and the weights belong "
                    "together?",
                )
        return list(made)

    def convert(
        self, read: Callable[[str], Tensor], model: Any = None, where: str = ""
    ) -> dict[str, Tensor]:
        """The parameters, by name, of the tensors that ``read`` gives for their keys.

        model: whose parameters' shapes the converter may ask for. Raises InputError where the
        converter fails.
        """
        converter = copy.copy(self._converter)
        # It gathers tensors in itself, and is shared by all layers.
        converter.collected_tensors = defaultdict(list)
        converter.layer_targets = defaultdict(set)
        try:
            for key in self.keys:
                converter.add_tensor(self.name, key, self._patterns[key], read(key))
            made: dict[str, Tensor] = converter.convert(
                self.name, model=model or self._model, config=self._model.config
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"transformers can't make {self.name} of {len(self.keys)} tensors such as "
                f"{self.keys[0]}: {reason}",
                where=where or None,
                fix="Is the download complete?",
            ) from error
        return made

    def trace(self, checkpoint: Shapes, keep: int) -> dict[str, Tensor]:
        """Which element of which tensor becomes which element of a parameter, int64 by name.

        An element is ``number * 2**32 + place``: the place of ``keys[number]`` in ``keys``, and its
        own in that tensor. The tensors are smaller than the checkpoint's: all lengths but ``keep``,
        the number of experts, are divided by the same number, which a converter can't tell.
        """
        shapes = {key: checkpoint.shape(key) for key in self.keys}
        lengths = {n for shape in shapes.values() for n in shape if n != keep}
        # Halves, since a converter may cut a tensor in two.
        divisor = math.gcd(*(n if n % 2 else n // 2 for n in lengths)) or 1

        def places(key: str) -> Tensor:
            shape = [n if n == keep else n // divisor for n in shapes[key]]
            start = self.keys.index(key) << 32
            return torch.arange(start, start + math.prod(shape)).view(shape)

        return self.convert(places, _Shrunk(self._model, divisor, keep))


class _Shrunk:
    """A model as a converter sees it whose parameters have their lengths divided."""

    def __init__(self, model: PreTrainedModel, divisor: int, keep: int) -> None:
        self._model, self._divisor, self._keep = model, divisor, keep

    def get_parameter(self, name: str) -> Tensor:
        shape = self._model.get_parameter(name).shape
        lengths = [n if n == self._keep else n // self._divisor for n in shape]
        return torch.empty(lengths, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
