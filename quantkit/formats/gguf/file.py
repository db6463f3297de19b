"""GGUF files, planned: every tensor and the metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, alignment 32. The
bytes are laid out by gguf-py, llama.cpp's own writer; dimensions are reversed there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.names import listed
from quantkit.checkpoint.reader import Checkpoint, TensorSource
from quantkit.formats.gguf import tokenizer as gguf_tokenizer
from quantkit.formats.gguf.architectures.architecture import (
    OUTPUT,
    Architecture,
    CheckpointTensor,
    Dimensions,
    Metadata,
)
from quantkit.formats.gguf.architectures.table import architecture_of, with_defaults
from quantkit.formats.gguf.mixes import Choice, Layout, TypeOverride, choose_types, find_mix
from quantkit.formats.gguf.transforms import Keep, Transform
from quantkit.methods.ggml.types import load_gguf, row_bytes

# Buffers that old checkpoints carry; computed instead.
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class GgufTensorPlan:
    """One tensor of the file to be.

    ``key``: the checkpoint's key, None for a tensor computed from the config. ``shape``: as in
    torch. ``wanted``: the mix's type where ``type`` is a fallback for rows it can't hold.
    ``transform``: what is done to the checkpoint's tensor; ``transform.rows`` says whether it can
    be done in slices of rows: at multiples of so many, or (None) only to the whole tensor.
    ``constant``: the value of a tensor without key.
    """

    name: str
    key: str | None
    shape: tuple[int, ...]
    type: str
    wanted: str
    nbytes: int
    transform: Transform = field(default_factory=Keep)
    constant: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def fallback(self) -> bool:
        return self.type != self.wanted

    def value(self, source: TensorSource) -> Tensor:
        """The whole tensor as it is to be stored, before quantizing.

        Raises InputError when the source's tensor has another shape than was planned.
        """
        if self.key is None:
            if self.constant is None:
                raise ValueError(f"{self.name} has neither a key nor a constant")
            return self.constant
        weight = source.read(self.key)
        if tuple(weight.shape) != self.shape:
            raise InputError(
                f"is {tuple(weight.shape)} where {self.shape} was planned", subject=self.key
            )
        return self.transform.apply(weight)

    def rows(self, source: Checkpoint, start: int, stop: int) -> Tensor:
        """``value(source)[start:stop]``; of the file no more is read where that can be."""
        unit = self.transform.rows
        if self.key is None or unit is None or start % unit or stop % unit:
            return self.value(source)[start:stop]
        return self.transform.apply(source.read_rows(self.key, start, stop))


@dataclass(frozen=True)
class GgufPlan:
    """Everything about a file but the weights themselves."""

    mix: str
    architecture: str
    tensors: tuple[GgufTensorPlan, ...]
    metadata: Metadata

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
    """Decide on every tensor and on the metadata; no weights are read.

    ``name``: ``general.name`` (default: the directory's). ``imatrix``: importance weights will be
    given for the matrices of the blocks. ``no_fallback``: rows that the mix's type can't hold are
    an error. ``pre_tokenizer``: llama.cpp's name for it, instead of the one that is found. An
    output matrix beside tied embeddings is the exception that is read: it must be equal, and is
    then left out.

    Raises InputError for a model, a tokenizer, a mix or an override that can't be written, and
    when the checkpoint's keys and shapes are not just those that its config asks for.
    """
    recipe = find_mix(mix)
    where = str(source.directory)
    architecture = architecture_of(source.config)
    config = with_defaults(architecture, source.config)
    dimensions = architecture.dimensions(config)
    metadata = {
        "general.type": "model",
        "general.name": name or source.directory.resolve().name,
        "general.file_type": recipe.file_type,
        "general.quantization_version": int(load_gguf().GGML_QUANT_VERSION),
        **architecture.metadata(config, dimensions),
        **gguf_tokenizer.metadata(source.directory, dimensions.vocabulary, pre_tokenizer),
    }
    found = _tensors(source, architecture, config, dimensions)
    constants = architecture.constants(config, dimensions)
    shapes = {tensor.name: tensor.shape for tensor in found}
    shapes |= {gguf: tuple(tensor.shape) for gguf, tensor in constants.items()}
    layout = Layout(
        architecture.name,
        dimensions.layers,
        dimensions.heads,
        dimensions.kv_heads,
        tied=OUTPUT not in shapes,
        imatrix=imatrix,
    )
    try:
        choices = choose_types(shapes, recipe, layout, overrides)
    except InputError as error:
        raise InputError(error.what, where=error.where or where, fix=error.fix) from error
    if no_fallback:
        _refuse_fallbacks(choices, shapes, where)
    tensors = [_planned(tensor, choices[tensor.name]) for tensor in found]
    tensors += [_constant(gguf, tensor) for gguf, tensor in constants.items()]
    return GgufPlan(mix, architecture.name, tuple(tensors), metadata)


def _tensors(
    source: Checkpoint, architecture: Architecture, config: Mapping[str, Any], sizes: Dimensions
) -> list[CheckpointTensor]:
    """What goes into the file, in its order: proven to be all there is and all that is needed."""
    where = str(source.directory)
    head = f"{architecture.head}.weight"
    tensors = list(architecture.tensors(config, sizes))
    output = CheckpointTensor(head, OUTPUT, (sizes.vocabulary, sizes.hidden), Keep())
    present = {key for key in source.entries if not key.endswith(_UNUSED_SUFFIXES)}
    expected = [*tensors, output] if head in present else tensors
    shapes = {tensor.key: tensor.shape for tensor in expected}
    missing = [key for key in shapes if key not in present]
    leftover = sorted(present - set(shapes))
    if missing:
        raise InputError(f"lacks {listed(missing)}", subject=where)
    if leftover:
        raise InputError(
            f"has tensors that GGUF's {architecture.name} architecture has no place for: "
            f"{listed(leftover)}",
            subject=where,
        )
    for key, shape in shapes.items():
        if source.shape(key) != shape:
            raise InputError(
                f"{key} is {source.shape(key)}; config.json asks for {shape}", where=where
            )
    return [*tensors, *_output(source, architecture, config, output)]


def _output(
    source: Checkpoint,
    architecture: Architecture,
    config: Mapping[str, Any],
    output: CheckpointTensor,
) -> list[CheckpointTensor]:
    """The output matrix where the file needs one of its own, or nothing."""
    where = str(source.directory)
    present = output.key in source.entries
    embedding = f"{architecture.embedding}.weight"
    if not config.get("tie_word_embeddings", False):
        if not present:
            raise InputError(f"lacks {output.key}, and its embeddings aren't tied", subject=where)
        if architecture.output == "never":
            raise architecture.cannot_hold("an output matrix of its own")
        return [output]
    if present and not torch.equal(source.read(embedding), source.read(output.key)):
        raise InputError(
            f"ties its embeddings, yet {output.key} differs from {embedding}",
            subject=where,
            fix='Set "tie_word_embeddings": false in config.json if both were trained.',
        )
    return [replace(output, key=embedding)] if architecture.output == "needed" else []


def _planned(tensor: CheckpointTensor, choice: Choice) -> GgufTensorPlan:
    nbytes = math.prod(tensor.shape[:-1]) * row_bytes(choice.type, tensor.shape[-1])
    return GgufTensorPlan(
        tensor.name,
        tensor.key,
        tensor.shape,
        choice.type,
        choice.wanted,
        nbytes,
        tensor.transform,
    )


def _constant(name: str, value: Tensor) -> GgufTensorPlan:
    shape = tuple(value.shape)
    return GgufTensorPlan(name, None, shape, "F32", "F32", 4 * value.numel(), constant=value)


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
