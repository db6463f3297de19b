"""A plan for the formats in safetensors: linears of the decoder layers are quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.base.names import dtype_name, listed
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.format import Contents
from quantkit.formats.registry import FORMATS
from quantkit.methods.grids import Grid
from quantkit.methods.linears import Scheme
from quantkit.methods.method import LinearMethod
from quantkit.model.skeleton import Skeleton
from quantkit.plan.base import Plan, PlannedTensor

# Engines load each of these as one matrix, so its parts must share one scheme.
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class LinearPlan(Plan):
    """A plan by which linears are quantized and all other tensors are kept.

    settings: the method, as the recipe sets it; schemes: by full module name; outside: keys of
    tensors that belong to no decoder layer; quantization_config: what config.json tells engines.
    """

    settings: LinearMethod
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


def plan_linears(method: LinearMethod, skeleton: Skeleton, checkpoint: Checkpoint) -> LinearPlan:
    """Give every linear its scheme, and check that the format can hold it.

    Raises InputError for a pattern that matches nothing, a group size that doesn't divide, a
    scheme that the format can't hold, or fused linears with different schemes, and MachineError
    where a library that the method needs isn't installed.
    """
    linears = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in skeleton.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    prefix = skeleton.prefix + "."
    if not any(name.startswith(prefix) for name in linears):
        raise InputError(
            f"the layers of {type(skeleton.model).__name__} have no torch.nn.Linear to quantize",
            where=str(skeleton.directory),
        )
    _check_patterns(method, linears, _without_linears(skeleton, linears))
    method.check_available()
    default = _stored(method.default_scheme(), method.format)
    schemes: dict[str, Scheme] = {}
    outside: list[str] = []
    for name in linears:
        scheme = method.scheme_of(name, default)
        if scheme is None:
            continue
        if not name.startswith(prefix):
            outside.append(name)
        schemes[name] = _stored(scheme, method.format)
    if outside:
        ignore = json.dumps([*method.ignore, *widest_globs(outside, linears)])
        others = f"and {len(outside) - 1} other linears are" if len(outside) > 1 else "is"
        raise InputError(
            f"{others} outside the decoder layers and can't be quantized",
            subject=outside[0],
            fix=f"Set quantize.ignore to {ignore}.",
        )
    if not schemes:
        raise InputError("leaves nothing to quantize", subject="quantize.ignore")
    _check_schemes(method.format, schemes, linears, default)
    _check_fused(schemes, linears)
    tensors = _tensors(method.format, schemes, skeleton, checkpoint)
    inside = {key for name, key in skeleton.names.items() if name.startswith(prefix)}
    return LinearPlan(
        method=method.method,
        format=method.format,
        tensors=tensors,
        settings=method,
        skeleton=skeleton,
        schemes=schemes,
        outside=tuple(tensor.name for tensor in tensors if tensor.name not in inside),
        quantization_config=_config(
            method, default, schemes, [name for name in linears if name not in schemes], skeleton
        ),
        notes=_notes(method, schemes, linears),
    )


def _notes(
    method: LinearMethod,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
) -> tuple[str, ...]:
    """Which linears transformers won't run, where its kernels are known to refuse their widths."""
    refused: dict[str, str] = {}
    for name, scheme in schemes.items():
        for loading in FORMATS[method.format].loading(Contents([scheme], [shapes[name]])):
            if loading.engine == "transformers" and loading.loads == "no":
                refused[name] = loading.why
    if not refused:
        return ()
    globs = list(dict.fromkeys(_INDEX.sub(".*.", name) for name in refused))
    return (
        f"transformers won't run the artifact {next(iter(refused.values()))}: {listed(globs)}. "
        f"To leave them as they are, set quantize.ignore to {json.dumps(method.ignore + globs)}.",
    )


def widest_globs(outside: Sequence[str], linears: Iterable[str]) -> list[str]:
    """The fewest globs that match the linears ``outside``, and no other one of ``linears``."""
    others = [name for name in linears if name not in outside]
    globs: list[str] = []
    for name in outside:
        if any(fnmatchcase(name, glob) for glob in globs):
            continue
        # The widest that matches no other: a tower's whole name, a dot and a star.
        parts = name.split(".")
        ends = [".".join(parts[:count]) + ".*" for count in range(1, len(parts))]
        alone = (end for end in ends if not any(fnmatchcase(other, end) for other in others))
        globs.append(next(alone, name))
    return globs


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Full names of linears, those together that engines load as one matrix."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((min(family) for family in _FUSED if leaf in family), leaf)
        groups.setdefault((parent, family), []).append(name)
    return [tuple(group) for group in groups.values()]


_INDEX = re.compile(r"\.\d+\.")


