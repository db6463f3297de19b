"""The architectures that can be written as GGUF: their descriptions, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.deepseek import DEEPSEEK
from quantkit.formats.gguf.architectures.gemma import GEMMA
from quantkit.formats.gguf.architectures.hybrids import HYBRIDS
from quantkit.formats.gguf.architectures.layer_norms import LAYER_NORMS
from quantkit.formats.gguf.architectures.llama import LLAMA
from quantkit.formats.gguf.architectures.mixtures import MIXTURES
from quantkit.formats.gguf.architectures.parts import Config
from quantkit.formats.gguf.architectures.post_norms import POST_NORMS
from quantkit.formats.gguf.architectures.qwen import QWEN
from quantkit.formats.gguf.architectures.state_spaces import STATE_SPACES
from quantkit.model.refusals import refused_config

ARCHITECTURES: tuple[Architecture, ...] = (
    *LLAMA,
    *QWEN,
    *GEMMA,
    *POST_NORMS,
    *LAYER_NORMS,
    *HYBRIDS,
    *STATE_SPACES,
    *MIXTURES,
    *DEEPSEEK,
)


def find_architecture(name: str) -> Architecture:
    """An architecture by llama.cpp's name. Raises InputError for an unknown one."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
    raise InputError(
        f"the architecture {name!r} can't be read", fix=f"Those that can be read: {known}."
    )


def architecture_of(config: Config) -> Architecture:
    """The architecture that a config's model is written as.

    Raises InputError, with the list of those that work, for another model_type.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(sorted(name for a in ARCHITECTURES for name in a.model_types))
    raise InputError(
        f"model_type {model_type!r} can't be written as GGUF",
        where="config.json",
        fix=f"Those that can: {known}.",
    )


def read_config(config: Config, config_file: Path) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that a config's text model is written as, and the text model's settings.

    Settings are those that transformers reads, with its defaults for what isn't there. Those that
    a family has other names for are there by the usual ones too, and so is ``vision_config``.
    Raises InputError for a config that transformers refuses, ``config_file`` to be named then, and
    for a model_type that can't be written.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return architecture_of(config), dict(config)
    try:
        whole = CONFIG_MAPPING[config["model_type"]].from_dict(_numbers(dict(config)))
        text = whole.get_text_config(decoder=True)
        usual = {name: getattr(text, name, None) for name in text.attribute_map}
        settings = {**text.to_dict(), **usual}
        if text is whole:
            settings = {**config, **settings}
        else:
            settings["vision_config"] = whole.to_dict().get("vision_config")
            settings["tie_word_embeddings"] = whole.tie_word_embeddings
    except Exception as error:  # a config's own code may raise anything
        raise refused_config(error, config_file) from error
    architecture = architecture_of(settings)
    return architecture, {**settings, **architecture.derived(settings)}


def _numbers(value: Any) -> Any:
    """A config's value, with infinity as a number, which transformers writes as an object."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value
