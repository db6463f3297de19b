"""What became of every tensor of a checkpoint, and that each one is in the artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from quantkit.base.errors import QuantkitError
from quantkit.base.names import listed, starred
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.registry import safetensors_formats
from quantkit.model.text_only import TextOnly
from quantkit.plan.base import FLOATS
from quantkit.plan.gguf import GgufFilePlan
from quantkit.plan.linears import LinearPlan
from quantkit.results.manifest import Fate, Fates, MergeFates


def check_complete(plan: LinearPlan, directory: Path) -> None:
    """Compare the weight files' tensors with the plan's.

    Raises QuantkitError where one is missing, stored twice, or not in the plan.
    """
    suffixes = safetensors_formats()[plan.format].suffixes
    parts = {
        f"{tensor.name.removesuffix('.weight')}.{suffix}": tensor.name
        for tensor in plan.tensors
        if tensor.quantized
        for suffix in suffixes
    }
    check_stored(directory, {tensor.name for tensor in plan.tensors}, parts)


def check_stored(
    directory: Path, planned: Collection[str], parts: Mapping[str, str] | None = None
) -> None:
    """Compare the weight files' tensors with the planned names.

    parts: the name of the weight that each of these is a part of. Raises QuantkitError where one is
    missing, stored twice, or not planned.
    """
    stored: list[str] = []
    for file in sorted(directory.glob("*.safetensors")):
        stored += read_header(file)
    planned = set(planned)
    found = {(parts or {}).get(name, name) for name in stored}
    problems = [
        f"{verb} {listed(sorted(names))}"
        for verb, names in (
            ("lacks", planned - found),
            ("holds", found - planned),
            ("holds twice", _repeated(stored)),
        )
        if names
    ]
    if problems:
        raise QuantkitError(
            f"{' and '.join(problems)}, against its plan, and was not finished",
            where=str(directory),
            fix="This is a fault of quantkit: please report it with the recipe and the model.",
        )


def fates(plan: LinearPlan, source: Checkpoint, rescaled: Collection[str]) -> Fates:
    """What became of each tensor of ``source``. rescaled: keys of those multiplied by a scale.

    A tensor that holds all experts counts as quantized where its parts are.
    """
    skeleton = plan.skeleton
    views = skeleton.views
    kept = {tensor.name for tensor in plan.tensors if not tensor.quantized}
    used = {views[key].key if key in views else key for key in skeleton.names.values()}
    used |= {key for fusion in skeleton.fusions.values() for key in fusion.keys}
    towers = tuple(f"{name}." for name in skeleton.towers)
    apart = {key for name, key in skeleton.names.items() if name.startswith(towers)}
    quantized, scaled, copied, unused = [], [], [], []
    scales = {views[key].key if key in views else key for key in rescaled}
    for key in source.entries:
        if key not in kept:
            quantized.append(key)
        elif key in scales:
            scaled.append(key)
        elif key in used and key not in apart:
            copied.append(key)
        else:
            unused.append(key)
    left_out = source.left_out if isinstance(source, TextOnly) else []
    return Fates(_fate(quantized), _fate(scaled), _fate(copied), _fate(unused), _fate(left_out))


def merge_fates(changed: Collection[str], keys: Iterable[str]) -> MergeFates:
    """What became of the tensors ``keys`` of a merged checkpoint, of which some are ``changed``."""
    keys = list(keys)
    return MergeFates(
        _fate([key for key in keys if key in changed]),
        _fate([key for key in keys if key not in changed]),
    )


def gguf_fates(plan: GgufFilePlan, source: Checkpoint) -> Fates:
    """What became of each tensor of ``source`` in a GGUF file."""
    views = plan.file.views
    types = {
        views[part.key].key if part.key in views else part.key: part.type
        for part in plan.file.parts
        if part.key is not None
    }
    used = [key for key in source.entries if key in types]
    left_out = [key for key in source.entries if key not in types]
    if isinstance(source, TextOnly):
        left_out += source.left_out
    return Fates(
        quantized=_fate(key for key in used if types[key] not in FLOATS),
        rescaled=_fate([]),
        copied=_fate(key for key in used if types[key] in FLOATS),
        unused=_fate([]),
        left_out=_fate(left_out),
    )


def _fate(keys: Iterable[str]) -> Fate:
    keys = list(keys)
    return Fate(len(keys), tuple(dict.fromkeys(starred(key) for key in sorted(keys))))


def _repeated(names: list[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
