"""The ggml type of every tensor of a file: a mix, overrides, and fallbacks for rows it can't hold.

Reference: ``tensor_type_fallback`` and ``tensor_requires_imatrix`` in llama.cpp's
``src/llama-quant.cpp``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.architecture import EMBEDDING, OUTPUT
from quantkit.formats.gguf.mixes import EIGHT_EXPERTS, MIXES, Mix, ModelTraits
from quantkit.methods.ggml.types import CASTS, block_size

# For rows that a type's blocks don't divide; F16 where those of the fallback don't either.
FALLBACKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}

_EXPERTS = re.compile("_(exps|shexp)$")  # which the rules for a layer without experts are for too

# Without importance weights these are hardly better than noise, and ggml refuses some of them.
_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


class TypeOverride(Protocol):
    """A glob on GGUF names and the type for what it matches."""

    @property
    def match(self) -> str: ...

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class Choice:
    """The type that a tensor gets, and the one that it would have if its rows allowed it."""

    type: str
    wanted: str


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mix decides on the tensor; norms, biases, routers, kernels and the like are F32."""
    kept = (
        *("_norm.weight", ".ffn_gate_inp.weight"),
        *(".ssm_conv1d.weight", ".shortconv.conv.weight"),
    )
    return math.prod(shape[:-1]) > 1 and name.endswith(".weight") and not name.endswith(kept)


def choose_types(
    shapes: Mapping[str, tuple[int, ...]],
    mix: Mix,
    model: ModelTraits,
    overrides: Iterable[TypeOverride] = (),
) -> dict[str, Choice]:
    """Return the type of every tensor of ``shapes`` (GGUF name → shape as in torch).

    The last override that matches a name wins. Raises InputError for an override that matches
    no tensor it could apply to, or whose type can't hold a tensor's rows, and for a type that
    needs importance weights where there will be none.
    """
    choices = {}
    places = _down_places(shapes) if mix.frugal else {}
    for name, shape in shapes.items():
        if quantizable(name, shape):
            choices[name] = _choose(name, shape[-1], mix, model, places.get(name))
        else:
            choices[name] = Choice("F32", "F32")
    for override in overrides:
        for name in _matching(override, shapes):
            choices[name] = Choice(override.type, override.type)
    for name, choice in choices.items():
        _refuse_without_imatrix(name, choice.type, mix, model)
    return choices


def _down_places(names: Iterable[str]) -> dict[str, int]:
    """The number of each ffn_down among all of them, by name.

    llama.cpp counts them in mixes below three bits, where a layer with a shared expert has two.
    """
    parts = [name.split(".") for name in names if ".ffn_down" in name and name.endswith(".weight")]
    inside = sorted(parts, key=lambda part: (int(part[1]), part[2]))
    return {".".join(part): place for place, part in enumerate(inside)}


def _choose(
    name: str, columns: int, mix: Mix, model: ModelTraits, place: int | None = None
) -> Choice:
    """``place``: what counts as the layer's number, where that isn't its own."""
    wanted = _wanted(name, mix, model, place)
    is_output = name == OUTPUT or (name == EMBEDDING and model.tied)
    if is_output and not _fits(mix.base, columns):
        return Choice(_that_fits("Q8_0", columns), wanted)
    return Choice(_that_fits(wanted, columns), wanted)


def _wanted(name: str, mix: Mix, model: ModelTraits, place: int | None) -> str:
    if mix.base in CASTS:
        return mix.base
    if name == OUTPUT or (name == EMBEDDING and model.tied):
        return mix.output
    if name == EMBEDDING:
        return mix.embedding or mix.base
    parts = name.split(".")
    if parts[0] != "blk":
        return mix.base
    layer = int(parts[1]) if place is None else place
    part = "attn_v" if parts[2] == "attn_qkv" else _EXPERTS.sub("", parts[2])
    if model.experts == 8 and not mix.frugal and part in EIGHT_EXPERTS:
        return EIGHT_EXPERTS[part]
    rules = (t for where, rule, t in mix.blocks if where == part and rule(layer, model))
    wanted = next(rules, mix.base)
    promoted = part == "attn_v" and model.is_70b and not mix.frugal
    return "Q5_K" if promoted and wanted in ("Q3_K", "Q4_K") else wanted


def _matching(override: TypeOverride, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    where = f"override {override.match}"
    names = [
        name
        for name, shape in shapes.items()
        if quantizable(name, shape) and fnmatchcase(name, override.match)
    ]
    if not names:
        raise InputError(
            "matches no tensor that can be quantized",
            subject=where,
            fix="Patterns match GGUF names such as blk.0.ffn_down.weight.",
        )
    for name in names:
        if not _fits(override.type, shapes[name][-1]):
            raise InputError(
                f"{name} has rows of {shapes[name][-1]}, which {override.type}'s blocks of "
                f"{block_size(override.type)[0]} don't divide",
                where=where,
            )
    return names


def _refuse_without_imatrix(name: str, type: str, mix: Mix, model: ModelTraits) -> None:
    needed = type in _NEED_IMATRIX or (type == "Q2_K" and mix is MIXES["q2_k_s"])
    if name in (OUTPUT, EMBEDDING) or name.endswith(".attn_k_b.weight"):
        # Calibration measures the inputs of the blocks' linears alone.
        if type in _NEED_IMATRIX:
            raise InputError(f"{name} has no importance weights, which {type} needs")
    elif needed and not model.imatrix:
        raise InputError(
            f"{name} would be {type}, which needs importance weights",
            fix="Add a calibration section to the recipe, or choose another mix.",
        )


def _fits(type: str, columns: int) -> bool:
    return columns % block_size(type)[0] == 0


def _that_fits(type: str, columns: int) -> str:
    if _fits(type, columns):
        return type
    fallback = FALLBACKS.get(type)
    return fallback if fallback and _fits(fallback, columns) else "F16"
