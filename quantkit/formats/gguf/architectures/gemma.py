"""The Gemma models."""

from __future__ import annotations

from collections.abc import Callable

from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.modules import TANH_GELU, add_one, gemma_blocks, norm
from quantkit.formats.gguf.architectures.parts import Config, Dimensions


def gemma_differs(period: int, largest: int) -> Callable[[Config, Dimensions], str | None]:
    """How a model differs from the graph of Gemma 2 or 3.

    ``period``: every such layer attends fully; ``largest``: the number of layers of the one model
    whose queries are scaled by hidden / heads, where the others' are by head_dim.
    """

    def differs(config: Config, dimensions: Dimensions) -> str | None:
        kinds = [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(dimensions.layers)
        ]
        if config.get("layer_types") not in (None, kinds):
            return f"layer_types other than full at every {period}th"
        if config.get("sliding_window_pattern", period) != period:
            return f"sliding_window_pattern other than {period}"
        scale = dimensions.head_dim
        if dimensions.layers == largest:
            scale = dimensions.hidden // dimensions.heads
        if config.get("query_pre_attn_scalar", scale) != scale:
            return f"query_pre_attn_scalar {config['query_pre_attn_scalar']} other than {scale}"
        return None

    return differs


_NORM = norm("model.norm", change=add_one)
_FIXED = {
    "hidden_activation": TANH_GELU,
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
}

GEMMA = (
    Architecture(
        name="gemma",
        model_types=("gemma",),
        modules=gemma_blocks(heads=False, after=False),
        norm=_NORM,
        # Gemma 1 had "gelu" in its config where the tanh formula was meant.
        fixed={**_FIXED, "hidden_act": ("gelu", *TANH_GELU)},
        ropes=("default", "linear"),
        output="never",
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        modules=gemma_blocks(heads=False, after=True),
        norm=_NORM,
        copied={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed=_FIXED,
        ropes=("default", "linear"),
        window="computed",
        output="never",
        unsupported=gemma_differs(period=2, largest=46),
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text",),
        modules=gemma_blocks(heads=True, after=True),
        norm=_NORM,
        copied={"final_logit_softcapping": "final_logit_softcapping"},
        optional=("final_logit_softcapping",),
        fixed={**_FIXED, "attn_logit_softcapping": ()},
        ropes=("default", "linear"),
        window="computed",
        unsupported=gemma_differs(period=6, largest=62),
    ),
)
