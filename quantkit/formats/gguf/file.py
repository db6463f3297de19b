"""The plan of a GGUF file: every tensor and the metadata, before any weight is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.names import listed
from quantkit.checkpoint.header import check_layers
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.source import folder_name
from quantkit.checkpoint.views import View, ViewedSource
from quantkit.checkpoint.weights import TensorSource
from quantkit.formats.gguf.architectures.architecture import (
    EMBEDDING,
    OUTPUT,
    Architecture,
    Metadata,
)
from quantkit.formats.gguf.architectures.parts import CheckpointTensor, Dimensions
from quantkit.formats.gguf.architectures.table import read_config
from quantkit.formats.gguf.experts import expert_keys
from quantkit.formats.gguf.keys import beside_text, older_keys, remark_on, text_keys
from quantkit.formats.gguf.mixes import ModelTraits, find_mix
from quantkit.formats.gguf.rope import read_rope, rope_notes
from quantkit.formats.gguf.tensor_types import Choice, TypeOverride, choose_types
from quantkit.formats.gguf.tokenizer import plan_tokenizer
from quantkit.formats.gguf.transforms import Keep, Transform
from quantkit.methods.ggml.library import load_gguf
from quantkit.methods.ggml.types import row_bytes
from quantkit.model.skeleton import Skeleton

# Buffers that old checkpoints carry. llama.cpp computes them.
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class GgufTensorPlan:
    """One tensor that the file will have.

    ``name``: in the file. ``key``: in the checkpoint, None for a tensor that is computed from the
    config, whose value is ``constant``, and for one that is a stack of experts, of which
    ``experts`` has the keys. ``shape``: as in torch. ``type``: ggml's; ``wanted``: the one that the
    mix has for it, where ``type`` is a fallback for rows that this can't hold. ``transform``: from
    the checkpoint's tensor to the one that is stored.
    """

    name: str
    key: str | None
    shape: tuple[int, ...]
    type: str
    wanted: str
    nbytes: int
    transform: Transform = field(default_factory=Keep)
    constant: Tensor | None = field(default=None, compare=False, repr=False)
    experts: tuple[str, ...] = ()

    @cached_property
    def parts(self) -> tuple[GgufTensorPlan, ...]:
        """What is quantized by itself: each expert of a stack, or the tensor."""
        return tuple(
            replace(
                self,
                name=f"{self.name}[{number}]",
                key=key,
                shape=self.shape[1:],
                nbytes=self.nbytes // len(self.experts),
                experts=(),
            )
            for number, key in enumerate(self.experts)
        ) or (self,)

    @property
    def fallback(self) -> bool:
        return self.type != self.wanted

    def value(self, source: TensorSource | ViewedSource) -> Tensor:
        """The whole tensor that is quantized and stored.

        Raises InputError when the source's tensor doesn't have the planned shape.
        """
        if self.key is None:
            if self.constant is None:
                raise ValueError(f"{self.name} has neither a key nor a constant")
            return self.constant
        weight = source.read(self.key)
        stored = self.transform.apply(weight)
        if tuple(stored.shape) != self.shape:
            raise InputError(
                f"is {tuple(weight.shape)} where {self.shape} was planned", subject=self.key
            )
        return stored

    def rows(self, source: Checkpoint | ViewedSource, start: int, stop: int) -> Tensor:
        """``value(source)[start:stop]``, without reading the rest where the transform allows it."""
        unit = self.transform.rows
        if self.key is None or unit is None or start % unit or stop % unit:
            return self.value(source)[start:stop]
        return self.transform.apply(source.read_rows(self.key, start, stop))


@dataclass(frozen=True)
class GgufPlan:
    """Everything about a file but the weights themselves.

    ``mix``: its name; ``architecture``: llama.cpp's name; ``metadata``: all of the file's keys;
    ``notes``: sentences on what the file doesn't hold, and on what llama.cpp will do otherwise than
    transformers; ``left_out``: keys of the checkpoint's tensors that text doesn't run
    through; ``views``: parts of the checkpoint's tensors that have keys of their own.
    """

    mix: str
    architecture: str
    tensors: tuple[GgufTensorPlan, ...]
    metadata: Metadata
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    views: Mapping[str, View] = field(default_factory=dict, repr=False)

    def viewed(self, source: Any) -> Any:
        """``source``, read by the keys of ``tensors``."""
        return ViewedSource(source, self.views) if self.views else source

    @property
    def parts(self) -> Iterator[GgufTensorPlan]:
        """All that is quantized by itself, in the file's order."""
        return (part for tensor in self.tensors for part in tensor.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def fallbacks(self) -> tuple[GgufTensorPlan, ...]:
        """The tensors whose rows the mix's type can't hold."""
        return tuple(tensor for tensor in self.tensors if tensor.fallback)


def plan_file(
    source: Checkpoint,
    mix: str,
    overrides: Iterable[TypeOverride] = (),
    *,
    name: str | None = None,
    imatrix: bool = False,
    no_fallback: bool = False,
    pre_tokenizer: str | None = None,
) -> GgufPlan:
    """Decide on every tensor and on the metadata.

    ``name``: ``general.name`` (default: the directory's). ``imatrix``: importance weights will be
    given for the matrices of the blocks. ``no_fallback``: rows that the mix's type can't hold are
    an error. ``pre_tokenizer``: llama.cpp's name of the one to write, instead of the one that is
    shown to split text as the tokenizer does.

    No weights are read, except an output matrix beside tied embeddings: it is left out where it
    equals the embedding.

    Raises InputError for a model, a tokenizer, a mix or an override that can't be written, and
    when the checkpoint's keys and shapes are not exactly those that its config asks for.
    """
    recipe = find_mix(mix)
    where = str(source.directory)
    config_file = str(source.directory / "config.json")
    try:
        architecture, config = read_config(source.config, source.directory / "config.json")
        dimensions = architecture.dimensions(config)
        check_layers("num_hidden_layers", dimensions.layers, len(source.entries), config_file)
        of_config = architecture.metadata(config, dimensions)
        constants = architecture.constants(config, dimensions)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"holds a value that no model has ({type(error).__name__}: {error})",
            subject=config_file,
        ) from error
    name = name or folder_name(source.directory.resolve())
    tokenizer = plan_tokenizer(source.tokenizer, dimensions.vocabulary, name, pre_tokenizer)
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": recipe.file_type,
        "general.quantization_version": int(load_gguf().GGML_QUANT_VERSION),
        **of_config,
        **tokenizer.metadata,
    }
    stored, views, left_out = _tensors(source, architecture, config, dimensions)
    shapes = {tensor.name: tensor.stored_shape for tensor in stored}
    shapes |= {gguf: tuple(tensor.shape) for gguf, tensor in constants.items()}
    traits = ModelTraits(
        architecture.name,
        dimensions.layers,
        dimensions.heads,
        dimensions.kv_heads,
        experts=dimensions.own.get("expert_count", 0),
        tied=OUTPUT not in shapes,
        imatrix=imatrix,
    )
    try:
        choices = choose_types(shapes, recipe, traits, overrides)
    except InputError as error:
        raise InputError(error.what, where=error.where or where, fix=error.fix) from error
    if no_fallback:
        _refuse_fallbacks(choices, shapes, where)
    tensors = [_planned(tensor, choices[tensor.name]) for tensor in stored]
    tensors += [_constant(gguf, tensor) for gguf, tensor in constants.items()]
    notes = (*tokenizer.notes, *rope_notes(read_rope(config)))
    if left_out:
        notes = (remark_on(left_out, towers=bool(config.get("vision_config"))), *notes)
    return GgufPlan(mix, architecture.name, tuple(tensors), metadata, notes, left_out, views)


