"""Whether a scheme's 16-bit scales can hold the weights that it gets, tried on some rows of each.

Formats store scales in fp16, whose smallest step is 2^-24 and whose largest value is 65504; the
K-quants of ggml divide a scale by up to 4,000 once more. Weights of very small or very large size
then lose far more than their bits would cost them, and nothing else shows it. A power of two
changes no error but this one, so each suspicious weight is quantized twice: as it is, and brought
to an ordinary size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.names import listed
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.views import ViewedSource
from quantkit.methods import fp8, nf4, rtn
from quantkit.methods.ggml.encoder import quantize_by_ggml
from quantkit.methods.ggml.method import MixMethod
from quantkit.methods.grids import Grid, Quantized
from quantkit.methods.linears import Scheme, relative_error
from quantkit.methods.method import AffineMethod, LinearMethod
from quantkit.plan.base import FLOATS, Plan
from quantkit.plan.candidates import fused
from quantkit.plan.gguf import GgufFilePlan
from quantkit.plan.linears import LinearPlan

# Weights whose largest is between these are held by every scheme.
_ORDINARY = (2.0**-8, 2.0**10)
_WORST = 2.0  # times the squared error that the scheme has for weights of ordinary size
Part = TypeVar("Part")
_CHUNKS, _ROWS = 4, 8  # rows of a weight that are tried: some in each of several places


def check_scales(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise InputError where a scheme's scales can't hold the weights of a planned tensor."""
    if isinstance(plan, GgufFilePlan):
        source = plan.file.viewed(checkpoint)
        tried = {
            part.key: tensor
            for tensor in plan.file.tensors
            for part in _some(tensor.parts)
            if part.key is not None and part.type not in FLOATS and len(part.shape) == 2
        }
        names = {key: tensor.name for key, tensor in tried.items()}
        trials: dict[str, Callable[[Tensor], Quantized]] = {
            key: _by_ggml(tensor.type) for key, tensor in tried.items()
        }
        schemes = {key: tensor.type for key, tensor in tried.items()}
        settings: MixMethod | LinearMethod = plan.settings
        if plan.linears is not None:
            names |= _names(plan.linears)
    elif isinstance(plan, LinearPlan):
        source = checkpoint
        names = _names(plan)
        of_module = {names[key]: key for key in names}
        trials = {of_module[name]: _by_scheme(scheme) for name, scheme in plan.schemes.items()}
        schemes = {of_module[name]: str(scheme) for name, scheme in plan.schemes.items()}
        settings = plan.settings
    else:
        return
    sizes = {
        key: size
        for key, trial in trials.items()
        if (key in checkpoint.entries or source is not checkpoint)
        and (size := _lost(_rows(source, key), trial)) is not None
    }
    if isinstance(plan, LinearPlan):
        sizes |= _lost_experts(plan, checkpoint, trials)
    if not sizes:
        return
    first = next(iter(sizes))
    wrong = "small" if sizes[first] < 1 else "large"
    raise InputError(
        f"weights up to {sizes[first]:.1e} are too {wrong} for the 16-bit scales of "
        f"{schemes[first]}, which would more than double what they lose: {listed(sizes)}",
        where=str(checkpoint.directory),
        fix=_fix(settings, [names[key] for key in sizes], list(names.values())),
    )


def _lost_experts(
    plan: LinearPlan, checkpoint: Checkpoint, trials: Mapping[str, Callable[[Tensor], Quantized]]
) -> dict[str, float]:
    """The largest weight of experts whose scales can't hold them, by key, where a tensor holds all.

    Some experts of each tensor are tried, and stand for all of it: the sizes of weights come from
    how a model is parametrized.
    """
    views, source = plan.skeleton.views, plan.skeleton.viewed(checkpoint)
    by_tensor: dict[tuple[str, object], list[str]] = {}
    for key in trials:
        if key in views and key not in checkpoint.entries:
            view = views[key]
            by_tensor.setdefault((view.key, str(view.rows)), []).append(key)
    found: dict[str, float] = {}
    for keys in by_tensor.values():
        lost = [size for key in _some(keys) if (size := _lost(_rows(source, key), trials[key]))]
        if lost:
            found |= dict.fromkeys(keys, lost[0])
    return found


