"""Ollama's Modelfile: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.base.errors import InputError

NAME = "Modelfile"

# Parameters by what they take; Ollama refuses a Modelfile with any other.
_INTEGERS = {
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "num_predict"),
    *("seed", "top_k", "repeat_last_n"),
}
_NUMBERS = {
    *("temperature", "top_p", "min_p", "typical_p"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
}
_SWITCHES = {"use_mmap"}
_TEXTS = {"stop"}
Parameter = int | float | bool | str


@dataclass(frozen=True)
class Modelfile:
    """The content of a Modelfile.

    source: the path of the weights; parameters: in order, ``stop`` as often as there are texts.
    """

    comment: str
    source: str
    template: str
    system: str | None
    parameters: tuple[tuple[str, Parameter], ...]

    def text(self) -> str:
        """The file. Raises InputError for a text that Ollama couldn't read back."""
        parts = [f"# {self.comment}", f"FROM {_path(self.source)}"]
        parts.append(f"TEMPLATE {_long(self.template, 'TEMPLATE')}")
        if self.system is not None:
            parts.append(f"SYSTEM {_long(self.system, 'SYSTEM')}")
        lines = [f"PARAMETER {name} {_value(name, value)}" for name, value in self.parameters]
        return "\n\n".join(parts) + "\n\n" + "".join(f"{line}\n" for line in lines)


def parse_parameters(settings: Sequence[str]) -> list[tuple[str, Parameter]]:
    """Parse NAME=VALUE as given on the command line.

    Raises InputError for a name that Ollama doesn't know, a value of the wrong type, and a name
    that is given twice (``stop`` may be).
    """
    parameters: list[tuple[str, Parameter]] = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        where = f"--parameter {setting}"
        if not equals or not value:
            raise InputError("isn't NAME=VALUE", subject=where, fix="Such as temperature=0.7.")
        if name not in _INTEGERS | _NUMBERS | _SWITCHES | _TEXTS:
            known = sorted(_INTEGERS | _NUMBERS | _SWITCHES | _TEXTS)
            raise InputError(
                f"Ollama has no parameter {name}", where=where, fix=f"It has {', '.join(known)}."
            )
        if name in dict(parameters) and name not in _TEXTS:
            raise InputError(f"{name} is given twice", where=where)
        parameters.append((name, _parsed(name, value, where)))
    return parameters


def _parsed(name: str, value: str, where: str) -> Parameter:
    if name in _TEXTS:
        return value
    if name in _SWITCHES:
        if value in ("true", "false"):
            return value == "true"
        raise InputError(f"{value} is neither true nor false", where=where)
    try:
        return int(value) if name in _INTEGERS else _finite(value)
    except ValueError:
        kind = "an integer" if name in _INTEGERS else "a number"
        raise InputError(f"{value} isn't {kind}", where=where) from None


def _finite(value: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _path(path: str) -> str:
    # Ollama drops characters that aren't printable, and the path ends with its line.
    if not path.isprintable() or path != path.strip():
        raise InputError(
            "has a character that a Modelfile can't hold in a path",
            subject=path,
            fix="Rename it.",
        )
    return path


def _value(name: str, value: Parameter) -> str:
    if isinstance(value, str):
        quoted = '"' in value or "\n" in value
        return _long(value, f"PARAMETER {name}") if quoted else f'"{value}"'
    return json.dumps(value)


def _long(text: str, where: str) -> str:
    """Text of any number of lines between triple quotes."""
    # A Modelfile has no escapes, so a text with triple quotes can't be written.
    if '"""' in text:
        raise InputError('holds """, which ends a text in a Modelfile', subject=where)
    bad = next((c for c in text if not c.isprintable() and c not in "\n\t"), None)
    if bad is not None:
        raise InputError(f"holds {bad!r}, which Ollama drops from a Modelfile", subject=where)
    return f'"""{text}"""'
