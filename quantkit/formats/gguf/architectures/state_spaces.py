"""Models with Mamba 2's state spaces in some layers, and attention in others."""

from __future__ import annotations

from quantkit.formats.gguf.architectures.architecture import Architecture, Metadata
from quantkit.formats.gguf.architectures.hybrids import lacks_a_kind, listed_layers, one
from quantkit.formats.gguf.architectures.modules import attention, interleave, norm, squeeze
from quantkit.formats.gguf.architectures.parts import Config, Dimensions, Module, of_kind
from quantkit.formats.gguf.rope import Rope
from quantkit.formats.gguf.transforms import Chain, Columns, NegativeExp, RowPart, Transform

_STATE, _ATTENTION = "linear_attention", "full_attention"
_INNER, _HEADS = "ssm.inner_size", "ssm.time_step_rank"


def _convolved(dimensions: Dimensions) -> int:
    own = dimensions.own
    return own[_INNER] + 2 * own["ssm.group_count"] * own["ssm.state_size"]


def _projected(dimensions: Dimensions) -> int:
    return dimensions.own[_INNER] + _convolved(dimensions) + dimensions.own[_HEADS]


def _column(dimensions: Dimensions) -> Transform:
    return Columns(1)


def _decay(dimensions: Dimensions) -> Transform:
    return Chain(NegativeExp(), Columns(1))


