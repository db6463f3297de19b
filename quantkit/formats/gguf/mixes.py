"""Which type every tensor gets: llama.cpp's mixtures, as pure functions of names and shapes.

Reference: ``llama_tensor_get_type_impl``, ``tensor_type_fallback`` and ``tensor_requires_imatrix``
in llama.cpp's ``src/llama-quant.cpp``, for models without experts. A mix is a row of ``MIXES``: a
base type, and other types for single tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from quantkit.base.errors import InputError
from quantkit.methods.ggml.types import CASTS, block_size


@dataclass(frozen=True)
class Layout:
    """What the rules look at beside a tensor's name and shape.

    ``tied``: there is no output.weight, token_embd is the output matrix too. ``imatrix``: the
    tensors inside the blocks will be quantized with importance weights.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    imatrix: bool = False

    @property
    def is_70b(self) -> bool:
        """llama.cpp's LLM_TYPE_70B: eight heads share the same small attn_v there."""
        grouped = self.architecture == "qwen2" or self.heads != self.kv_heads
        return self.architecture in ("llama", "qwen2") and self.layers == 80 and grouped


Rule = Callable[[int, Layout], bool]  # of a layer's number and the layout


def _always(layer: int, layout: Layout) -> bool:
    return True


def _more_bits(layer: int, layout: Layout) -> bool:
    """llama.cpp's ``use_more_bits``: the first and last eighth, and every third between."""
    n = layout.layers
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _first(count: int) -> Rule:
    return lambda layer, layout: layer < count


def _first_part(divisor: int) -> Rule:
    return lambda layer, layout: layer < layout.layers // divisor


def _middle(layer: int, layout: Layout) -> bool:
    return layout.layers // 8 <= layer < 7 * layout.layers // 8


def _grouped(layer: int, layout: Layout) -> bool:
    return layout.heads // layout.kv_heads >= 4


def _imatrix(layer: int, layout: Layout) -> bool:
    return layout.imatrix


def _no_imatrix(layer: int, layout: Layout) -> bool:
    return not layout.imatrix


def _both(first: Rule, second: Rule) -> Rule:
    return lambda layer, layout: first(layer, layout) and second(layer, layout)


_EIGHTH, _SIXTEENTH = _first_part(8), _first_part(16)


@dataclass(frozen=True)
class Mix:
    """One mixture.

    ``file_type``: llama.cpp's number for ``general.file_type``. ``base``: the type of whatever
    no rule is about. ``blocks``: (part of a block, rule, type); the first rule that holds for a
    layer wins, and attn_v stands for the fused attn_qkv too. ``output``: the output matrix, or
    the embedding that is tied to it. ``embedding``: one that isn't tied; None is the base.
    ``frugal``: of the mixes below three bits, which the rule for 70B models leaves alone.
    """

    file_type: int
    base: str
    blocks: tuple[tuple[str, Rule, str], ...] = ()
    output: str = "Q6_K"
    embedding: str | None = None
    frugal: bool = False


def _below_three_bits(file_type: int, base: str, embedding: str, better: str, out: str) -> Mix:
    """``better``: attn_v and the first ffn_down; ``out``: attn_output."""
    rules = (
        ("attn_v", _grouped, "Q4_K"),
        ("attn_v", _always, better),
        ("ffn_down", _EIGHTH, better),
        ("attn_output", _always, out),
    )
    return Mix(file_type, base, rules, "Q5_K", embedding, frugal=True)


def _four_bits_nonlinear(file_type: int, base: str) -> Mix:
    rules = (
        ("attn_v", _grouped, "Q5_K"),
        ("ffn_down", _both(_EIGHTH, _no_imatrix), "Q5_K"),
    )
    return Mix(file_type, base, rules)