def _tensors(
    source: Checkpoint, architecture: Architecture, config: Mapping[str, Any], sizes: Dimensions
) -> tuple[list[CheckpointTensor], Mapping[str, View], tuple[str, ...]]:
    """The checkpoint's tensors that the file needs, in its order.

    With them, the parts of tensors that have keys of their own, and the keys of those left out.

    Raises InputError where the checkpoint lacks one, or has one that the file has no place for.
    """
    where = str(source.directory)
    head = f"{architecture.head}.weight"
    tensors = list(architecture.tensors(config, sizes))
    output = CheckpointTensor(head, OUTPUT, (sizes.vocabulary, sizes.hidden), Keep())
    present = {key for key in source.entries if not key.endswith(_UNUSED_SUFFIXES)}
    # Under other names, or as parts of others; and further ones, which transformers knows too.
    views: Mapping[str, View] = {}
    left_out: set[str] = set()
    if {tensor.key for tensor in tensors} ^ present - {output.key}:
        skeleton = Skeleton(source)
        keys = {**text_keys(skeleton, architecture), **expert_keys(skeleton, architecture)}
        views, left_out = skeleton.views, beside_text(skeleton) & present
        single = [tensor.key for tensor in tensors if not tensor.experts]
        keys |= older_keys(skeleton, (key for key in single if key not in keys), present)
        tensors = [tensor.renamed(keys) for tensor in tensors]
        output = output.renamed(keys)
    expected = [*tensors, output] if output.key in present else tensors
    shapes = {key: shape for tensor in expected for key, shape in tensor.shapes().items()}
    stored = {views[key].key if key in views else key for key in shapes}
    missing = [key for key in shapes if key not in present and key not in views]
    leftover = sorted(present - left_out - stored)
    if missing:
        raise InputError(f"lacks {listed(missing)}", subject=where)
    if leftover:
        raise InputError(
            f"has tensors that GGUF's {architecture.name} architecture has no place for: "
            f"{listed(leftover)}",
            subject=where,
        )
    viewed = ViewedSource(source, views)
    for key, shape in shapes.items():
        if viewed.shape(key) != shape:
            raise InputError(
                f"{key} is {viewed.shape(key)}; config.json asks for {shape}", where=where
            )
    embedding = next(tensor.key for tensor in tensors if tensor.name == EMBEDDING)
    output_matrix = _output(source, architecture, config, output, embedding)
    return [*tensors, *output_matrix], views, tuple(sorted(left_out))


