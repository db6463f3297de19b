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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.formats.gguf.architectures.parts import (
    CheckpointTensor,
    Config,
    Dimensions,
    Module,
    impossible_experts,
)
from quantkit.formats.gguf.rope import Rope, read_rope, rope_metadata, rope_tensors
from quantkit.formats.gguf.transforms import Keep, Transform
from quantkit.methods.ggml.library import load_gguf

Metadata = dict[str, Any]  # str, bool, int (u32), float (f32) or a list of one of these

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


def nothing(config: Config) -> Config:
    """No settings that follow from others."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures and the Hugging Face models that are written as it.

    - ``blocks``, ``embedding``, ``norm``, ``head``: names in the checkpoint; ``modules``: of the
      blocks, in the file's order; ``layer_kinds``: the kind of every layer, where they differ;
      ``outside``: modules that are in no block.
    - ``derived``: settings under their usual names, of a family that has them otherwise.
    - ``epsilon``: the GGUF key and the config's; ``copied``: GGUF key → config key, for settings
      that the graph needs; ``optional``: those of them that may be null; ``sizes``: GGUF key →
      config key of sizes of the family's own; ``by_layer``: GGUF key → the kind of the layers that
      have its value, where all others have 0; ``more``: keys that these fields can't express,
      None for one that isn't written.
    - ``fixed``: config key → the values that the graph can compute; ``ropes``: kinds of rotary
      scaling, none for a model without; ``rounds_yarn``: the family's YaRN is written although the
      graph rounds what the model doesn't, with a note; ``square``: the graph has heads * head_dim =
      hidden built in; ``unsupported``: what the graph can't compute of a model, where these fields
      can't express it.
    - ``window``: a sliding window is "computed" by the graph, in the layers that it has built in or
      in those "listed" in the file; or it is only "written"; or "unknown" to it.
    - ``output``: an output matrix of its own is "allowed", "needed" (tied embeddings are then
      written twice) or "never" loaded.
    """

    name: str
    model_types: tuple[str, ...]
    modules: tuple[Module, ...]
    layer_kinds: Callable[[Config, int], Sequence[str]] | None = None
    outside: tuple[Module, ...] = ()
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: Module | None = field(default=Module("model.norm", ("hidden",)))
    head: str = "lm_head"
    derived: Callable[[Config], Config] = nothing
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    copied: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    sizes: Mapping[str, str | Callable[[Config], int]] = field(default_factory=dict)
    by_layer: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[Config, Dimensions, Rope], Metadata] | None = None
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    rounds_yarn: bool = False
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
            own={name: self._own(config, key) for name, key in self.sizes.items()},
        )

    def names(self, layers: int) -> dict[str, str]:
        """GGUF name → checkpoint key of every tensor that a file may hold, biases included."""
        embedding = Module(self.embedding, (), stored="token_embd")
        ends = (embedding, Module(self.head, (), stored="output"))
        whole = (*ends, *self.outside, *([self.norm] if self.norm else []))
        modules = {module.name: module for module in whole}
        for layer in range(layers):
            apart = [module for module in self.modules if "*" not in module.name]
            modules |= {f"{self.blocks}.{layer}.{m.name}": m for m in apart}
        named = {full: self._name(full, module, layers) for full, module in modules.items()}
        return {
            **{
                f"{self._place(full)}.{name}.weight": f"{full}.weight"
                for full, module in modules.items()
                for name, _ in module.split
            },
            **self._named(modules, named),
        }

    def splits(self, dimensions: Dimensions) -> dict[str, dict[str, Transform]]:
        """Checkpoint key → what a file has of a tensor that it splits, by name."""
        return {
            f"{self.blocks}.{layer}.{module.name}.weight": {
                f"blk.{layer}.{name}.weight": change(dimensions) for name, change in module.split
            }
            for layer in range(dimensions.layers)
            for module in self.modules
            if module.split
        }

    def _named(
        self, modules: Mapping[str, Module], named: Mapping[str, str | None]
    ) -> dict[str, str]:
        return {
            f"{name}{end}": f"{full}{end}"
            for full, name in named.items()
            if name is not None and not modules[full].split
            for end in ([""] if modules[full].bare else [".weight", ".bias"])
        }

    def tensors(self, config: Config, dimensions: Dimensions) -> Iterator[CheckpointTensor]:
        """Every tensor that the config asks for but the output matrix, in the file's order."""
        keys = {key: name for name, key in self.names(dimensions.layers).items()}
        whole = (dimensions.vocabulary, dimensions.hidden)
        yield CheckpointTensor(f"{self.embedding}.weight", EMBEDDING, whole, Keep())
        for full, module in self._present(config, dimensions.layers):
            shape = tuple(dimensions.size(width) for width in module.shape)
            for end in module.tensors(config):
                key, change = f"{full}{end}", module.transform(end, dimensions)
                tall = shape
                if end == ".bias":
                    tall = shape[:2] if "*" in key else shape[:1]
                if module.split:
                    for stored, part in module.split:
                        name = f"{self._place(full)}.{stored}.weight"
                        yield CheckpointTensor(key, name, tall, part(dimensions))
                elif "*" in key:
                    name = f"{self._name(full, module, dimensions.layers)}{end}"
                    experts = _numbered(key, shape[0])
                    yield CheckpointTensor(key, name, tall, change, experts)
                else:
                    yield CheckpointTensor(key, keys[key], tall, change)

    def stacks(self, dimensions: Dimensions) -> dict[str, tuple[str, ...]]:
        """GGUF name → the experts' checkpoint keys of every stack that a file may hold."""
        places = [
            (f"{self.blocks}.{layer}.{module.name}", module)
            for layer in range(dimensions.layers)
            for module in self.modules
            if "*" in module.name
        ]
        return {
            f"{self._name(full, module, dimensions.layers)}{end}": _numbered(
                f"{full}{end}", dimensions.size(module.shape[0])
            )
            for full, module in places
            for end in (".weight", ".bias")
        }

    def transform(self, key: str, dimensions: Dimensions) -> Transform:
        """The change from the tensor of a checkpoint key to the one that is stored."""
        inside = re.sub(rf"^{re.escape(self.blocks)}\.\d+\.", "", key)
        name, dot, end = inside.rpartition(".")
        for module in (*self.modules, *self.outside, *([self.norm] if self.norm else [])):
            if module.name == (inside if module.bare else name):
                return module.transform(f"{dot}{end}", dimensions)
        return Keep()

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
            **self._positions(config, dimensions, rope),
            # A size of 0 is that of something which the model lacks.
            **{name: size for name, size in dimensions.own.items() if size},
        }
        for name, key in self.copied.items():
            if config.get(key) is not None:
                values[name] = _as_written(name, config[key])
        kinds = self._kinds(config, dimensions.layers)
        for name, kind in self.by_layer.items():
            values[name] = [values[name] if own == kind else 0 for own in kinds]
        if self.more is not None:
            values |= self.more(config, dimensions, rope)
        if what := impossible_experts(values):
            raise self.cannot_hold(what)
        return {f"{self.name}.{key}": v for key, v in values.items() if v is not None}

    def _positions(self, config: Config, dimensions: Dimensions, rope: Rope) -> Metadata:
        """The keys of rotary embeddings and of sliding windows."""
        values: Metadata = {}
        if self.ropes:
            values = {
                "rope.dimension_count": int(dimensions.head_dim * rope.partial),
                "rope.freq_base": rope.theta,
                **rope_metadata(rope),
            }
        window = int(config.get("sliding_window") or 0)
        if self.window in ("computed", "written"):
            values["attention.sliding_window"] = window
        sliding = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
        # llama.cpp ends the process where there is a window and no layer has it.
        if self.window == "listed" and window and any(sliding):
            values["attention.sliding_window"] = window
            values["attention.sliding_window_pattern"] = sliding
        if rope.local_theta is not None:
            values["rope.freq_base_swa"] = rope.local_theta
        return values

    def constants(self, config: Config, dimensions: Dimensions) -> dict[str, Tensor]:
        """Tensors that are computed from the config, by GGUF name."""
        rope = read_rope(config)
        return rope_tensors(rope, int(dimensions.head_dim * rope.partial))

    def _kinds(self, config: Config, layers: int) -> Sequence[str]:
        """The kind of every layer. Raises InputError for unknown ones, and for too few or many."""
        kinds = [""] * layers if self.layer_kinds is None else self.layer_kinds(config, layers)
        known = {"", *(module.kind for module in self.modules)}
        if len(kinds) != layers or not known.issuperset(kinds):
            raise self.cannot_hold(f"layers {', '.join(map(repr, kinds))} for {layers}")
        return kinds

    def _present(self, config: Config, layers: int) -> Iterator[tuple[str, Module]]:
        """The modules that a config asks for, but those of the vocabulary, in the file's order."""
        for module in self.outside:
            yield module.name, module
        for layer, kind in enumerate(self._kinds(config, layers)):
            for module in self.modules:
                if module.kind in ("", kind):
                    yield f"{self.blocks}.{layer}.{module.name}", module
        if self.norm is not None:
            yield self.norm.name, self.norm

    def _name(self, full: str, module: Module, layers: int) -> str | None:
        """The name in GGUF of a module, or of a bare parameter; None where it has none."""
        if module.stored and full == module.name:
            return module.stored
        if module.stored:
            return f"{self._place(full)}.{module.stored}"
        names = _gguf_names(self.name, layers)
        # The map has the names of some families without what is before the first dot.
        return names.get_name(full) or names.get_name(full.partition(".")[2])

    def _place(self, full: str) -> str:
        """What a module's layer is in GGUF."""
        return f"blk.{full.removeprefix(f'{self.blocks}.').partition('.')[0]}"

    def _own(self, config: Config, key: str | Callable[[Config], int]) -> int:
        return _number(config, key) if isinstance(key, str) else key(config)

    def _context(self, config: Config) -> int:
        """Positions that the file may be used with."""
        # A sliding window that the graph doesn't have is the same as full attention up to its
        # width, so the context ends there.
        context = _number(config, "max_position_embeddings")
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window is None or self.window in ("computed", "listed"):
            return context
        return min(context, int(window) or context)

    def _refuse(self, config: Config, dimensions: Dimensions, rope: Rope) -> None:
        for key, values in {"quantization_config": (), **self.fixed}.items():
            if config.get(key) is not None and config[key] not in values:
                raise self.cannot_hold(f"{key} {config[key]!r}")
        for key in self.copied.values():
            if config.get(key) is None and key not in self.optional:
                raise self.cannot_hold(f"{key} null")
        if "mrope_section" in rope.settings and "mrope" not in self.ropes:
            raise self.cannot_hold("mrope_section (positions of more than one dimension)")
        if self.ropes and rope.kind not in self.ropes:
            raise self.cannot_hold(f"rope type {rope.kind!r}", f"Works: {', '.join(self.ropes)}.")
        if rope.unrounded and not self.rounds_yarn:
            raise self.cannot_hold("yarn rope with truncate: false")
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


@lru_cache(maxsize=4)
def _gguf_names(architecture: str, layers: int) -> Any:
    """gguf-py's map of names."""
    gguf = load_gguf()
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, layers)


def _numbered(key: str, count: int) -> tuple[str, ...]:
    """A key with a star, for each of ``count`` experts."""
    return tuple(key.replace("*", str(number)) for number in range(count))


def _as_written(name: str, value: Any) -> Any:
    """Scales are stored as float32, lengths, counts and switches as they are."""
    if isinstance(value, bool) or name.endswith(("_length", "_count")):
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
