"""A plan for the formats in safetensors: linears of the decoder layers are quantized."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from quantkit.base.errors import InputError
from quantkit.base.names import listed, starred
from quantkit.calibration.folds import Fold
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.registry import FORMATS
from quantkit.methods.grids import Grid
from quantkit.methods.linears import Scheme
from quantkit.methods.method import LinearMethod
from quantkit.model.skeleton import Skeleton
from quantkit.plan.base import Plan
from quantkit.plan.candidates import candidates, kept_notes
from quantkit.plan.checks import (
    HEAD,
    check_experts,
    check_fused,
    check_patterns,
    check_share,
    not_run,
    unfit,
)
from quantkit.plan.tensors import planned_tensors


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
    check_patterns(method, skeleton, found.shapes)
    if skeleton.has_experts:
        check_experts(method, skeleton)
    method.check_available()
    default = _stored(method.default_scheme(), method.format)
    chosen = {name: method.scheme_of(name, default) for name in found.shapes}
    if HEAD in method.ignore:
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
    kept |= unfit(method, schemes, found.shapes, default)
    schemes = {name: scheme for name, scheme in schemes.items() if name not in kept}
    check_share(skeleton, found.shapes)
    check_fused(schemes, [name for name in found.shapes if name not in kept])
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
        notes=(*kept_notes(kept, schemes), *_not_run_notes(method, schemes, found.shapes)),
    )


def _not_run_notes(
    method: LinearMethod, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    refused = not_run(method.format, schemes, shapes)
    if not refused:
        return ()
    globs = list(dict.fromkeys(starred(name) for name in refused))
    return (
        f"transformers won't run the artifact {next(iter(refused.values()))}: {listed(globs)}. "
        f"To leave them as they are, set quantize.ignore to {json.dumps(method.ignore + globs)}.",
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