def _output(
    source: Checkpoint,
    architecture: Architecture,
    config: Mapping[str, Any],
    output: CheckpointTensor,
    embedding: str,
) -> list[CheckpointTensor]:
    """The output matrix where the file needs one of its own, or nothing.

    embedding: the key of the input embedding.
    """
    where = str(source.directory)
    present = output.key in source.entries
    # A config may tie what is stored twice and differs: as in transformers, both count then.
    tied = config.get("tie_word_embeddings", False)
    if not tied or (present and not _equal(source, embedding, output.key)):
        if not present:
            raise InputError(f"lacks {output.key}, and its embeddings aren't tied", subject=where)
        if architecture.output == "never":
            raise architecture.cannot_hold("an output matrix of its own")
        return [output]
    return [replace(output, key=embedding)] if architecture.output == "needed" else []


def _equal(source: Checkpoint, one: str, other: str) -> bool:
    return one == other or torch.equal(source.read(one), source.read(other))


def _planned(tensor: CheckpointTensor, choice: Choice) -> GgufTensorPlan:
    shape = tensor.stored_shape
    return GgufTensorPlan(
        name=tensor.name,
        key=None if tensor.experts else tensor.key,
        shape=shape,
        type=choice.type,
        wanted=choice.wanted,
        nbytes=math.prod(shape[:-1]) * row_bytes(choice.type, shape[-1]),
        transform=tensor.transform,
        experts=tensor.experts,
    )


def _constant(name: str, value: Tensor) -> GgufTensorPlan:
    return GgufTensorPlan(
        name=name,
        key=None,
        shape=tuple(value.shape),
        type="F32",
        wanted="F32",
        nbytes=4 * value.numel(),
        constant=value,
    )


def _refuse_fallbacks(
    choices: Mapping[str, Choice], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    fallen = [
        f"{name} (rows of {shapes[name][-1]}: {choice.type} for {choice.wanted})"
        for name, choice in choices.items()
        if choice.type != choice.wanted
    ]
    if fallen:
        raise InputError(
            f"{len(fallen)} tensors can't have the mix's type: {listed(fallen)}",
            where=where,
            fix="Allow the fallback, choose another mix, or name the types in overrides.",
        )