MIXES = {
    "f32": Mix(0, "F32"),
    "bf16": Mix(32, "BF16"),
    "f16": Mix(1, "F16"),
    "q8_0": Mix(7, "Q8_0", output="Q8_0"),
    "q6_k": Mix(18, "Q6_K"),
    "q5_k_m": Mix(17, "Q5_K", (("attn_v", _more_bits, "Q6_K"), ("ffn_down", _more_bits, "Q6_K"))),
    "q5_k_s": Mix(16, "Q5_K"),
    "q5_1": Mix(9, "Q5_1"),
    "q5_0": Mix(8, "Q5_0", (("ffn_down", _both(_EIGHTH, _imatrix), "Q5_1"),)),
    "q4_k_m": Mix(15, "Q4_K", (("attn_v", _more_bits, "Q6_K"), ("ffn_down", _more_bits, "Q6_K"))),
    "q4_k_s": Mix(14, "Q4_K", (("attn_v", _first(4), "Q5_K"), ("ffn_down", _EIGHTH, "Q5_K"))),
    "q4_1": Mix(3, "Q4_1"),
    "q4_0": Mix(2, "Q4_0", (("ffn_down", _both(_EIGHTH, _imatrix), "Q4_1"),)),
    "iq4_nl": _four_bits_nonlinear(25, "IQ4_NL"),
    "iq4_xs": _four_bits_nonlinear(30, "IQ4_XS"),
    "q3_k_l": Mix(
        13,
        "Q3_K",
        (
            ("attn_v", _always, "Q5_K"),
            ("ffn_down", _always, "Q5_K"),
            ("attn_output", _always, "Q5_K"),
        ),
    ),
    "q3_k_m": Mix(
        12,
        "Q3_K",
        (
            ("attn_v", _first(2), "Q5_K"),
            ("attn_v", _always, "Q4_K"),
            ("ffn_down", _SIXTEENTH, "Q5_K"),
            ("ffn_down", _always, "Q4_K"),
            ("attn_output", _always, "Q4_K"),
        ),
    ),
    "q3_k_s": Mix(11, "Q3_K"),
    "iq3_m": Mix(
        27,
        "IQ3_S",
        (
            ("attn_v", _always, "Q4_K"),
            ("ffn_down", _EIGHTH, "Q4_K"),
            ("attn_output", _always, "Q4_K"),
        ),
    ),
    "iq3_s": Mix(26, "IQ3_S", (("attn_v", _grouped, "Q4_K"),)),
    "iq3_xs": Mix(
        22,
        "IQ3_S",
        (
            ("attn_v", _grouped, "Q4_K"),
            ("attn_q", _always, "IQ3_XXS"),
            ("attn_k", _always, "IQ3_XXS"),
            ("ffn_gate", _middle, "IQ3_XXS"),
            ("ffn_up", _middle, "IQ3_XXS"),
        ),
    ),
    "iq3_xxs": Mix(
        23,
        "IQ3_XXS",
        (
            ("attn_v", _grouped, "Q4_K"),
            ("attn_v", _no_imatrix, "IQ3_S"),
            ("attn_q", _always, "IQ2_S"),
            ("attn_k", _always, "IQ2_S"),
            ("ffn_down", _both(_EIGHTH, _no_imatrix), "Q4_K"),
            ("ffn_down", _no_imatrix, "Q3_K"),
            ("attn_output", _always, "IQ3_S"),
        ),
        output="Q5_K",
        embedding="IQ3_S",
    ),
    "q2_k": Mix(
        10,
        "Q2_K",
        (
            ("attn_v", _grouped, "Q4_K"),
            ("attn_v", _always, "Q3_K"),
            ("ffn_down", _always, "Q3_K"),
            ("attn_output", _always, "Q3_K"),
        ),
    ),
    "q2_k_s": Mix(21, "Q2_K", (("attn_v", _grouped, "Q4_K"), ("ffn_down", _EIGHTH, "Q4_K"))),
    "iq2_m": _below_three_bits(29, "IQ2_S", "IQ3_S", better="IQ3_S", out="IQ3_S"),
    "iq2_s": _below_three_bits(28, "IQ2_XS", "IQ3_S", better="IQ3_S", out="IQ3_S"),
    "iq2_xs": _below_three_bits(20, "IQ2_XS", "Q2_K", better="Q2_K", out="IQ2_XS"),
    "iq2_xxs": _below_three_bits(19, "IQ2_XXS", "Q2_K", better="Q2_K", out="IQ2_XXS"),
    "iq1_m": _below_three_bits(31, "IQ1_M", "Q2_K", better="Q2_K", out="IQ2_XXS"),
    "iq1_s": _below_three_bits(24, "IQ1_S", "Q2_K", better="Q2_K", out="IQ2_XXS"),
    "tq2_0": Mix(37, "TQ2_0", embedding="Q4_K"),
    "tq1_0": Mix(36, "TQ1_0", embedding="Q4_K"),
}