def _stored(scheme: Scheme, format_name: str) -> Scheme:
    """The scheme with the limits that the format puts on its zero points."""
    if not isinstance(scheme, Grid):
        return scheme
    format = FORMATS[format_name]
    lowest = 0 if scheme.symmetric else format.lowest_zero
    return replace(scheme, first_zero=lowest, exact_minimum=format.exact_minimum)


def _tensors(
    format_name: str, schemes: Mapping[str, Scheme], skeleton: Skeleton, checkpoint: Checkpoint
) -> tuple[PlannedTensor, ...]:
    quantized = {skeleton.key(f"{name}.weight"): scheme for name, scheme in schemes.items()}
    tensors = []
    for key in dict.fromkeys(skeleton.names.values()):
        shape = checkpoint.shape(key)
        if key in quantized:
            scheme, size = quantized[key], (shape[0], shape[1])
            nbytes = FORMATS[format_name].nbytes(size, scheme, skeleton.model.dtype)
            tensors.append(PlannedTensor(key, shape, str(scheme), nbytes, quantized=True))
        else:
            dtype = checkpoint.dtype(key)
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(PlannedTensor(key, shape, dtype_name(dtype), nbytes, quantized=False))
    return tuple(tensors)


def _config(
    method: LinearMethod,
    default: Scheme,
    schemes: Mapping[str, Scheme],
    skipped: list[str],
    skeleton: Skeleton,
) -> dict[str, Any]:
    format = FORMATS[method.format]
    fields = type(method).model_fields
    recorded = {name: getattr(method, name) for name in format.records if name in fields}
    return format.config(default, schemes, skipped, skeleton.model.dtype) | recorded


def _without_linears(skeleton: Skeleton, linears: Collection[str]) -> set[str]:
    """Names of modules that hold no linear, and of the parameters that no linear has."""
    holders = {
        ".".join(parts[:count])
        for parts in (name.split(".") for name in linears)
        for count in range(len(parts) + 1)
    }
    modules = {name for name, _ in skeleton.model.named_modules()} - holders
    parameters = {name for name in skeleton.names if name.rpartition(".")[0] not in linears}
    return modules | parameters | {skeleton.key(name) for name in parameters}


def _check_patterns(method: LinearMethod, linears: Iterable[str], others: Iterable[str]) -> None:
    """Raise InputError for a pattern of the recipe that matches nothing.

    others: what a recipe may ignore though it is never quantized, such as a projector whose weight
    is a parameter of its own. The name of a module that holds linears isn't among them: whoever
    ignores "model.layers.0" means its linears, which only "model.layers.0.*" matches.
    """
    names = list(linears)
    for key, pattern in method.patterns():
        matched = [*names, *others] if key == "quantize.ignore" else names
        if any(fnmatchcase(name, pattern) for name in matched):
            continue
        fix = f"Patterns are globs on full names such as {names[0]}."
        if any(fnmatchcase(name, f"{pattern}.*") for name in names):
            fix = f"Write {pattern}.* for the linears in it."
        raise InputError(f"pattern {pattern!r} matches no linear module", where=key, fix=fix)


def _check_schemes(
    format_name: str,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    default: Scheme,
) -> None:
    failed: dict[str, InputError] = {}
    for name, scheme in schemes.items():
        try:
            if isinstance(scheme, Grid):
                scheme.columns(shapes[name][1])
        except InputError as error:
            failed[name] = InputError(error.what, where=f"{name} (group_size)", fix=error.fix)
            continue
        try:
            FORMATS[format_name].check_scheme(name, shapes[name], scheme, default)
        except InputError as error:
            failed[name] = error
    if not failed:
        return
    # One error for all linears that have the same, or the user would meet them one at a time.
    first = next(iter(failed.values()))
    alike = [name for name, error in failed.items() if error.what == first.what]
    if 1 < len(alike) < len(schemes):
        globs = ", ".join(dict.fromkeys(_INDEX.sub(".*.", name) for name in alike))
        fix = " ".join(filter(None, (first.fix, f"The same holds for {globs}.")))
        first = InputError(first.what, where=first.where, fix=fix)
    raise first


def _check_fused(schemes: Mapping[str, Scheme], names: Iterable[str]) -> None:
    for siblings in fused(names):
        if len({str(schemes.get(sibling)) for sibling in siblings}) > 1:
            parent, _, _ = siblings[0].rpartition(".")
            leaves = sorted(sibling.rpartition(".")[2] for sibling in siblings)
            raise InputError(
                f"{', '.join(leaves)} are loaded as one matrix by the engines and "
                "need the same scheme",
                where=parent,
                fix="Let the override match all of them.",
            )
