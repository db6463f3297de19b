"""The modules of a block, as families of models share them."""

from __future__ import annotations

from collections.abc import Callable

from quantkit.formats.gguf.architectures.parts import (
    Change,
    Config,
    Dimensions,
    Module,
    Width,
    keep,
)
from quantkit.formats.gguf.transforms import (
    AddOne,
    InterleaveHalves,
    Squeeze,
    ThreeParts,
    Transform,
)

# What many families have in common beside their modules: keywords of ``Architecture``.
SILU = {"hidden_act": ("silu",)}
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of what makes a router's scores probabilities
_GATED = ("gate_proj", "up_proj", "down_proj")
LLAMA3_ROPES = ("default", "linear", "llama3", "yarn")


def interleave(dimensions: Dimensions) -> Transform:
    """For q and k, where the graph rotates neighbours."""
    return InterleaveHalves(dimensions.head_dim)


def three_parts(dimensions: Dimensions) -> Transform:
    """For q, k and v in one matrix."""
    return ThreeParts(dimensions.head_dim)


def squeeze(dimensions: Dimensions) -> Transform:
    """For a convolution's kernels."""
    return Squeeze()


def add_one(dimensions: Dimensions) -> Transform:
    """For a norm that multiplies by 1 + w."""
    return AddOne()


def linear(
    name: str, rows: Width, columns: Width, bias: bool | str = False, change: Change = keep
) -> Module:
    """A linear of shape (rows, columns), in the words of ``Dimensions.size``."""
    return Module(name, (rows, columns), bias, change)


def norm(name: str, width: Width = "hidden", bias: bool = False, change: Change = keep) -> Module:
    """A norm of so many features."""
    return Module(name, (width,), bias, change)


def attention(
    qkv: bool | str = False, out: bool | str = False, change: Change = keep
) -> tuple[Module, ...]:
    """q, k, v and o, with biases; ``change``: of q and k."""
    return (
        linear("self_attn.q_proj", "q", "hidden", qkv, change),
        linear("self_attn.k_proj", "kv", "hidden", qkv, change),
        linear("self_attn.v_proj", "kv", "hidden", qkv),
        linear("self_attn.o_proj", "hidden", "q", out),
    )


def gated(
    bias: bool | str = False, name: str = "mlp", inner: Width = "inner"
) -> tuple[Module, ...]:
    """An MLP whose inner features are multiplied by a gate."""
    return (
        Module(f"{name}.gate_proj", (inner, "hidden"), bias),
        Module(f"{name}.up_proj", (inner, "hidden"), bias),
        Module(f"{name}.down_proj", ("hidden", inner), bias),
    )


def experts(
    holder: str = "mlp.experts",
    leaves: tuple[str, str, str] = _GATED,
    inner: str = "expert_feed_forward_length",
    bias: bool = False,
) -> tuple[Module, ...]:
    """Routed experts: each one's gate, up and down, by their names in the checkpoint."""
    gate, up, down = (f"{holder}.*.{leaf}" for leaf in leaves)
    first, last = ("expert_count", inner, "hidden"), ("expert_count", "hidden", inner)
    return (
        Module(gate, first, bias, stored="ffn_gate_exps"),
        Module(up, first, bias, stored="ffn_up_exps"),
        Module(down, last, bias, stored="ffn_down_exps"),
    )


def router(name: str, bias: bool = False) -> Module:
    """What chooses experts."""
    return linear(name, "expert_count", "hidden", bias)


def correction(name: str) -> Module:
    """The bias by which experts are chosen, but not weighed."""
    return Module(name, ("expert_count",), stored="exp_probs_b.bias", bare=True)


def leading_dense(key: str) -> Callable[[Config, int], list[str]]:
    """The first layers have no experts; ``key``: the config's, of their number."""
    return lambda config, layers: [
        "dense" if layer < int(config.get(key) or 0) else "experts" for layer in range(layers)
    ]


def mixtral_experts(inner: str) -> tuple[Module, ...]:
    """Mixtral's router and experts, of so many inner features."""
    holder = "block_sparse_moe"
    return (router(f"{holder}.gate"), *experts(f"{holder}.experts", ("w1", "w3", "w2"), inner))


def pre_norms(attention: tuple[Module, ...], mlp: tuple[Module, ...]) -> tuple[Module, ...]:
    """A block with one RMSNorm before attention and one before the MLP."""
    return (norm("input_layernorm"), *attention, norm("post_attention_layernorm"), *mlp)


def gemma_blocks(*, heads: bool, after: bool) -> tuple[Module, ...]:
    """Blocks of the Gemma models, whose norms multiply by 1 + w.

    ``heads``: q and k are normalized by head; ``after``: norms after attention and MLP too.
    """

    def scaled(name: str, width: str = "hidden") -> Module:
        return norm(name, width, change=add_one)

    by_head = [scaled(f"self_attn.{part}_norm", "head") for part in "qk"] if heads else []
    last = ["post_attention_layernorm"]
    if after:
        last += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return (scaled("input_layernorm"), *attention(), *by_head, *map(scaled, last), *gated())
