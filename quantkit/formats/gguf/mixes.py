"""llama.cpp's mixes: a base type, and rules that give single tensors another one.

Reference: ``llama_tensor_get_type_impl`` in llama.cpp's ``src/llama-quant.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.base.errors import InputError


@dataclass(frozen=True)
class ModelTraits:
    """What the rules look at beside a tensor's name and shape.

    ``tied``: there is no output.weight, token_embd is the output matrix too. ``imatrix``: the
    matrices of the blocks will be quantized with importance weights. ``experts``: of a layer.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    imatrix: bool = False
    experts: int = 0

    @property
    def is_70b(self) -> bool:
        """llama.cpp's LLM_TYPE_70B: eight heads share the same small attn_v there."""
        grouped = self.architecture == "qwen2" or self.heads != self.kv_heads
        return self.architecture in ("llama", "qwen2") and self.layers == 80 and grouped


Rule = Callable[[int, ModelTraits], bool]  # of a layer's number and the model


def _always(layer: int, model: ModelTraits) -> bool:
    return True


def _more_bits(layer: int, model: ModelTraits) -> bool:
    """llama.cpp's ``use_more_bits``: the first and last eighth, and every third between."""
    n = model.layers
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _first(count: int) -> Rule:
    return lambda layer, model: layer < count


def _first_part(divisor: int) -> Rule:
    return lambda layer, model: layer < model.layers // divisor


def _middle(layer: int, model: ModelTraits) -> bool:
    return model.layers // 8 <= layer < 7 * model.layers // 8


def _grouped(layer: int, model: ModelTraits) -> bool:
    return model.heads // model.kv_heads >= 4


def _imatrix(layer: int, model: ModelTraits) -> bool:
    return model.imatrix


def _no_imatrix(layer: int, model: ModelTraits) -> bool:
    return not model.imatrix


def _experts(layer: int, model: ModelTraits) -> bool:
    return model.experts >= 4


def _eight(layer: int, model: ModelTraits) -> bool:
    """Mixtral's number of experts, beside which attention is small."""
    return model.experts == 8


def _both(first: Rule, second: Rule) -> Rule:
    return lambda layer, model: first(layer, model) and second(layer, model)


_EIGHTH, _SIXTEENTH = _first_part(8), _first_part(16)


@dataclass(frozen=True)
class Mix:
    """One mix.

    ``file_type``: llama.cpp's number for ``general.file_type``. ``base``: the type of every tensor
    that no rule names. ``blocks``: (part of a block, rule, type); the first rule that holds for a
    layer wins, and those of attn_v are for the fused attn_qkv too. ``output``: the type of the
    output matrix, or of the embedding that is tied to it. ``embedding``: the type of one that isn't
    tied; None is the base. ``frugal``: a mix below three bits, which the rule for 70B models leaves
    alone.
    """

    file_type: int
    base: str
    blocks: tuple[tuple[str, Rule, str], ...] = ()
    output: str = "Q6_K"
    embedding: str | None = None
    frugal: bool = False


def _below_three_bits(file_type: int, base: str, embedding: str, better: str, out: str) -> Mix:
    """``better``: the type of attn_v and of the first ffn_down; ``out``: of attn_output."""
    rules = (
        ("attn_v", _grouped, "Q4_K"),
        ("attn_v", _experts, "Q4_K"),
        ("attn_v", _always, better),
        ("attn_k", _eight, "Q4_K"),
        ("ffn_down", _EIGHTH, better),
        ("attn_output", _eight, "Q5_K"),
        ("attn_output", _always, out),
    )
    return Mix(file_type, base, rules, "Q5_K", embedding, frugal=True)


def _four_bits_nonlinear(file_type: int, base: str) -> Mix:
    rules = (
        ("attn_v", _grouped, "Q5_K"),
        ("ffn_down", _both(_EIGHTH, _no_imatrix), "Q5_K"),
        ("attn_output", _eight, "Q5_K"),
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
    "q4_k_m": Mix(
        15,
        "Q4_K",
        (
            ("attn_v", _more_bits, "Q6_K"),
            ("ffn_down", _more_bits, "Q6_K"),
            ("attn_output", _eight, "Q5_K"),
        ),
    ),
    "q4_k_s": Mix(
        14,
        "Q4_K",
        (
            ("attn_v", _first(4), "Q5_K"),
            ("ffn_down", _EIGHTH, "Q5_K"),
            ("attn_output", _eight, "Q5_K"),
        ),
    ),
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
            ("attn_output", _eight, "Q3_K"),
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
            ("attn_output", _eight, "Q5_K"),
            ("attn_output", _always, "Q4_K"),
        ),
    ),
    "q3_k_s": Mix(11, "Q3_K", (("attn_output", _eight, "Q5_K"),)),
    "iq3_m": Mix(
        27,
        "IQ3_S",
        (
            ("attn_v", _always, "Q4_K"),
            ("ffn_down", _EIGHTH, "Q4_K"),
            ("ffn_down", _both(_eight, _more_bits), "Q4_K"),
            ("attn_output", _eight, "Q5_K"),
            ("attn_output", _always, "Q4_K"),
        ),
    ),
    "iq3_s": Mix(26, "IQ3_S", (("attn_v", _grouped, "Q4_K"), ("attn_output", _eight, "Q5_K"))),
    "iq3_xs": Mix(
        22,
        "IQ3_S",
        (
            ("attn_v", _grouped, "Q4_K"),
            ("attn_q", _always, "IQ3_XXS"),
            ("attn_k", _always, "IQ3_XXS"),
            ("ffn_gate", _middle, "IQ3_XXS"),
            ("ffn_up", _middle, "IQ3_XXS"),
            ("attn_output", _eight, "Q5_K"),
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
            ("attn_output", _eight, "Q5_K"),
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
            ("attn_output", _eight, "Q5_K"),
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


# Where there are eight experts, in all mixes of at least three bits.
EIGHT_EXPERTS = {"attn_v": "Q8_0", "attn_k": "Q8_0"}


def find_mix(name: str) -> Mix:
    """Return a mix by name. Raises InputError for an unknown one."""
    if name not in MIXES:
        raise InputError(f"unknown mix {name!r}", fix=f"Known mixes: {', '.join(MIXES)}.")
    return MIXES[name]
