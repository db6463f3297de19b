"""A plan for the formats in safetensors: linears of the decoder layers are quantized."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.base.names import listed, starred
from quantkit.calibration.folds import Fold
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.format import Contents
from quantkit.formats.registry import FORMATS
from quantkit.methods.grids import Grid
from quantkit.methods.linears import Scheme
from quantkit.methods.method import LinearMethod
from quantkit.model.skeleton import Skeleton
from quantkit.plan.base import Plan
from quantkit.plan.candidates import candidates, fused, kept_notes
from quantkit.plan.tensors import planned_tensors

# What recipes call the output embedding, whatever its name; it is never quantized.
_HEAD = "lm_head"


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

    def may_rescale(self, prefix: str, fold: Fold) -> bool:
        """Whether the weights of a fold in the layer with this prefix are stored for it alone."""
        names = [f"{prefix}{name}.weight" for name in (fold.producer, *fold.consumers)]
        keys = self.skeleton.names
        return all(name in keys and self._readers[keys[name]] == 1 for name in names)

    @cached_property
    def _readers(self) -> Counter[str]:
        return Counter(self.skeleton.names.values())


def plan_linears(method: LinearMethod, skeleton: Skeleton, checkpoint: Checkpoint) -> LinearPlan:
    """Give every linear of the decoder layers its scheme, and check that the format can hold it.

    Linears that can't be quantized, or whose shape doesn't fit the scheme, stay as they are, and
    the plan's notes name them. Raises InputError for a pattern that matches nothing, a scheme that
    the format can't hold, fused linears with different schemes, and where most of the layers'
    weights would stay; MachineError where a library that the method needs isn't installed.
    """
    found = candidates(skeleton)
    prefix = skeleton.prefix + "."
    if not any(name.startswith(prefix) for name in found.shapes):
        raise InputError(
            f"the layers of {type(skeleton.model).__name__} have no torch.nn.Linear to quantize",
            where=str(skeleton.directory),
        )
    _check_patterns(method, found.shapes, _without_linears(skeleton, found.shapes))
    if skeleton.has_experts:
        _check_experts(method, skeleton)
    method.check_available()
    default = _stored(method.default_scheme(), method.format)
    chosen = {name: method.scheme_of(name, default) for name in found.shapes}
    if _HEAD in method.ignore:
        chosen |= {name: None for name in found.shapes if name == skeleton.head}
    # What the recipe leaves out needs no other reason.
    kept = {name: why for name, why in found.kept.items() if chosen[name] is not None}
    schemes = {
        name: _stored(scheme, method.format)
        for name, scheme in chosen.items()
        if scheme is not None and name not in kept
    }
    if not schemes:
        raise InputError("leaves nothing to quantize", subject="quantize.ignore")
    kept |= _unfit(method, schemes, found.shapes, default)
    schemes = {name: scheme for name, scheme in schemes.items() if name not in kept}
    _check_share(skeleton, found.shapes)
    _check_fused(schemes, [name for name in found.shapes if name not in kept])
    skipped = [name for name in found.shapes if name not in schemes]
    skipped += _unknown_linears(skeleton, checkpoint)
    tensors = planned_tensors(method.format, schemes, skeleton, checkpoint)
    inside = {key for name, key in skeleton.names.items() if name.startswith(prefix)}
    return LinearPlan(
        method=method.method,
        format=method.format,
        tensors=tensors,
        settings=method,
        skeleton=skeleton,
        schemes=schemes,
        outside=tuple(tensor.name for tensor in tensors if tensor.name not in inside),
        quantization_config=_config(method, default, schemes, skipped, skeleton),
        kept=kept,
        notes=(*kept_notes(kept, schemes), *_not_run(method, schemes, found.shapes)),
    )


def _not_run(
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
    globs = list(dict.fromkeys(starred(name) for name in refused))
    return (
        f"transformers won't run the artifact {next(iter(refused.values()))}: {listed(globs)}. "
        f"To leave them as they are, set quantize.ignore to {json.dumps(method.ignore + globs)}.",
    )


def _check_experts(method: LinearMethod, skeleton: Skeleton) -> None:
    """Raise InputError where the method or the format can't do a mixture of experts."""
    where = str(skeleton.directory)
    if why := FORMATS[method.format].without_experts:
        raise InputError(
            f"is a mixture of experts, which the {method.format} format can't hold: {why}",
            subject=where,
            fix="Use a recipe for another format, such as ct-w4a16-g128 or gptq-w4-g128.",
        )
    needs = method.needs()
    if needs is not None and needs.propagate == "corrected":
        raise InputError(
            "is a mixture of experts, whose tokens take other ways in the quantized model: their "
            "inputs in both models can't be set beside each other",
            subject=where,
            fix="Set quantize.propagate to original or quantized.",
        )


