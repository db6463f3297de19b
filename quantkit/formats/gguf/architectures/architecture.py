"""How one of llama.cpp's architectures is described, and what follows from the description.

The description lists what a checkpoint of the family holds (so that nothing is left over and
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
from quantkit.formats.gguf.rope import Rope, read_rope, rope_metadata, rope_tensors
from quantkit.formats.gguf.transforms import Keep, Transform
from quantkit.methods.ggml.library import load_gguf

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
        """A width by the word that ``Module.shape`` has for it."""
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


def keep(dimensions: Dimensions) -> Transform:
    """Stored as the checkpoint has it."""
    return Keep()


@dataclass(frozen=True)
class Module:
    """A linear or a norm of a block.

    ``name``: after the layer's number in the checkpoint. ``shape``: of the weight, in the words
    of ``Dimensions.size``. ``bias``: whether it has one, or the config's key that decides it.
    ``change``: from the checkpoint's tensors to those that GGUF stores.
    """

    name: str
    shape: tuple[str, ...]
    bias: bool | str = False
    change: Change = keep


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
      that the graph needs; ``defaults``: transformers' values for settings that a config lacks.
    - ``fixed``: config key → the values that the graph can compute; ``ropes``: kinds of rotary
      scaling; ``square``: the graph has heads * head_dim = hidden built in; ``unsupported``: what
      the graph can't compute of a model, where these fields can't express it.
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
    unsupported: Callable[[Config, Dimensions], str | None] | None = None

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
        """Every tensor that the config asks for but the output matrix, in the file's order."""
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
        """The change from the tensor of a checkpoint key to the one that is stored."""
        module = re.sub(rf"^{re.escape(self.blocks)}\.\d+\.", "", key.rpartition(".")[0])
        changes = {m.name: m.change for m in (*self.modules, self.norm)}
        return changes.get(module, keep)(dimensions)

    def metadata(self, config: Config, dimensions: Dimensions) -> Metadata:
        """The keys that begin with the architecture's name.

        Raises InputError, naming the reason, for a model that the graph can't compute.
        """
        rope = read_rope(config)
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
            **rope_metadata(rope),
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
        rope = read_rope(config)
        return rope_tensors(rope, int(dimensions.head_dim * rope.partial))

    def _block_modules(self, layers: int) -> dict[str, Module]:
        return {
            f"{self.blocks}.{layer}.{module.name}": module
            for layer in range(layers)
            for module in self.modules
        }

    def _context(self, config: Config) -> int:
        """Positions that the file may be used with."""
        # A sliding window that the graph doesn't have is the same as full attention up to its
        # width, so the context ends there.
        context = _number(config, "max_position_embeddings")
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window is None or self.window == "computed":
            return context
        return min(context, int(window) or context)

    def _refuse(self, config: Config, dimensions: Dimensions, rope: Rope) -> None:
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
        if self.unsupported is not None and (what := self.unsupported(config, dimensions)):
            raise self.cannot_hold(what)

    def cannot_hold(self, what: str, fix: str = "") -> InputError:
        """The error for a model with a setting that the graph can't compute."""
        return InputError(
            f"{what}: GGUF's {self.name} architecture can't hold such a model",
            where="config.json",
            fix=fix,
        )


def _as_written(name: str, value: Any) -> Any:
    """Scales are stored as float32, lengths and switches as they are."""
    if isinstance(value, bool) or name.endswith("_length"):
        return value
    return float(value)


def _number(config: Config, key: str) -> int:
    value = int(_real(config, key))
    if not 0 <= value < 1 << 32:
        raise InputError(f"{key} is {value}, which GGUF has no number for", where="config.json")
    return value


def _real(config: Config, key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float):
        raise InputError(f"has no number {key}", subject="config.json")
    return value
