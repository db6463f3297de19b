"""Chat templates in GGUF: ``tokenizer.chat_template``, and others by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.base.files import read_optional_json
from quantkit.base.names import listed
from quantkit.checkpoint.sidecars import more_templates
from quantkit.formats.gguf.architectures.architecture import Metadata


def template_metadata(templates: Mapping[str, str]) -> Metadata:
    """Every chat template under the key that llama.cpp reads it from: the default, and by name."""
    result: Metadata = {}
    if "default" in templates:
        result["tokenizer.chat_template"] = templates["default"]
    named = {
        template_key(name): text for name, text in sorted(templates.items()) if name != "default"
    }
    if named:
        result["tokenizer.chat_templates"] = list(named)
    return result | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def template_notes(templates: Mapping[str, str]) -> list[str]:
    """A note on the chat templates that get another's name in the file, if there are any."""
    names = Counter(template_key(name) for name in templates)
    lost = [name for name in templates if not name or names[template_key(name)] > 1]
    if not lost:
        return []
    names_lost = listed(repr(name) for name in lost)
    return [
        "GGUF's names of chat templates have only letters, digits and _: "
        f"of {names_lost} only the last of each name is written."
    ]


def templates_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates in a file's metadata, by name; "default" is the one without a name."""
    keys = {"default": "tokenizer.chat_template"}
    prefix = "tokenizer.chat_template."
    keys |= {key.removeprefix(prefix): key for key in metadata if key.startswith(prefix)}
    return {name: metadata[key] for name, key in keys.items() if isinstance(metadata.get(key), str)}


def template_key(name: str) -> str:
    """The name of a chat template in a file, as llama.cpp's own converter writes it."""
    return re.sub("[^A-Za-z0-9]", "_", name)


def chat_template(directory: Path) -> str | None:
    """The template that a checkpoint's directory has for chats, or None."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if more_templates(directory):  # with any file, the settings' own don't count
        return None
    template = read_optional_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # named templates: the default is the one used for chat
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
