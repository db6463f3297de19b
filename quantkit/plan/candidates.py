"""Which linears of a model may be quantized, and why each of the others stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit.base.names import starred
from quantkit.model.experts import Experts
from quantkit.model.rehearsal import rehearse
from quantkit.model.skeleton import Skeleton

# Engines load each of these as one matrix, so its parts must share one scheme.
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})

OUTSIDE = "outside the decoder layers"


@dataclass(frozen=True)
class Candidates:
    """The linears of a model by full name.

    shapes: (out, in) of all, those outside the decoder layers included; kept: why a linear isn't
    quantized whatever the recipe says.
    """

    shapes: dict[str, tuple[int, int]]
    kept: dict[str, str]


def candidates(skeleton: Skeleton) -> Candidates:
    """Find them. Raises InputError where the layers can't be run one by one."""
    shapes = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in skeleton.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    readers = Counter(skeleton.names.values())
    routers = set(_routers(skeleton))
    ran = rehearse(skeleton)
    plain = {
        f"{skeleton.layer_name(index)}.{name}"
        for index in range(len(skeleton.layers))
        for name in skeleton.linears(index)
    }
    kept: dict[str, str] = {}
    for name in shapes:
        weight = f"{name}.weight"
        if not name.startswith(f"{skeleton.prefix}."):
            kept[name] = OUTSIDE
        elif weight in skeleton.fusions:
            kept[name] = "transformers makes its weight of several tensors"
        elif readers[skeleton.names[weight]] > 1:
            kept[name] = "several layers share its weight"
        elif name in routers:
            kept[name] = "it decides how much experts count for"
        elif name not in plain:
            kept[name] = "it computes more than a linear does"
        elif name not in ran:
            kept[name] = "the model uses its weight without running it as a linear"
    return Candidates(shapes, kept)


def _routers(skeleton: Skeleton) -> Iterable[str]:
    """Linears beside experts with one output for each of them, or with a single one."""
    for name, module in skeleton.model.named_modules():
        if not isinstance(module, Experts):
            continue
        parent = name.rpartition(".")[0]
        for other, linear in skeleton.model.get_submodule(parent).named_modules(prefix=parent):
            apart = isinstance(linear, torch.nn.Linear) and not other.startswith(f"{name}.")
            if apart and linear.weight.shape[0] in (1, len(module.pieces)):
                yield other


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Full names of linears, those together that engines load as one matrix."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((min(family) for family in _FUSED if leaf in family), leaf)
        groups.setdefault((parent, family), []).append(name)
    return [tuple(group) for group in groups.values()]


def kept_notes(kept: Mapping[str, str], others: Iterable[str]) -> tuple[str, ...]:
    """A sentence for each reason for which linears stay as they are. others: those that don't."""
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    rest = list(others)
    notes = []
    for reason, names in reasons.items():
        globs = _few(widest_globs(names, [*names, *rest]))
        notes.append(f"left as it is: {globs} ({len(names)} linears): {reason}")
    return tuple(notes)


def _few(globs: Sequence[str]) -> str:
    """Globs with layers and experts as stars, each once."""
    return ", ".join(dict.fromkeys(starred(glob) for glob in globs))


def widest_globs(outside: Sequence[str], linears: Iterable[str]) -> list[str]:
    """The fewest globs that match the linears ``outside``, and no other one of ``linears``."""
    chosen = set(outside)
    # Every prefix of every other name: a glob on one of these would match that name too.
    taken = {
        name[:end]
        for name in linears
        if name not in chosen
        for end, character in enumerate(name)
        if character == "."
    }
    globs: dict[str, None] = {}
    for name in outside:
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        wide = next((prefix for prefix in prefixes if prefix not in taken), None)
        globs[name if wide is None else f"{wide}.*"] = None
    return list(globs)
