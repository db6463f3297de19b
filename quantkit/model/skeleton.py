"""A model without its weights, and where its decoder layers are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.base.errors import InputError
from quantkit.base.files import read_json
from quantkit.checkpoint.header import check_layers
from quantkit.model.names import Described, match_names, refuse_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Skeleton:
    """A decoder of transformers with its parameters on the meta device.

    Its computed buffers (rotary frequencies, masks) are real, since no checkpoint holds them.
    model: of transformers; config: the model's; layers: its decoder layers; prefix: their name,
    such as ``model.layers``; names: the checkpoint key of every parameter.
    """

    def __init__(
        self,
        checkpoint: Described,
        dtype: torch.dtype | None = None,
        weights: Described | None = None,
    ) -> None:
        """Build the model of a checkpoint's config, computing in ``dtype`` (default: the config's).

        weights: another version of the same model whose keys ``names`` shall have (default: the
        checkpoint itself). Raises InputError for configs that transformers doesn't know,
        encoder-decoders, mixtures of experts, and checkpoints whose keys don't match the model.
        """
        self.directory = checkpoint.directory
        self.model = _empty_model(checkpoint, dtype)
        self.config: Any = self.model.config
        where = str(checkpoint.directory)
        if getattr(self.config, "is_encoder_decoder", False):
            raise InputError("is an encoder-decoder; only decoders are supported", subject=where)
        refuse_experts(self.model, self.config.model_type, where)
        self.prefix, self.layers = _find_layers(self.model, where)
        self.names = match_names(self.model, weights or checkpoint)

    def layer_name(self, index: int) -> str:
        """The name of a decoder layer's module."""
        return f"{self.prefix}.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one layer by their name within it, in the order of their definition."""
        return {
            name: module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def key(self, name: str) -> str:
        """The checkpoint key of a parameter."""
        return self.names[name]


def _empty_model(checkpoint: Described, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantkit.model.refusals import refused_config

    directory, tensors = checkpoint.directory, len(list(checkpoint.keys()))
    config_file = directory / "config.json"
    _check_dtype(config_file)
    try:
        config = AutoConfig.from_pretrained(directory)
        # Or transformers would build the quantized model, with its packed linears.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int):
            check_layers("num_hidden_layers", layers, tensors, str(config_file))
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype or torch.float32
            )
    except InputError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise refused_config(error, config_file) from error
    return model.eval()


def _check_dtype(config_file: Path) -> None:
    """Raise InputError for a dtype that torch doesn't have, such as "auto"."""
    config = read_json(config_file)
    # The older name counts only where there is nothing under the newer one.
    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    value = config.get(key)
    known = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
    if value is not None and not known:
        raise InputError(
            f"{key} is {value!r}, which isn't a dtype that transformers can load",
            where=str(config_file),
            fix=f'Set "{key}" to the dtype of the weights, such as "bfloat16".',
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules put the parameters that they register on the meta device, but not buffers."""
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
    """The outermost module list with as many members as the config has hidden layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of {count} decoder layers", where=where
        )
    return min(lists, key=lambda item: item[0].count("."))
