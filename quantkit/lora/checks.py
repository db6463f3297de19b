"""Whether adapters belong to a base and to each other: errors, and warnings where it is likely.

Each function returns its warnings, one sentence each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from quantkit.base.errors import InputError
from quantkit.base.names import listed
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.source import folder_name
from quantkit.lora.adapter import Adapter, Part
from quantkit.lora.changes import Change
from quantkit.lora.modules import Modules


def check_combination(adapters: Sequence[Adapter]) -> list[str]:
    """Raise InputError for what can't be weighted, and for what PEFT can't combine either."""
    warnings = []
    for adapter in adapters:
        biased = any(part.added for part in adapter.parts.values())
        if adapter.lora.dora or biased:
            raise InputError(
                f"has {'DoRA magnitudes' if adapter.lora.dora else 'biases beside B'}, "
                "which can't be weighted or combined",
                subject=str(adapter.directory),
                fix="Merge it alone with weight 1; then merge the others into the result.",
            )
        whole = [name for name, part in adapter.parts.items() if part.replaced or part.tokens]
        if whole and adapter.weight != 1:
            warnings.append(
                f"the weight {adapter.weight:g} of {adapter.name} doesn't apply to "
                f"the tensors that it replaces: {listed(sorted(whole))}"
            )
    ranks = {adapter.lora.largest_rank() for adapter in adapters}
    if len(ranks) > 1:
        raise InputError(
            f"adapters of ranks {', '.join(map(str, sorted(ranks)))} can't be combined",
            where=str(adapters[0].directory),
            fix="Merge one, then merge the next into the result.",
        )
    if len(adapters) > 1 and adapters[0].lora.rslora:
        warnings.append(
            "PEFT multiplies a combination whose first adapter is rank-stabilized by √r once "
            "more; so does this merge"
        )
    return warnings


def check_targets(adapter: Adapter, base: Checkpoint, modules: Modules) -> list[str]:
    """Compare an adapter's tensors with the base's parameters and with its own config.

    Raises InputError for a tensor without a parameter to change, and for a module that the config
    names without a tensor.
    """
    lora, where, names = adapter.lora, str(adapter.directory), modules.names
    if unknown := [name for name in adapter.parts if name not in names]:
        raise InputError(
            f"{len(unknown)} of the {len(adapter.parts)} parameters that it changes aren't in "
            f"the base: {listed(sorted(unknown))}",
            where=where,
            fix="It was trained for another base" + (f": {lora.base}." if lora.base else "."),
        )
    factored = {name for name, part in adapter.parts.items() if part.a}
    if lora.parameters:
        _check_parameters(adapter, modules, factored)
    if lora.targets is None:
        return []
    present = {name for name in factored if adapter.parts[name].of is None}
    apart = any(modules.is_expert(name) for name in present)
    wanted = {
        name
        for name, key in names.items()
        if name.endswith(".weight")
        and len(modules.shape(base, name)) > 1
        # Experts that transformers keeps in one parameter are no modules that PEFT would find.
        and (apart or not modules.is_expert(name))
        and lora.targets_module(name.removesuffix(".weight"))
    }
    if missing := sorted(wanted - present):
        raise InputError(
            f"lacks the factors of {listed(missing)}, which its target_modules names",
            subject=where,
            fix="The adapter is incomplete, or was trained for another base.",
        )
    shared = set(modules.vocabulary) if lora.tied else set()
    if extra := sorted(n for n in present - wanted - shared if not adapter.targets(n)):
        return [
            f"{adapter.name} has factors for {listed(extra)}, which its "
            "target_modules doesn't name; they are merged"
        ]
    return []


def _check_parameters(adapter: Adapter, modules: Modules, factored: set[str]) -> None:
    """Raise InputError for a parameter that ``target_parameters`` names without a tensor."""
    placed = {part.of for part in adapter.parts.values() if part.of}
    wanted = {
        f"{module}.{leaf}"
        for module in modules.named
        for leaf in modules.parameters_of(module)
        if adapter.lora.targets_parameter(f"{module}.{leaf}")
    }
    if missing := sorted(wanted - placed - factored):
        raise InputError(
            f"lacks the factors of {listed(missing)}, which its target_parameters name",
            subject=str(adapter.directory),
            fix="The adapter is incomplete, or was trained for another base.",
        )


def check_keys(adapter: Adapter) -> list[str]:
    """Warn of tensors that are merged though PEFT leaves them out, and of settings left open."""
    warnings = []
    if adapter.lora.assumed:
        warnings.append(
            f"the config of {adapter.name} leaves open what PEFT takes as "
            f"{' and '.join(adapter.lora.assumed)}; so does this merge"
        )
    if adapter.strange:
        warnings.append(
            f"{adapter.name} has {len(adapter.strange)} of {len(adapter.entries)} tensors under "
            f"keys that aren't PEFT's, such as {adapter.strange[0]}: PEFT ignores them for most "
            "models, and here they are merged"
        )
    return warnings


def check_effect(adapter: Adapter, base: Checkpoint, modules: Modules) -> list[str]:
    """Warn of factors that add nothing. Raises InputError where the whole adapter changes nothing.

    B is zero before training, and stays so where no gradient reaches it; but all of B are zero
    where an adapter was saved from a sharded model without gathering it.
    """
    pairs = {name: part for name, part in adapter.parts.items() if part.a and part.b}
    if pairs and adapter.weight == 0:  # asked for
        return [f"{adapter.name} adds nothing: its weight is 0"]
    idle = [name for name, part in pairs.items() if _adds_nothing(adapter, name, part)]
    if len(idle) == len(pairs) and not any(
        _has_effect(adapter, name, part, base, modules) for name, part in adapter.parts.items()
    ):
        raise InputError(
            f"changes nothing: {_why_nothing(adapter, len(pairs))}",
            subject=str(adapter.directory),
            fix="Save it again after training, and under FSDP or DeepSpeed with the whole state "
            "dict gathered; or leave it out, for the base alone.",
        )
    if not idle:
        return []
    return [
        f"{adapter.name} adds nothing to {len(idle)} of the {len(pairs)} weights that it has "
        f"factors for, since A or B is zero: {listed(sorted(idle))}"
    ]


def _why_nothing(adapter: Adapter, pairs: int) -> str:
    if not pairs:
        return "what it replaces is what the base has"
    if adapter.lora.alpha == 0:
        return "its lora_alpha is 0"
    return f"A or B is zero in all of its {pairs} pairs of factors"


def _adds_nothing(adapter: Adapter, name: str, part: Part) -> bool:
    scale = adapter.weight * adapter.lora.scale_of(part.of or name.rpartition(".")[0])
    return scale == 0 or not all(adapter.read(key).any() for key in (part.b, part.a) if key)


def _has_effect(
    adapter: Adapter, name: str, part: Part, base: Checkpoint, modules: Modules
) -> bool:
    """Whether something other than factors changes the base's parameter."""
    module = name.rpartition(".")[0]
    change = Change(module, module in modules.conv1d, None, [(adapter, part)])
    if part.added and (added := change.added()) is not None and added.any():
        return True
    if not (part.replaced or part.tokens or part.magnitude):
        return False
    weight = modules.read(base, name)
    replaced = change.replaced()
    if replaced is not None and (
        replaced.shape != weight.shape or not torch.equal(replaced.to(weight.dtype), weight)
    ):
        return True
    if part.tokens:
        return not torch.equal(change.with_tokens(weight.clone()), weight)
    if (factors := change.factors()) is None:
        return False
    # With nothing added, only magnitudes are left; they may have been rounded when they were saved.
    weight = weight.float()
    return not torch.allclose(factors.merge(weight.clone(), torch.float32), weight, rtol=1e-2)


def check_base_name(adapter: Adapter, base: Checkpoint, name: str) -> list[str]:
    """Compare the base that an adapter's config names with ``base``, also called ``name``."""
    known = {name, str(base.directory), str(base.config.get("_name_or_path"))}
    wanted = adapter.lora.base
    if wanted and _last_part(wanted) not in {_last_part(name) for name in known}:
        return [f"{adapter.name} was trained for {wanted}; the base is {name}"]
    return []


def _last_part(name: str) -> str:
    return folder_name(Path(name.replace("\\", "/"))).lower()