def _some(parts: Sequence[Part]) -> Sequence[Part]:
    """Some of a layer's experts, which stand for all of them."""
    return parts[:: max(1, len(parts) // _CHUNKS)]


def _names(plan: LinearPlan) -> dict[str, str]:
    """The module of each weight that the plan quantizes, by the weight's key."""
    return {plan.skeleton.key(f"{name}.weight"): name for name in plan.schemes}


def _by_scheme(scheme: Scheme) -> Callable[[Tensor], Quantized]:
    if isinstance(scheme, Grid):
        return lambda weight: rtn.quantize(weight, scheme)
    if isinstance(scheme, nf4.Nf4Scheme):
        return lambda weight: nf4.quantize(weight, scheme)
    return fp8.quantize


def _by_ggml(type: str) -> Callable[[Tensor], Quantized]:
    # Some types are made with importance weights only.
    return lambda weight: quantize_by_ggml(weight, type, torch.ones(weight.shape[1]))


def _rows(source: Checkpoint | ViewedSource, key: str) -> Tensor:
    """Some rows of a weight, float32, those of zeros left out."""
    count = source.shape(key)[0]
    starts = sorted({count * part // _CHUNKS for part in range(_CHUNKS)})
    if isinstance(source, ViewedSource) and key in source.views:  # read as a whole
        whole = source.read(key)
        parts = [whole[s : s + _ROWS] for s in starts]
    else:
        parts = [source.read_rows(key, s, min(s + _ROWS, count)) for s in starts]
    rows = torch.cat(parts).float()
    return rows[rows.abs().amax(1) > 0]


def _lost(rows: Tensor, quantize: Callable[[Tensor], Quantized]) -> float | None:
    """The largest weight of ``rows`` (n, in) where scales can't hold them; None where they can."""
    largest = float(rows.abs().max()) if rows.numel() else 1.0
    # What isn't finite is refused with its name where it is quantized.
    if not math.isfinite(largest) or _ORDINARY[0] <= largest <= _ORDINARY[1]:
        return None
    ordinary = rows * 2.0 ** -round(math.log2(largest))
    error = relative_error(quantize(rows).dequantize(), rows)
    usual = relative_error(quantize(ordinary).dequantize(), ordinary)
    return None if error <= _WORST * usual else largest


def _fix(settings: MixMethod | LinearMethod, bad: list[str], names: list[str]) -> str:
    if isinstance(settings, MixMethod):
        types = [override.model_dump() for override in settings.overrides]
        types += [{"match": glob, "type": "BF16"} for glob in _globs(bad, names)]
        return f"Leave them as they are: set quantize.overrides to {json.dumps(types)}."
    # Engines load some linears as one matrix, which is quantized as a whole or not at all.
    together = [name for group in fused(names) if set(group) & set(bad) for name in group]
    globs = _globs(together, names)
    if isinstance(settings, AffineMethod):
        present = [override.model_dump(exclude_defaults=True) for override in settings.overrides]
        skipped: list[dict[str, object]] = [{"match": glob, "skip": True} for glob in globs]
        return f"Leave them as they are: set quantize.overrides to {json.dumps(present + skipped)}."
    return f"Leave them as they are: set quantize.ignore to {json.dumps(settings.ignore + globs)}."


def _globs(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names, with ``*`` for the layer's number where that matches no other of ``names``."""
    chosen, others = list(chosen), set(names) - set(chosen)

    def shortest(name: str) -> str:
        glob = re.sub(r"\.\d+\.", ".*.", name)
        return name if any(fnmatchcase(other, glob) for other in others) else glob

    return list(dict.fromkeys(map(shortest, chosen)))
