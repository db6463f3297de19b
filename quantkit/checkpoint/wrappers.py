"""Names that a wrapper around a model puts into its keys, such as torch.compile's ``_orig_mod``.

A model saved from inside its wrapper has them in every key. No engine knows such keys, so they are
read, and written, without.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from quantkit.base.errors import CheckpointWarning, InputError

Entry = TypeVar("Entry")

# The attribute under which a wrapper holds the module that it wraps → what it is.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "module": "DataParallel, DDP or DeepSpeed",
}
_FLATTENED = {"_flat_param", "flat_param"}
_PEFT = "base_model.model."
_PEFT_PARTS = (".base_layer.", ".lora_", ".modules_to_save.")


def unwrap(key: str) -> tuple[str, frozenset[str]]:
    """A key without the names that wrappers put there, and those names."""
    parts = key.split(".")
    inside = [part for part in parts[:-1] if part not in _WRAPPERS]
    found = frozenset(part for part in parts[:-1] if part in _WRAPPERS)
    return ".".join([*inside, parts[-1]]), found


def described(wrappers: Iterable[str]) -> str:
    """Names of wrappers' attributes for messages, each with what it comes from."""
    return " and ".join(f"{name!r} ({_WRAPPERS[name]})" for name in sorted(wrappers))


def unwrap_entries(directory: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a checkpoint by their keys without wrappers' names.

    Warns where there are any. Raises InputError for a model in pieces of FSDP's, for one with an
    adapter still beside its weights, and where two keys become one.
    """
    where = str(directory)
    if flat := [key for key in entries if key.rpartition(".")[2] in _FLATTENED]:
        raise InputError(
            f"holds parameters that FSDP flattened into pieces ({flat[0]})",
            subject=where,
            fix="Save it again with StateDictType.FULL_STATE_DICT, from FSDP's own model.",
        )
    renamed: dict[str, str] = {}
    seen: set[str] = set()
    for key in sorted(entries):
        name, found = unwrap(key)
        if renamed.setdefault(name, key) != key:
            raise InputError(
                f"holds both {renamed[name]} and {key}, which would be the same tensor",
                subject=where,
                fix="Leave only the one that counts: save the model from outside its wrapper.",
            )
        seen |= found
    # A model held as ``model`` by a trainer's own module, which DDP then wrapped.
    held = all(key.startswith("model.module.") for key in entries)
    inner = ("model.model.", "model.lm_head.")
    outer = "model." if held and any(name.startswith(inner) for name in renamed) else ""
    peft = _PEFT if renamed and all(name.startswith(_PEFT) for name in renamed) else ""
    if peft and (left := [n for n in renamed if any(part in f".{n}" for part in _PEFT_PARTS)]):
        raise InputError(
            f"holds a model of PEFT's whose adapter isn't merged ({left[0]})",
            subject=where,
            fix="Save the adapter alone with its save_pretrained and pass it with --adapter, or "
            "save what merge_and_unload() returns.",
        )
    if not (seen or peft):
        return dict(entries)
    what = [described(seen)] if seen else []
    what += [f"{prefix.removesuffix('.')!r}" for prefix in (outer, peft) if prefix]
    warnings.warn(
        f"{where} was saved from inside a wrapper: its keys are read, and written, without "
        f"{' and '.join(what)}.",
        CheckpointWarning,
        stacklevel=3,
    )
    return {
        unwrap(key)[0].removeprefix(outer).removeprefix(peft): entry
        for key, entry in entries.items()
    }
