"""The model without its weights: parameters on the meta device, decoder layers found.

Buffers that are computed (rotary frequencies, masks) are real, since no checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.base.errors import InputError
from quantkit.model.names import Described, match, refuse_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Skeleton:
    """A transformers decoder with parameters on the meta device.

    model: the PreTrainedModel; layers: its decoder layers; prefix: their name, e.g.
    ``model.layers``; names: parameter name → checkpoint key, proven complete.
    """

    def __init__(
        self,
        checkpoint: Described,
        dtype: torch.dtype | None = None,
        weights: Described | None = None,
    ) -> None:
        """Build for ``checkpoint``, computing in ``dtype`` (default: the checkpoint's own).

        weights: what ``names`` are to be of, where that is another version of the same model.

        Raises InputError for configs that transformers doesn't know, encoder-decoders, mixtures
        of experts, and checkpoints whose keys don't match.
        """
        self.directory = checkpoint.directory
        self.model = _empty_model(checkpoint.directory, dtype)
        self.config: Any = self.model.config
        where = str(checkpoint.directory)
        if getattr(self.config, "is_encoder_decoder", False):
            raise InputError("is an encoder-decoder; only decoders are supported", subject=where)
        refuse_experts(self.model, self.config.model_type, where)
        self.prefix, self.layers = _find_layers(self.model, where)
        self.names = match(self.model, weights or checkpoint)

    def layer_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear modules of one layer by their name within it, in definition order."""
        return {
            name: module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def key(self, name: str) -> str:
        """The checkpoint key of a parameter."""
        return self.names[name]


def _empty_model(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config_file = directory / "config.json"
    try:
        config = AutoConfig.from_pretrained(directory)
        # A quantized checkpoint's skeleton is that of the model it was made of.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype or torch.float32
            )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"transformers can't build a decoder from it: {error}", where=str(config_file)
        ) from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules register parameters on the meta device and buffers where they are."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _find_layers(model: PreTrainedModel, where: str) -> tuple[str, nn.ModuleList]:
    """The module list that has as many members as the config has hidden layers."""
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise InputError(
            f"no list of {count} decoder layers found in {type(model).__name__}", where=where
        )
    return min(found, key=lambda item: item[0].count("."))
