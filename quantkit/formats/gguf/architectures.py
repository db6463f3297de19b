"""The architectures that can be written as GGUF: one description each, in one table.

A description says what a checkpoint of the family holds (so that nothing is left over and
nothing is missing), how tensors change on the way, and which of the config's settings llama.cpp
computes with. Names in GGUF come from gguf-py's own maps. What llama.cpp has built into a graph
is checked against config.json, and a model that differs is refused.

References: llama.cpp's ``conversion/`` (what its converter writes) and ``src/models/`` (what the
graphs compute and which tensors they load).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats.gguf import rope as gguf_rope
from quantkit.formats.gguf.transforms import AddOne, InterleaveHalves, Keep, ThreeParts, Transform
from quantkit.methods.ggml.types import load_gguf

Metadata = dict[str, Any]  # str, bool, int (u32), float (f32) or a list of one of these
Config = Mapping[str, Any]

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are made of."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def size(self, name: str) -> int:
        """A width by the word that the table below has for it."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "hidden": self.hidden,
            "inner": self.inner,
            "two inner": 2 * self.inner,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "head": self.head_dim,
        }[name]


Change = Callable[[Dimensions], Transform]


def _keep(dimensions: Dimensions) -> Transform:
    return Keep()


def _interleave(dimensions: Dimensions) -> Transform:
    return InterleaveHalves(dimensions.head_dim)


def _three_parts(dimensions: Dimensions) -> Transform:
    return ThreeParts(dimensions.head_dim)


def _add_one(dimensions: Dimensions) -> Transform:
    return AddOne()


