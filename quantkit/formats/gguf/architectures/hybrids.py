"""Models whose layers differ: some have attention, others a convolution or a recurrent state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.modules import (
    SILU,
    add_one,
    attention,
    gated,
    linear,
    norm,
    squeeze,
)
from quantkit.formats.gguf.architectures.parts import (
    Change,
    Config,
    Dimensions,
    Module,
    of_kind,
)
from quantkit.formats.gguf.rope import Rope
from quantkit.formats.gguf.transforms import (
    Chain,
    Keep,
    NegativeExp,
    Squeeze,
    TileColumns,
    TileHeads,
    Transform,
)

_KEYS, _VALUES, _WIDTH = "ssm.group_count", "ssm.time_step_rank", "ssm.state_size"


def listed_layers(config: Config, layers: int) -> Sequence[str]:
    """The kinds that the config lists."""
    return [str(kind) for kind in config["layer_types"]]


def lacks_a_kind(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from graphs that keep both a cache and states, and fail without one."""
    kinds = set(config["layer_types"])
    return f"layer_types all {kinds.pop()!r}" if len(kinds) == 1 else None


# Qwen 3.5: gated delta nets, in which several heads of values may share one of keys.


def _tiled(start: int, head_dim: int) -> Change:
    """Heads of values from so many heads of keys on; ``head_dim``: 0 for the model's own."""

    def change(dimensions: Dimensions) -> TileHeads:
        own = dimensions.own
        width = head_dim or own[_WIDTH]
        return TileHeads(
            start * own[_KEYS] * own[_WIDTH], own[_KEYS], own[_VALUES] // own[_KEYS], width
        )

    return change


def _decay(dimensions: Dimensions) -> Transform:
    return Chain(NegativeExp(), _tiled(0, 1)(dimensions))


def _kernels(dimensions: Dimensions) -> Transform:
    return Chain(Squeeze(), _tiled(2, 0)(dimensions))


def _columns(dimensions: Dimensions) -> Transform:
    change = _tiled(0, 0)(dimensions)
    assert isinstance(change, TileHeads)
    return TileColumns(change) if change.each > 1 else Keep()


def _qkv(dimensions: Dimensions) -> int:
    own = dimensions.own
    return 2 * own[_KEYS] * own[_WIDTH] + own["ssm.inner_size"]


def one(dimensions: Dimensions) -> int:
    """The middle size of a convolution's kernels."""
    return 1


def _two_q(dimensions: Dimensions) -> int:
    return 2 * dimensions.size("q")


def delta_net() -> tuple[Module, ...]:
    """The modules of a layer with a gated delta net, which Qwen 3.5 has."""
    return (
        linear("linear_attn.in_proj_qkv", _qkv, "hidden", change=_tiled(2, 0)),
        linear("linear_attn.in_proj_z", "ssm.inner_size", "hidden", change=_tiled(0, 0)),
        Module(
            "linear_attn.conv1d",
            (_qkv, one, "ssm.conv_kernel"),
            change=_kernels,
            stored="ssm_conv1d",
        ),
        Module("linear_attn.dt_bias", (_VALUES,), False, _tiled(0, 1), "", "ssm_dt.bias", True),
        Module("linear_attn.A_log", (_VALUES,), False, _decay, "", "ssm_a", True),
        linear("linear_attn.in_proj_b", _VALUES, "hidden", change=_tiled(0, 1)),
        linear("linear_attn.in_proj_a", _VALUES, "hidden", change=_tiled(0, 1)),
        norm("linear_attn.norm", _WIDTH),
        linear("linear_attn.out_proj", "hidden", "ssm.inner_size", change=_columns),
    )


def gated_attention() -> tuple[Module, ...]:
    """Attention whose output is gated by what q_proj makes too, by head."""
    return (
        linear("self_attn.q_proj", _two_q, "hidden"),
        *attention()[1:],
        norm("self_attn.q_norm", "head", change=add_one),
        norm("self_attn.k_norm", "head", change=add_one),
    )


def inner_size(config: Config) -> int:
    """Features of all heads of values."""
    return int(config["linear_num_value_heads"] * config["linear_value_head_dim"])


DELTA_SIZES: Mapping[str, str | Callable[[Config], int]] = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    _WIDTH: "linear_key_head_dim",
    _KEYS: "linear_num_key_heads",
    _VALUES: "linear_num_value_heads",
    "ssm.inner_size": inner_size,
}


def delta_keys(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """Which layers have a state, and how many frequencies are for time, height and width."""
    sections = rope.settings.get("mrope_section") or [11, 11, 10]
    return {
        "attention.recurrent_layers": [k == "linear_attention" for k in config["layer_types"]],
        "full_attention_interval": int(config.get("full_attention_interval") or 4),
        "rope.dimension_sections": [*sections, 0][:4],
    }


def delta_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, whose heads of keys and values have one width."""
    keys, values = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if keys != values:
        return f"linear_key_head_dim {keys} beside linear_value_head_dim {values}"
    own = dimensions.own
    if own[_VALUES] % own[_KEYS]:
        return f"{own[_VALUES]} linear value heads for {own[_KEYS]} key heads"
    return lacks_a_kind(config, dimensions)


def lfm2_settings(config: Config) -> Config:
    """The width of the MLP, which follows from several settings."""
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        if config.get("block_ffn_dim_multiplier") is not None:
            width = int(config["block_ffn_dim_multiplier"] * width)
        unit = int(config["block_multiple_of"])
        width = unit * -(width // -unit)
    return {"intermediate_size": width, "head_dim": None}


def _three_hidden(dimensions: Dimensions) -> int:
    return 3 * dimensions.hidden


_CONV = (
    linear("conv.in_proj", _three_hidden, "hidden"),
    Module("conv.conv", ("hidden", one, "shortconv.l_cache"), change=squeeze),
    linear("conv.out_proj", "hidden", "hidden"),
)

HYBRIDS = (
    Architecture(
        name="qwen35",
        model_types=("qwen3_5_text",),
        modules=(
            norm("input_layernorm", change=add_one),
            *of_kind("full_attention", gated_attention()),
            *of_kind("linear_attention", delta_net()),
            norm("post_attention_layernorm", change=add_one),
            *gated(),
        ),
        layer_kinds=listed_layers,
        norm=norm("model.norm", change=add_one),
        sizes=DELTA_SIZES,
        more=delta_keys,
        fixed={**SILU, "attention_bias": (False,)},
        ropes=("default", "mrope"),
        partial_rope=True,
        unsupported=delta_differs,
    ),
    Architecture(
        name="lfm2",
        model_types=("lfm2",),
        modules=(
            norm("operator_norm"),
            *of_kind("conv", _CONV),
            *of_kind(
                "full_attention",
                (
                    *attention()[:3],
                    linear("self_attn.out_proj", "hidden", "q"),
                    norm("self_attn.q_layernorm", "head"),
                    norm("self_attn.k_layernorm", "head"),
                ),
            ),
            norm("ffn_norm"),
            linear("feed_forward.w1", "inner", "hidden"),
            linear("feed_forward.w3", "inner", "hidden"),
            linear("feed_forward.w2", "hidden", "inner"),
        ),
        layer_kinds=listed_layers,
        norm=norm("model.embedding_norm"),
        derived=lfm2_settings,
        epsilon=("attention.layer_norm_rms_epsilon", "norm_eps"),
        sizes={"shortconv.l_cache": "conv_L_cache"},
        by_layer={"attention.head_count_kv": "full_attention"},
        fixed={"conv_bias": (False,)},
        square=True,
        unsupported=lacks_a_kind,
    ),
)
