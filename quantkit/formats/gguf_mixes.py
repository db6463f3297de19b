"""Which type every tensor gets: llama.cpp's mixtures, as pure functions of names and shapes.

Reference: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's
``src/llama-quant.cpp``, for the llama architecture without experts. A mix is a row of ``MIXES``:
a base type, and promotions of single tensors to a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from quantkit.errors import InputError
from quantkit.quantizers.ggml import CASTS, block_size


@dataclass(frozen=True)
class Layout:
    """What the rules look at beside a tensor's name and shape."""

    layers: int
    heads: int
    kv_heads: int
    tied: bool  # no output.weight: token_embd is the output matrix too


Rule = Callable[[int, Layout], bool]


def more_bits(layer: int, layout: Layout) -> bool:
    """llama.cpp's ``use_more_bits``: the first and last eighth, and every third between."""
    n = layout.layers
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


@dataclass(frozen=True)
class Mix:
    """One mixture.

    ``promotions``: (part of a block, rule, type); the first rule that holds for a layer wins.
    ``file_type``: llama.cpp's number for ``general.file_type``.
    """

    file_type: int
    base: str
    output: str
    promotions: tuple[tuple[str, Rule, str], ...] = ()


MIXES = {
    "q4_k_m": Mix(
        file_type=15,
        base="Q4_K",
        output="Q6_K",
        promotions=(("attn_v", more_bits, "Q6_K"), ("ffn_down", more_bits, "Q6_K")),
    ),
    "q8_0": Mix(file_type=7, base="Q8_0", output="Q8_0"),
    "bf16": Mix(file_type=32, base="BF16", output="BF16"),
}

# For rows that a type's blocks don't divide; where these don't either, F16.
FALLBACKS = {
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
    "IQ4_XS": "IQ4_NL",
}


class TypeOverride(Protocol):
    """A glob on GGUF names and the type for what it matches."""

    @property
    def match(self) -> str: ...

    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class Choice:
    """The type that a tensor gets, and the one that it would have without the fallback."""

    type: str
    wanted: str


def find_mix(name: str) -> Mix:
    """Return a mix by name. Raises InputError for an unknown one."""
    if name not in MIXES:
        raise InputError(f"unknown mix {name!r}", mend=f"Known mixes: {', '.join(MIXES)}.")
    return MIXES[name]


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mix decides on the tensor; norms, biases and the like stay F32."""
    return len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")


def choose_types(
    shapes: Mapping[str, tuple[int, ...]],
    mix: Mix,
    layout: Layout,
    overrides: Iterable[TypeOverride] = (),
) -> dict[str, Choice]:
    """Return the type of every tensor of ``shapes`` (GGUF name → shape as in torch).

    The last override that matches a name wins. Raises InputError for an override that matches
    no tensor it could apply to, or whose type can't hold a tensor's rows.
    """
    choices = {}
    for name, shape in shapes.items():
        if quantizable(name, shape):
            wanted = _wanted(name, shape[-1], mix, layout)
            choices[name] = Choice(_that_fits(wanted, shape[-1]), wanted)
        else:
            choices[name] = Choice("F32", "F32")
    for override in overrides:
        found = [
            name
            for name, shape in shapes.items()
            if quantizable(name, shape) and fnmatchcase(name, override.match)
        ]
        if not found:
            raise InputError(
                "matches no tensor that can be quantized",
                where=f"override {override.match}",
                mend="Patterns match GGUF names such as blk.0.ffn_down.weight.",
            )
        for name in found:
            if not _fits(override.type, shapes[name][-1]):
                raise InputError(
                    f"{name} has rows of {shapes[name][-1]}, which {override.type}'s blocks of "
                    f"{block_size(override.type)[0]} don't divide",
                    where=f"override {override.match}",
                )
            choices[name] = Choice(override.type, override.type)
    return choices


def _wanted(name: str, columns: int, mix: Mix, layout: Layout) -> str:
    if mix.base in CASTS:
        return mix.base
    if name == "output.weight" or (name == "token_embd.weight" and layout.tied):
        return mix.output if _fits(mix.base, columns) else "Q8_0"
    parts = name.split(".")
    if parts[0] != "blk":
        return mix.base
    layer, part = int(parts[1]), parts[2]
    wanted = next(
        (t for where, rule, t in mix.promotions if where == part and rule(layer, layout)), mix.base
    )
    # llama.cpp's LLM_TYPE_70B: eight heads share the same small attn_v there.
    grouped_70b = layout.layers == 80 and layout.heads != layout.kv_heads
    return "Q5_K" if grouped_70b and part == "attn_v" and wanted in ("Q3_K", "Q4_K") else wanted


def _fits(type: str, columns: int) -> bool:
    return columns % block_size(type)[0] == 0


def _that_fits(type: str, columns: int) -> str:
    if _fits(type, columns):
        return type
    fallback = FALLBACKS.get(type)
    return fallback if fallback and _fits(fallback, columns) else "F16"
