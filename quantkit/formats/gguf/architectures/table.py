"""The architectures that can be written as GGUF: their descriptions, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.gemma import GEMMA
from quantkit.formats.gguf.architectures.layer_norms import LAYER_NORMS
from quantkit.formats.gguf.architectures.llama import LLAMA
from quantkit.formats.gguf.architectures.mixtures import MIXTURES
from quantkit.formats.gguf.architectures.parts import Config
from quantkit.formats.gguf.architectures.post_norms import POST_NORMS
from quantkit.formats.gguf.architectures.qwen import QWEN
from quantkit.model.refusals import refused_config

ARCHITECTURES: tuple[Architecture, ...] = (
    *LLAMA,
    *QWEN,
    *GEMMA,
    *POST_NORMS,
    *LAYER_NORMS,
    *MIXTURES,
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


def with_defaults(config: Config, config_file: Path) -> dict[str, Any]:
    """The config as transformers reads it, with its defaults for settings that aren't there.

    Settings that a family has other names for are there by the usual ones too. Raises InputError
    for a config that transformers refuses; ``config_file``: to name then.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        read = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        usual = {name: getattr(read, name, None) for name in read.attribute_map}
        settings = {**config, **read.to_dict(), **usual}
        return {**settings, **architecture_of(config).derived(settings)}
    except Exception as error:  # a config's own code may raise anything
        raise refused_config(error, config_file) from error