def _unknown_linears(skeleton: Skeleton, checkpoint: Checkpoint) -> list[str]:
    """Names of what may be a linear to an engine, but is none here.

    Those are matrices that the model has no part for, and those of a layer's other modules: a
    router of experts often has a weight and a forward of its own.
    """
    unused = {key: key for key in skeleton.unused}
    inside = {
        name: skeleton.names[name]
        for name in skeleton.names
        if name.startswith(f"{skeleton.prefix}.")
        and not isinstance(skeleton.model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
    }
    found = [
        place.removesuffix(".weight")
        for name, key in (unused | inside).items()
        if name.endswith(".weight") and len(checkpoint.shape(key)) == 2
        # Engines call it as the checkpoint does, or as transformers does.
        for place in (name, key)
    ]
    return list(dict.fromkeys(found))


def _stored(scheme: Scheme, format_name: str) -> Scheme:
    """The scheme with the limits that the format puts on its zero points."""
    if not isinstance(scheme, Grid):
        return scheme
    format = FORMATS[format_name]
    lowest = 0 if scheme.symmetric else format.lowest_zero
    return replace(scheme, first_zero=lowest, exact_minimum=format.exact_minimum)


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
        matched = [*names, *others, _HEAD] if key == "quantize.ignore" else names
        if any(fnmatchcase(name, pattern) for name in matched):
            continue
        fix = f"Patterns are globs on full names such as {names[0]}."
        if any(fnmatchcase(name, f"{pattern}.*") for name in names):
            fix = f"Write {pattern}.* for the linears in it."
        raise InputError(f"pattern {pattern!r} matches no linear module", where=key, fix=fix)


def _unfit(
    method: LinearMethod,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    default: Scheme,
) -> dict[str, str]:
    """Why a linear can't have the recipe's scheme, by name; its fused siblings stay with it.

    Raises InputError where the recipe gave the linear a scheme of its own, where it wants no
    exceptions, and where they would be more than half of the weights.
    """
    failed = _misfits(method.format, schemes, shapes, default)
    if not failed:
        return {}
    asked = any(schemes[name] != default for name in failed)
    most = 2 * _weights(failed, shapes) > _weights(schemes, shapes)
    if asked or most or method.unfit == "refuse":
        raise _together(failed, len(schemes))
    reasons = {name: error.what for name, error in failed.items()}
    for siblings in fused(schemes):
        if first := next((name for name in siblings if name in failed), None):
            leaf = first.rpartition(".")[2]
            reason = f"engines load it as one matrix with {leaf}, which stays as it is"
            reasons |= {name: reason for name in siblings if name not in reasons}
    return reasons


def _weights(names: Iterable[str], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(shapes[name][0] * shapes[name][1] for name in names)


def _misfits(
    format_name: str,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    default: Scheme,
) -> dict[str, InputError]:
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
    return failed


def _together(failed: Mapping[str, InputError], count: int) -> InputError:
    """One error for all linears that have the same, or the user would meet them one at a time."""
    first = next(iter(failed.values()))
    alike = [name for name, error in failed.items() if error.what == first.what]
    if 1 < len(alike) < count:
        globs = ", ".join(dict.fromkeys(starred(name) for name in alike))
        fix = " ".join(filter(None, (first.fix, f"The same holds for {globs}.")))
        first = InputError(first.what, where=first.where, fix=fix)
    return first


def _check_share(skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError where most weights of the layers are in no linears."""
    prefix = skeleton.prefix + "."
    others = {
        name: value.numel()
        for name, value in skeleton.model.named_parameters()
        if name.startswith(prefix)
        and name.removesuffix(".weight") not in shapes
        and value.dim() > 1
    }
    inside = [name for name in shapes if name.startswith(prefix)]
    if sum(others.values()) <= _weights(inside, shapes):
        return
    largest = max(others, key=others.__getitem__)
    holder = skeleton.model.get_submodule(largest.rpartition(".")[0])
    raise InputError(
        f"most weights of the layers of {type(skeleton.model).__name__} are in no linears, such as "
        f"{starred(largest)} ({type(holder).__name__}), and would stay as they are",
        subject=str(skeleton.directory),
    )


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