def _groups(dimensions: Dimensions) -> Transform:
    return Columns(dimensions.own[_INNER] // dimensions.own["ssm.group_count"])


def mamba2(name: str) -> tuple[Module, ...]:
    """The modules of a state space; ``name``: of the mixer in its layer."""
    return (
        Module(f"{name}.in_proj", (_projected, "hidden"), stored="ssm_in"),
        Module(
            f"{name}.conv1d",
            (_convolved, one, "ssm.conv_kernel"),
            bias="conv_biased",
            change=squeeze,
            stored="ssm_conv1d",
        ),
        Module(f"{name}.dt_bias", (_HEADS,), stored="ssm_dt.bias", bare=True),
        Module(f"{name}.A_log", (_HEADS,), change=_decay, stored="ssm_a", bare=True),
        Module(f"{name}.D", (_HEADS,), change=_column, stored="ssm_d", bare=True),
        Module(f"{name}.norm", (_INNER,), change=_groups, stored="ssm_norm"),
        Module(f"{name}.out_proj", ("hidden", _INNER), stored="ssm_out"),
    )


def state_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graphs, which add a bias and clamp no time steps."""
    if not config["conv_biased"]:
        return "a convolution without biases"
    low, high = config.get("time_step_limit") or (0.0, float("inf"))
    if low > 0 or high < float("inf"):
        return f"time_step_limit {[low, high]}"
    own = dimensions.own
    if own[_INNER] % own["ssm.group_count"]:
        return f"{own[_INNER]} state features in {own['ssm.group_count']} groups"
    return lacks_a_kind(config, dimensions)


def nemotron_settings(config: Config) -> Config:
    """The settings of Nemotron-H under their usual names."""
    return {
        "num_hidden_layers": len(config["layer_types"]),
        "conv_biased": config.get("use_conv_bias"),
        "max_position_embeddings": config.get("max_position_embeddings") or 1 << 20,
    }


def nemotron_keys(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """The epsilon under its other name too, which the graph asks for."""
    epsilon = float(config["layer_norm_epsilon"])
    return {"attention.layer_norm_epsilon": epsilon, "rope.scaling.finetuned": False}


def nemotron_inner(config: Config) -> int:
    """Features of all heads of a state space."""
    return int(config["mamba_num_heads"] * config["mamba_head_dim"])


def granite_settings(config: Config) -> Config:
    """The settings of Granite 4 under their usual names."""
    states = "linear_attention" in config["layer_types"]
    rotates = config.get("position_embedding_type") == "rope"
    return {
        "conv_biased": config.get("mamba_conv_bias"),
        "intermediate_size": config["shared_intermediate_size"],
        "num_local_experts": config.get("num_local_experts") or None,
        "rotates": rotates,
        "pure": not states,
    }


def granite_inner(config: Config) -> int:
    """Features of all heads of a state space."""
    return int(config["mamba_expand"] * config["hidden_size"])


def granite_keys(config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
    """Whether the layers with attention rotate q and k."""
    return {"rope.scaling.finetuned": config["rotates"]}


def granite_differs(config: Config, dimensions: Dimensions) -> str | None:
    """How a model differs from the graph, whose states are twice as wide as its hidden states."""
    if config["mamba_expand"] != 2:
        return f"mamba_expand {config['mamba_expand']}"
    return state_differs(config, dimensions)


def _gate(dimensions: Dimensions) -> Transform:
    return RowPart(2 * dimensions.inner, 0, dimensions.inner)


def _up(dimensions: Dimensions) -> Transform:
    return RowPart(2 * dimensions.inner, dimensions.inner, 2 * dimensions.inner)


STATE_SPACES = (
    Architecture(
        name="nemotron_h",
        model_types=("nemotron_h",),
        modules=(
            Module("norm", ("hidden",), stored="attn_norm"),
            *of_kind(_STATE, mamba2("mixer")),
            *of_kind(
                _ATTENTION,
                (
                    # Nothing is rotated, but llama.cpp's files have them as if it were.
                    Module("mixer.q_proj", ("q", "hidden"), change=interleave, stored="attn_q"),
                    Module("mixer.k_proj", ("kv", "hidden"), change=interleave, stored="attn_k"),
                    Module("mixer.v_proj", ("kv", "hidden"), stored="attn_v"),
                    Module("mixer.o_proj", ("hidden", "q"), stored="attn_output"),
                ),
            ),
            *of_kind(
                "mlp",
                (
                    Module("mixer.up_proj", ("inner", "hidden"), stored="ffn_up"),
                    Module("mixer.down_proj", ("hidden", "inner"), stored="ffn_down"),
                ),
            ),
        ),
        layer_kinds=listed_layers,
        embedding="model.embeddings",
        norm=Module("model.norm_f", ("hidden",), stored="output_norm"),
        derived=nemotron_settings,
        epsilon=("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"),
        sizes={
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "ssm_state_size",
            "ssm.group_count": "n_groups",
            _INNER: nemotron_inner,
            _HEADS: "mamba_num_heads",
        },
        by_layer={"attention.head_count_kv": _ATTENTION, "feed_forward_length": "mlp"},
        more=nemotron_keys,
        fixed={
            "mlp_hidden_act": ("relu2",),
            "mamba_hidden_act": ("silu",),
            **dict.fromkeys(
                ("use_bias", "attention_bias", "mlp_bias", "mamba_proj_bias"), (False,)
            ),
        },
        ropes=(),
        unsupported=state_differs,
    ),
    Architecture(
        name="granitehybrid",
        model_types=("granitemoehybrid",),
        modules=(
            norm("input_layernorm"),
            *of_kind(_STATE, mamba2("mamba")),
            *of_kind(_ATTENTION, attention(change=interleave)),
            norm("post_attention_layernorm"),
            Module(
                "shared_mlp.input_linear",
                ("two inner", "hidden"),
                split=(("ffn_gate", _gate), ("ffn_up", _up)),
            ),
            Module("shared_mlp.output_linear", ("hidden", "inner"), stored="ffn_down"),
        ),
        layer_kinds=listed_layers,
        derived=granite_settings,
        copied={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        sizes={
            "ssm.conv_kernel": "mamba_d_conv",
            "ssm.state_size": "mamba_d_state",
            "ssm.group_count": "mamba_n_groups",
            _INNER: granite_inner,
            _HEADS: "mamba_n_heads",
        },
        by_layer={"attention.head_count_kv": _ATTENTION},
        more=granite_keys,
        fixed={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mamba_proj_bias": (False,),
            "num_local_experts": (0,),
        },
        unsupported=granite_differs,
    ),
)
