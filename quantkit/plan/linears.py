"""What an artifact will hold, decided before any work: the scheme and size of every tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from quantkit.base.errors import InputError, not_installed
from quantkit.base.names import dtype_name
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.registry import FORMATS
from quantkit.methods import nf4
from quantkit.methods.block import Scheme
from quantkit.methods.fp8 import Fp8Scheme
from quantkit.methods.grids import Grid
from quantkit.methods.nf4 import Nf4Scheme
from quantkit.model.skeleton import Skeleton
from quantkit.recipes.recipe import Awq, Fp8, Ggml, Gptq, GptqGguf, Nf4, Rtn, SmoothQuant

if TYPE_CHECKING:
    from quantkit.formats.gguf.file import GgufPlan

Uniform = SmoothQuant | Fp8 | Nf4  # one scheme for all modules
Linears = Rtn | Gptq | Awq | Uniform
FLOATS = ("F32", "F16", "BF16")
# Engines load each of these as one matrix, so its parts must share one scheme.
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor: name, shape as in the checkpoint, scheme to read, bytes on disk."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    quantized: bool

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class PlanRow:
    """Tensors that differ only in their layer, taken together."""

    name: str
    scheme: str
    count: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Plan:
    """All tensors of an artifact."""

    method: str
    format: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights."""
        return 8 * self.nbytes / sum(tensor.weights for tensor in self.tensors)

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Over the weights that are quantized."""
        chosen = [tensor for tensor in self.tensors if tensor.quantized]
        if not chosen:
            return None
        return 8 * sum(t.nbytes for t in chosen) / sum(t.weights for t in chosen)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "format": self.format,
            "bytes": self.nbytes,
            "bits_per_weight": {
                "file": self.bits_per_weight,
                "quantized": self.quantized_bits_per_weight,
            },
            "groups": [
                {**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.rows()
            ],
        }

    def rows(self) -> list[PlanRow]:
        """One row for each name (layer numbers as ``*``) and scheme, in order of appearance."""
        groups: dict[tuple[str, str], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            name = re.sub(r"\.\d+\.", ".*.", tensor.name)
            groups.setdefault((name, tensor.scheme), []).append(tensor)
        return [
            PlanRow(name, scheme, len(ts), sum(t.weights for t in ts), sum(t.nbytes for t in ts))
            for (name, scheme), ts in groups.items()
        ]


@dataclass(frozen=True)
class LinearPlan(Plan):
    """A plan for the formats in safetensors, where linears are quantized and the rest is kept.

    settings: the recipe's method; schemes: by full module name; outside: keys of tensors that
    belong to no decoder layer; quantization_config: what config.json says to engines.
    """

    settings: Linears
    skeleton: Skeleton
    schemes: dict[str, Scheme]
    outside: tuple[str, ...]
    quantization_config: dict[str, Any]

    def schemes_under(self, prefix: str) -> dict[str, Scheme]:
        """Schemes of the modules whose names start with ``prefix``, without it."""
        return {
            name.removeprefix(prefix): scheme
            for name, scheme in self.schemes.items()
            if name.startswith(prefix)
        }


@dataclass(frozen=True)
class GgufFilePlan(Plan):
    """A plan for one GGUF file; ``file`` has its metadata and the names there.

    linears: of the blocks, where they are on integer grids.
    """

    file: GgufPlan
    linears: LinearPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """What every plan has, and what was decided about the file.

        ``fallbacks``: names whose rows the mix's type can't hold, with the types wanted and given.
        """
        return {
            **super().to_json(),
            "mix": self.file.mix,
            "architecture": self.file.architecture,
            "pre_tokenizer": self.file.metadata["tokenizer.ggml.pre"],
            "fallbacks": {
                tensor.name: {"wanted": tensor.wanted, "type": tensor.type}
                for tensor in self.file.fallbacks
            },
        }


def plan_gguf(
    method: Ggml | GptqGguf, checkpoint: Checkpoint, name: str, *, imatrix: bool = False
) -> GgufFilePlan:
    """Give every tensor its ggml type.

    ``name`` becomes ``general.name``. ``imatrix``: the matrices of the blocks will be quantized
    with importance weights, which some mixes can't do without. Raises InputError.
    """
    from quantkit.formats.gguf.file import plan_file

    file = plan_file(
        checkpoint,
        method.mix,
        method.overrides,
        name=name,
        imatrix=imatrix,
        no_fallback=method.no_fallback,
        pre_tokenizer=method.pre_tokenizer,
    )
    return GgufFilePlan(method.method, method.format, describe_tensors(file), file)


def describe_tensors(file: GgufPlan) -> tuple[PlannedTensor, ...]:
    """A file's tensors. Raises MachineError where this machine can't quantize to their types."""
    from quantkit.methods.ggml.types import available

    if {tensor.type for tensor in file.tensors} - set(available()):
        raise not_installed("xllamacpp", "gguf")
    return tuple(
        PlannedTensor(
            tensor.name,
            tensor.shape,
            f"{tensor.type} (for {tensor.wanted})" if tensor.fallback else tensor.type,
            tensor.nbytes,
            quantized=tensor.type not in FLOATS,
        )
        for tensor in file.tensors
    )


def plan_linears(method: Linears, skeleton: Skeleton, checkpoint: Checkpoint) -> LinearPlan:
    """Give every linear its scheme and check that the format can hold it.

    Raises InputError for a pattern that matches nothing, a group size that doesn't divide, a
    scheme the format can't hold, or fused siblings with different schemes.
    """
    linears = {
        name: tuple(module.weight.shape)
        for name, module in skeleton.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    inside = {name for name in linears if name.startswith(skeleton.prefix + ".")}
    if not inside:
        raise InputError(
            f"the layers of {type(skeleton.model).__name__} have no torch.nn.Linear to quantize",
            where=str(skeleton.directory),
        )
    _every_pattern_matches(method, linears)
    default = _default_scheme(method)
    schemes: dict[str, Scheme] = {}
    for name in linears:
        scheme = _scheme_of(name, method, default)
        if scheme is None:
            continue
        if name not in inside:
            raise InputError(
                "lies outside the decoder layers and can't be quantized",
                subject=name,
                fix=f"Add it to the recipe: ignore: [{name}]",
            )
        schemes[name] = scheme
    if not schemes:
        raise InputError("leaves nothing to quantize", subject="quantize.ignore")
    _check(method, schemes, linears, default)
    quantized = {skeleton.key(f"{name}.weight"): name for name in schemes}
    tensors = []
    for key in dict.fromkeys(skeleton.names.values()):
        shape = checkpoint.shape(key)
        if key in quantized:
            scheme = schemes[quantized[key]]
            size = (shape[0], shape[1])
            nbytes = FORMATS[method.format].nbytes(size, scheme, skeleton.model.dtype)
            tensors.append(PlannedTensor(key, shape, str(scheme), nbytes, True))
        else:
            dtype = checkpoint.dtype(key)
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            label = dtype_name(dtype)
            tensors.append(PlannedTensor(key, shape, label, nbytes, False))
    inside_keys = {
        key for name, key in skeleton.names.items() if name.startswith(skeleton.prefix + ".")
    }
    skipped = [name for name in linears if name not in schemes]
    return LinearPlan(
        method.method,
        method.format,
        tuple(tensors),
        method,
        skeleton,
        schemes,
        tuple(tensor.name for tensor in tensors if tensor.name not in inside_keys),
        _quantization_config(method, default, schemes, skipped, skeleton),
    )


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Full names of linears, put together where engines load them as one matrix."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((min(family) for family in _FUSED if leaf in family), leaf)
        groups.setdefault((parent, family), []).append(name)
    return [tuple(group) for group in groups.values()]


def _quantization_config(
    method: Linears,
    default: Scheme,
    schemes: dict[str, Scheme],
    skipped: list[str],
    skeleton: Skeleton,
) -> dict[str, Any]:
    format = FORMATS[method.format]
    result = format.config(default, schemes, skipped, skeleton.model.dtype)
    fields = type(method).model_fields
    return result | {name: getattr(method, name) for name in format.records if name in fields}


def _default_scheme(method: Linears) -> Scheme:
    if isinstance(method, Nf4):
        nf4.library()
        return Nf4Scheme(method.block_size, method.double_quant)
    if isinstance(method, Fp8):
        return Fp8Scheme()
    if isinstance(method, SmoothQuant):
        return Grid(8, -1, symmetric=True, rounds_inputs=True)
    format = FORMATS[method.format]
    lowest = 0 if method.symmetric else format.lowest_zero
    return Grid(
        method.bits,
        method.group_size,
        method.symmetric,
        lowest,
        exact_minimum=format.exact_minimum,
    )


def _scheme_of(name: str, method: Linears, default: Scheme) -> Scheme | None:
    """The scheme of one linear; None leaves it as it is."""
    if any(fnmatchcase(name, pattern) for pattern in method.ignore):
        return None
    scheme: Scheme | None = default
    if isinstance(method, Uniform):
        return scheme
    for override in method.overrides:
        if not fnmatchcase(name, override.match):
            continue
        changes = override.model_dump(
            include={"bits", "group_size", "symmetric"}, exclude_none=True
        )
        scheme = None if override.skip else replace(scheme or default, **changes)
    return scheme


def _every_pattern_matches(method: Linears, names: Iterable[str]) -> None:
    names = list(names)
    patterns = [("quantize.ignore", pattern) for pattern in method.ignore]
    if not isinstance(method, Uniform):
        patterns += [("quantize.overrides", override.match) for override in method.overrides]
    for key, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = next(iter(names))
            raise InputError(
                f"pattern {pattern!r} matches no linear module",
                where=key,
                fix=f"Patterns are globs on full names such as {example}.",
            )


def _check(
    method: Linears,
    schemes: dict[str, Scheme],
    shapes: dict[str, tuple[int, ...]],
    default: Scheme,
) -> None:
    for name, scheme in schemes.items():
        out_features, in_features = shapes[name]
        if isinstance(scheme, Grid):
            try:
                scheme.columns(in_features)
            except InputError as error:
                raise InputError(error.what, where=f"{name} (group_size)", fix=error.fix) from None
        shape = (out_features, in_features)
        FORMATS[method.format].check_scheme(name, shape, scheme, default)
    for siblings in fused(shapes):
        if len({str(schemes.get(sibling)) for sibling in siblings}) > 1:
            parent, _, _ = siblings[0].rpartition(".")
            leaves = sorted(sibling.rpartition(".")[2] for sibling in siblings)
            raise InputError(
                f"{', '.join(leaves)} are loaded as one matrix by the engines and "
                "need the same scheme",
                where=parent,
                fix="Let the override match all of them.",
            )