@dataclass(frozen=True)
class Module:
    """A linear or a norm of a block.

    ``name``: after the layer's number in the checkpoint. ``shape``: of the weight, in the words
    of ``Dimensions.size``. ``bias``: whether it has one, or the config's key that says so.
    """

    name: str
    shape: tuple[str, ...]
    bias: bool | str = False
    change: Change = _keep


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that a config asks for."""

    key: str
    name: str  # in GGUF
    shape: tuple[int, ...]
    transform: Transform


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures and the Hugging Face models that are written as it.

    - ``blocks``, ``embedding``, ``norm``, ``head``: names in the checkpoint; ``modules``: of every
      block, in the file's order.
    - ``epsilon``: the GGUF key and the config's; ``copied``: GGUF key → config key, for settings
      that the graph needs; ``defaults``: what transformers takes where a config is silent.
    - ``fixed``: config key → the values that the graph can compute; ``ropes``: kinds of rotary
      scaling; ``square``: the graph has heads * head_dim = hidden built in; ``check``: refuses
      what these fields can't express.
    - ``window``: a sliding window is "computed" by the graph, only "written", or "unknown" to it.
    - ``output``: an output matrix of its own is "allowed", "needed" (tied embeddings are then
      written twice) or "never" loaded.
    """

    name: str
    model_types: tuple[str, ...]
    modules: tuple[Module, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: Module = field(default=Module("model.norm", ("hidden",)))
    head: str = "lm_head"
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    copied: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    square: bool = False
    window: str = "unknown"
    output: str = "allowed"
    check: Callable[[Config, Dimensions], None] | None = None

    def dimensions(self, config: Config) -> Dimensions:
        """The sizes by config.json. Raises InputError for a missing number."""
        heads = _number(config, "num_attention_heads")
        hidden = _number(config, "hidden_size")
        return Dimensions(
            layers=_number(config, "num_hidden_layers"),
            hidden=hidden,
            inner=_number(config, "intermediate_size"),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=_number(config, "vocab_size"),
        )

    def names(self, layers: int) -> dict[str, str]:
        """GGUF name → checkpoint key of every tensor that a file may hold, biases included."""
        gguf = load_gguf()
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(kind, layers)
        modules = [self.embedding, *self._block_modules(layers), self.norm.name, self.head]
        return {
            f"{name}.{part}": f"{module}.{part}"
            for module in modules
            for part in ("weight", "bias")
            if (name := names.get_name(module)) is not None
        }

    def tensors(self, config: Config, dimensions: Dimensions) -> Iterator[CheckpointTensor]:
        """Every tensor that the config asks for, the output matrix apart, in the file's order."""
        keys = {key: name for name, key in self.names(dimensions.layers).items()}
        whole = (dimensions.vocabulary, dimensions.hidden)
        yield CheckpointTensor(f"{self.embedding}.weight", EMBEDDING, whole, Keep())
        blocks = self._block_modules(dimensions.layers)
        for full, module in (*blocks.items(), (self.norm.name, self.norm)):
            transform = module.change(dimensions)
            shape = tuple(dimensions.size(word) for word in module.shape)
            weight, bias = f"{full}.weight", f"{full}.bias"
            yield CheckpointTensor(weight, keys[weight], shape, transform)
            if config.get(module.bias) if isinstance(module.bias, str) else module.bias:
                yield CheckpointTensor(bias, keys[bias], shape[:1], transform)

    def transform(self, key: str, dimensions: Dimensions) -> Transform:
        """What is done to the tensor of a checkpoint key."""
        module = re.sub(rf"^{re.escape(self.blocks)}\.\d+\.", "", key.rpartition(".")[0])
        changes = {m.name: m.change for m in (*self.modules, self.norm)}
        return changes.get(module, _keep)(dimensions)

    def metadata(self, config: Config, dimensions: Dimensions) -> Metadata:
        """The keys that begin with the architecture's name.

        Raises InputError, naming the reason, for a model that the graph would compute otherwise.
        """
        rope = gguf_rope.read(config)
        self._refuse(config, dimensions, rope)
        epsilon, epsilon_key = self.epsilon
        values: Metadata = {
            "block_count": dimensions.layers,
            "context_length": self._context(config),
            "embedding_length": dimensions.hidden,
            "feed_forward_length": dimensions.inner,
            "attention.head_count": dimensions.heads,
            "attention.head_count_kv": dimensions.kv_heads,
            "attention.key_length": dimensions.head_dim,
            "attention.value_length": dimensions.head_dim,
            epsilon: float(_real(config, epsilon_key)),
            "vocab_size": dimensions.vocabulary,
            "rope.dimension_count": int(dimensions.head_dim * rope.partial),
            "rope.freq_base": rope.theta,
            **gguf_rope.metadata(rope),
        }
        if self.window != "unknown":
            values["attention.sliding_window"] = int(config.get("sliding_window") or 0)
        if rope.local_theta is not None:
            values["rope.freq_base_swa"] = rope.local_theta
        for name, key in self.copied.items():
            if config.get(key) is not None:
                values[name] = _as_written(name, config[key])
        return {f"{self.name}.{key}": value for key, value in values.items()}

    def constants(self, config: Config, dimensions: Dimensions) -> dict[str, Tensor]:
        """Tensors that are computed from the config, by GGUF name."""
        rope = gguf_rope.read(config)
        return gguf_rope.tensors(rope, int(dimensions.head_dim * rope.partial))

    def _block_modules(self, layers: int) -> dict[str, Module]:
        return {
            f"{self.blocks}.{layer}.{module.name}": module
            for layer in range(layers)
            for module in self.modules
        }

    def _context(self, config: Config) -> int:
        """Positions that the file may be used with.

        A sliding window that the graph doesn't have is the same as full attention up to the
        window, so the context ends there.
        """
        context = _number(config, "max_position_embeddings")
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window is None or self.window == "computed":
            return context
        return min(context, int(window) or context)

    def _refuse(self, config: Config, dimensions: Dimensions, rope: gguf_rope.Rope) -> None:
        for key, values in {"quantization_config": (), **self.fixed}.items():
            if config.get(key) is not None and config[key] not in values:
                raise self.cannot_hold(f"{key} {config[key]!r}")
        for key in self.copied.values():
            if config.get(key) is None and key in self.defaults:
                raise self.cannot_hold(f"{key} null")
        if rope.kind not in self.ropes:
            raise self.cannot_hold(f"rope type {rope.kind!r}", f"Works: {', '.join(self.ropes)}.")
        if rope.partial != 1 and not self.partial_rope:
            raise self.cannot_hold(f"partial_rotary_factor {rope.partial}")
        if self.square and dimensions.size("q") != dimensions.hidden:
            heads = f"{dimensions.heads} heads of {dimensions.head_dim}"
            raise self.cannot_hold(f"{heads} for {dimensions.hidden} features")
        if self.check is not None:
            self.check(config, dimensions)

    def cannot_hold(self, what: str, fix: str = "") -> InputError:
        return InputError(
            f"{what}: GGUF's {self.name} architecture can't hold such a model",
            where="config.json",
            fix=fix,
        )


def _linear(
    name: str, rows: str, columns: str, bias: bool | str = False, change: Change = _keep
) -> Module:
    return Module(name, (rows, columns), bias, change)


def _norm(name: str, width: str = "hidden", bias: bool = False, change: Change = _keep) -> Module:
    return Module(name, (width,), bias, change)


def _attention(
    qkv: bool | str = False, out: bool | str = False, change: Change = _keep
) -> tuple[Module, ...]:
    """q, k, v and o, with biases; ``change``: of q and k."""
    return (
        _linear("self_attn.q_proj", "q", "hidden", qkv, change),
        _linear("self_attn.k_proj", "kv", "hidden", qkv, change),
        _linear("self_attn.v_proj", "kv", "hidden", qkv),
        _linear("self_attn.o_proj", "hidden", "q", out),
    )


def _gated(bias: bool | str = False) -> tuple[Module, ...]:
    return (
        _linear("mlp.gate_proj", "inner", "hidden", bias),
        _linear("mlp.up_proj", "inner", "hidden", bias),
        _linear("mlp.down_proj", "hidden", "inner", bias),
    )


def _pre_norms(attention: tuple[Module, ...], mlp: tuple[Module, ...]) -> tuple[Module, ...]:
    """A block with one RMSNorm before attention and one before the MLP."""
    return (_norm("input_layernorm"), *attention, _norm("post_attention_layernorm"), *mlp)


def _gemma_blocks(*, heads: bool, after: bool) -> tuple[Module, ...]:
    """``heads``: q and k are normalized by head; ``after``: norms after attention and MLP too."""

    def norm(name: str, width: str = "hidden") -> Module:
        return _norm(name, width, change=_add_one)

    by_head = [norm(f"self_attn.{part}_norm", "head") for part in "qk"] if heads else []
    last = ["post_attention_layernorm"]
    if after:
        last += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return (norm("input_layernorm"), *_attention(), *by_head, *map(norm, last), *_gated())


def _check_smollm3(config: Config, dimensions: Dimensions) -> None:
    """llama.cpp's graph leaves every fourth layer without rotary embeddings."""
    without = [int((layer + 1) % 4 != 0) for layer in range(dimensions.layers)]
    if config.get("no_rope_layers") not in (None, without) or (
        config.get("no_rope_layers") is None and config.get("no_rope_layer_interval", 4) != 4
    ):
        raise find("smollm3").cannot_hold("no_rope_layers other than every fourth")


def _check_gemma(name: str, period: int, largest: int) -> Callable[[Config, Dimensions], None]:
    """``period``: every such layer attends fully; ``largest``: layers of the model whose queries
    are scaled by hidden / heads, where the others' are by head_dim."""

    def check(config: Config, dimensions: Dimensions) -> None:
        architecture = find(name)
        kinds = [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(dimensions.layers)
        ]
        if config.get("layer_types") not in (None, kinds):
            raise architecture.cannot_hold(f"layer_types other than full at every {period}th")
        if config.get("sliding_window_pattern", period) != period:
            raise architecture.cannot_hold(f"sliding_window_pattern other than {period}")
        scale = dimensions.head_dim
        if dimensions.layers == largest:
            scale = dimensions.hidden // dimensions.heads
        if config.get("query_pre_attn_scalar", scale) != scale:
            raise architecture.cannot_hold(
                f"query_pre_attn_scalar {config['query_pre_attn_scalar']} other than {scale}"
            )

    return check


_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_GEMMA_NORM = _norm("model.norm", change=_add_one)
_GEMMA_FIXED = {
    "hidden_activation": _TANH_GELU,
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
}
_SILU = {"hidden_act": ("silu",)}
_NO_WINDOW = {"use_sliding_window": False}
_LLAMA3_ROPES = ("default", "linear", "llama3", "yarn")

ARCHITECTURES = (
    Architecture(
        name="llama",
        model_types=("llama", "mistral"),
        modules=_pre_norms(
            _attention("attention_bias", "attention_bias", _interleave), _gated("mlp_bias")
        ),
        fixed={**_SILU, "num_local_experts": ()},
        ropes=_LLAMA3_ROPES,
    ),
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        modules=_pre_norms(_attention(qkv=True), _gated()),
        defaults=_NO_WINDOW,
        fixed=_SILU,
        square=True,
    ),
    Architecture(
        name="qwen3",
        model_types=("qwen3",),
        modules=(
            _norm("input_layernorm"),
            *_attention(),
            _norm("self_attn.q_norm", "head"),
            _norm("self_attn.k_norm", "head"),
            _norm("post_attention_layernorm"),
            *_gated(),
        ),
        defaults={**_NO_WINDOW, "head_dim": 128},
        fixed={**_SILU, "attention_bias": (False,)},
    ),
    Architecture(
        name="gemma",
        model_types=("gemma",),
        modules=_gemma_blocks(heads=False, after=False),
        norm=_GEMMA_NORM,
        defaults={"tie_word_embeddings": True, "head_dim": 256},
        # Gemma 1 had "gelu" in its config before transformers corrected what it stands for.
        fixed={**_GEMMA_FIXED, "hidden_act": ("gelu", *_TANH_GELU)},
        ropes=("default", "linear"),
        output="never",
    ),
    Architecture(
        name="gemma2",
        model_types=("gemma2",),
        modules=_gemma_blocks(heads=False, after=True),
        norm=_GEMMA_NORM,
        copied={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
        fixed=_GEMMA_FIXED,
        ropes=("default", "linear"),
        window="computed",
        output="never",
        check=_check_gemma("gemma2", period=2, largest=46),
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text",),
        modules=_gemma_blocks(heads=True, after=True),
        norm=_GEMMA_NORM,
        copied={"final_logit_softcapping": "final_logit_softcapping"},
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        fixed={**_GEMMA_FIXED, "attn_logit_softcapping": ()},
        ropes=("default", "linear"),
        window="computed",
        check=_check_gemma("gemma3", period=6, largest=62),
    ),
    Architecture(
        name="phi3",
        model_types=("phi3",),
        modules=(
            _norm("input_layernorm"),
            _linear("self_attn.qkv_proj", "qkv", "hidden"),
            _linear("self_attn.o_proj", "hidden", "q"),
            _norm("post_attention_layernorm"),
            _linear("mlp.gate_up_proj", "two inner", "hidden"),
            _linear("mlp.down_proj", "hidden", "inner"),
        ),
        copied={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        fixed=_SILU,
        ropes=("default", "longrope"),
        partial_rope=True,
        square=True,
        window="written",
    ),
    Architecture(
        name="smollm3",
        model_types=("smollm3",),
        modules=_pre_norms(_attention(change=_interleave), _gated()),
        defaults={**_NO_WINDOW, "tie_word_embeddings": True, "rope_theta": 2e6},
        fixed={**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        check=_check_smollm3,
    ),
    Architecture(
        name="olmo2",
        model_types=("olmo2",),
        modules=(
            *_attention(),
            _norm("self_attn.q_norm", "q"),
            _norm("self_attn.k_norm", "kv"),
            _norm("post_attention_layernorm"),
            *_gated(),
            _norm("post_feedforward_layernorm"),
        ),
        fixed={**_SILU, "attention_bias": (False,)},
        square=True,
        output="needed",
    ),
    Architecture(
        name="granite",
        model_types=("granite",),
        modules=_pre_norms(
            _attention("attention_bias", "attention_bias", _interleave), _gated("mlp_bias")
        ),
        copied={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        defaults=dict.fromkeys(
            (
                *("attention_multiplier", "embedding_multiplier"),
                *("residual_multiplier", "logits_scaling"),
            ),
            1.0,
        ),
        fixed=_SILU,
        ropes=_LLAMA3_ROPES,
    ),
    Architecture(
        name="starcoder2",
        model_types=("starcoder2",),
        modules=(
            _norm("input_layernorm", bias=True),
            *_attention(qkv=True, out=True),
            _norm("post_attention_layernorm", bias=True),
            _linear("mlp.c_fc", "inner", "hidden", bias=True),
            _linear("mlp.c_proj", "hidden", "inner", bias=True),
        ),
        norm=_norm("model.norm", bias=True),
        epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
        defaults={"tie_word_embeddings": True},
        fixed={"hidden_act": _TANH_GELU, "use_bias": (True,)},
        square=True,
    ),
    Architecture(
        name="gptneox",
        model_types=("gpt_neox",),
        modules=(
            _norm("input_layernorm", bias=True),
            _linear("attention.query_key_value", "qkv", "hidden", True, _three_parts),
            _linear("attention.dense", "hidden", "hidden", bias=True),
            _norm("post_attention_layernorm", bias=True),
            _linear("mlp.dense_h_to_4h", "inner", "hidden", bias=True),
            _linear("mlp.dense_4h_to_h", "hidden", "inner", bias=True),
        ),
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        norm=_norm("gpt_neox.final_layer_norm", bias=True),
        head="embed_out",
        epsilon=("attention.layer_norm_epsilon", "layer_norm_eps"),
        copied={"use_parallel_residual": "use_parallel_residual"},
        defaults={"use_parallel_residual": True, "rotary_pct": 0.25},
        # llama.cpp computes GELU by its tanh formula; the exact one differs by 1e-3 at most.
        fixed={"hidden_act": ("gelu", *_TANH_GELU), "attention_bias": (True,)},
        ropes=("default", "linear"),
        partial_rope=True,
        square=True,
        output="needed",
    ),
)


def find(name: str) -> Architecture:
    """Return an architecture by llama.cpp's name. Raises InputError for another one."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise InputError(f"is of architecture {name!r}", fix=f"Those that can be read: {known}.")


def of_model(config: Config) -> Architecture:
    """Return the architecture that a config's model is written as.

    Raises InputError, with the list of those that work, for another model_type.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(name for a in ARCHITECTURES for name in a.model_types)
    raise InputError(
        f"model_type {model_type!r} can't be written as GGUF",
        where="config.json",
        fix=f"Those that can: {known}.",
    )


def complete(architecture: Architecture, config: Config) -> dict[str, Any]:
    """The config with the settings that transformers would take where it is silent."""
    mistral = {"sliding_window": 4096} if config.get("model_type") == "mistral" else {}
    return {**architecture.defaults, **mistral, **config}


def _as_written(name: str, value: Any) -> Any:
    """Scales are stored as float32, lengths and switches as they are."""
    if isinstance(value, bool) or name.endswith("_length"):
        return value
    return float(value)


def _number(config: Config, key: str) -> int:
    return int(_real(config, key))


def _real(config: Config, key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float):
        raise InputError(f"has no number {key}", subject="config.json")
    return value
