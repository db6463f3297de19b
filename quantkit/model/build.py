"""A model of transformers without its weights, of the class that its config.json is for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from quantkit.base.errors import InputError
from quantkit.base.files import read_json
from quantkit.checkpoint.header import check_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stored(Protocol):
    """A checkpoint whose files and tensors can be looked at."""

    @property
    def directory(self) -> Path: ...

    def keys(self) -> Iterable[str]: ...


def empty_model(checkpoint: Stored, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of ``checkpoint``, its parameters on the meta device, its buffers real.

    dtype: that it computes in (default: the config's). Python code that a checkpoint brings is
    never run. Raises InputError where transformers can't build a decoder from the config.
    """
    from transformers import AutoConfig

    from quantkit.model.refusals import refused_config

    directory, tensors = checkpoint.directory, len(list(checkpoint.keys()))
    config_file = directory / "config.json"
    # A part of a checkpoint has a config that lies in no file.
    settings = getattr(checkpoint, "settings", None)
    content = read_json(config_file) if settings is None else settings.to_dict()
    _check_dtype(content, config_file)
    _check_own_code(content, config_file)
    try:
        config = settings or AutoConfig.from_pretrained(directory, trust_remote_code=False)
        # Or transformers would build the quantized model, with its packed linears.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        kind = _model_class(config, content.get("architectures"), config_file)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int):
            check_layers("num_hidden_layers", layers, tensors, str(config_file))
        with _parameters_on_meta():
            model: PreTrainedModel = kind._from_config(
                config, dtype=dtype or config.dtype or torch.float32
            )
    except InputError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise refused_config(error, config_file) from error
    return model.eval()


def class_of(directory: Path) -> type[PreTrainedModel]:
    """The class of transformers for the model of ``directory``. Raises InputError without one."""
    from transformers import AutoConfig

    config_file = directory / "config.json"
    content = read_json(config_file)
    _check_own_code(content, config_file)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return _model_class(config, content.get("architectures"), config_file)


def _model_class(config: Any, architectures: Any, config_file: Path) -> type[PreTrainedModel]:
    """The class that config.json names, or the one that transformers has for its model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    wrappers = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    # A config of one type may stand for several classes: with images and without.
    known = {*causal.values(), *wrappers.values()}
    for name in architectures if isinstance(architectures, list) else []:
        kind = getattr(transformers, name, None) if name in known else None
        if kind is not None and isinstance(config, kind.config_class):
            return kind
    # A class for text alone may stand under the type of a whole, whose config it doesn't take.
    for names in (causal, wrappers):
        kind = getattr(transformers, names.get(config.model_type, ""), None)
        if kind is not None and isinstance(config, kind.config_class):
            return kind
    # Some types have another's class: InternLM3's is Llama's. But a class of the text model alone
    # isn't that of the whole.
    text = config.get_text_config(decoder=True)
    for names in (causal, wrappers):
        kind = getattr(transformers, names.get(config.model_type, ""), None)
        if kind is not None and (text is config or not isinstance(text, kind.config_class)):
            return kind
    named = " and ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    raise InputError(
        f"model type {config.model_type}{f' ({named})' if named else ''} doesn't generate text: "
        "transformers has no decoder for it",
        where=str(config_file),
        fix="Pass a model that generates text, with or without images beside it.",
    )


def _check_own_code(content: dict[str, Any], config_file: Path) -> None:
    """Raise InputError for a checkpoint that only its own Python code can run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if "auto_map" not in content or content.get("model_type") in CONFIG_MAPPING_NAMES:
        return
    raise InputError(
        f"model type {content.get('model_type')!r} needs Python code that comes with the "
        "checkpoint (auto_map), and quantkit runs no code from checkpoints",
        where=str(config_file),
        fix="Use a checkpoint that transformers itself has the code for, or a newer transformers.",
    )


def _check_dtype(config: dict[str, Any], config_file: Path) -> None:
    """Raise InputError for a dtype that torch doesn't have, such as "auto"."""
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