# For rows that a type's blocks don't divide; where these don't either, F16.
FALLBACKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}

# Hardly better than noise without importance weights; ggml itself refuses some of them.
_NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"


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
        raise InputError(f"unknown mix {name!r}", fix=f"Known mixes: {', '.join(MIXES)}.")
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
    no tensor it could apply to, or whose type can't hold a tensor's rows, and for a type that
    needs importance weights where there will be none.
    """
    choices = {}
    for name, shape in shapes.items():
        if quantizable(name, shape):
            choices[name] = _choose(name, shape[-1], mix, layout)
        else:
            choices[name] = Choice("F32", "F32")
    for override in overrides:
        for name in _matching(override, shapes):
            choices[name] = Choice(override.type, override.type)
    for name, choice in choices.items():
        _check_imatrix(name, choice.type, mix, layout)
    return choices


def _choose(name: str, columns: int, mix: Mix, layout: Layout) -> Choice:
    wanted = _wanted(name, mix, layout)
    is_output = name == _OUTPUT or (name == _EMBEDDING and layout.tied)
    if is_output and not _fits(mix.base, columns):
        return Choice(_that_fits("Q8_0", columns), wanted)
    return Choice(_that_fits(wanted, columns), wanted)


def _wanted(name: str, mix: Mix, layout: Layout) -> str:
    if mix.base in CASTS:
        return mix.base
    if name == _OUTPUT or (name == _EMBEDDING and layout.tied):
        return mix.output
    if name == _EMBEDDING:
        return mix.embedding or mix.base
    parts = name.split(".")
    if parts[0] != "blk":
        return mix.base
    layer = int(parts[1])
    part = "attn_v" if parts[2] == "attn_qkv" else parts[2]
    rules = (t for where, rule, t in mix.blocks if where == part and rule(layer, layout))
    wanted = next(rules, mix.base)
    promoted = part == "attn_v" and layout.is_70b and not mix.frugal
    return "Q5_K" if promoted and wanted in ("Q3_K", "Q4_K") else wanted


def _matching(override: TypeOverride, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    where = f"override {override.match}"
    found = [
        name
        for name, shape in shapes.items()
        if quantizable(name, shape) and fnmatchcase(name, override.match)
    ]
    if not found:
        raise InputError(
            "matches no tensor that can be quantized",
            subject=where,
            fix="Patterns match GGUF names such as blk.0.ffn_down.weight.",
        )
    for name in found:
        if not _fits(override.type, shapes[name][-1]):
            raise InputError(
                f"{name} has rows of {shapes[name][-1]}, which {override.type}'s blocks of "
                f"{block_size(override.type)[0]} don't divide",
                where=where,
            )
    return found


def _check_imatrix(name: str, type: str, mix: Mix, layout: Layout) -> None:
    needed = type in _NEED_IMATRIX or (type == "Q2_K" and mix is MIXES["q2_k_s"])
    if name in (_OUTPUT, _EMBEDDING):  # no importance is measured for these
        if type in _NEED_IMATRIX:
            raise InputError(f"{name} has no importance weights, which {type} needs")
    elif needed and not layout.imatrix:
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
