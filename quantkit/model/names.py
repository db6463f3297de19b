"""Which checkpoint key each parameter of a model has, with none left over on either side.

transformers renames keys when it loads (a base-model prefix added or dropped, older spellings)
and fuses some (experts). Its own rules give the renames here. A fusion is refused, and so is a
key or a parameter without its counterpart: a tensor that is silently not loaded would ruin every
result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.base.names import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that old versions saved and that are computed today.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias)$")


class Described(Protocol):
    """A checkpoint, plain or quantized, whose tensors' shapes and values can be asked for."""

    @property
    def directory(self) -> Path: ...

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str) -> Tensor: ...


def match_names(model: PreTrainedModel, checkpoint: Described) -> dict[str, str]:
    """The checkpoint key of every parameter and persistent buffer of ``model``.

    Tied parameters have the key of the tensor that they share. Raises InputError when a key or a
    parameter is left over, when shapes differ, or when transformers would fuse tensors.
    """
    where = str(checkpoint.directory)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rename = renaming(model)
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    names: dict[str, str] = {}
    left_over = []
    for key in sorted(checkpoint.keys()):
        name, fusion = rename(key)
        if fusion is not None:
            raise InputError(
                f"transformers fuses {key} with other tensors when it loads "
                f"({model.config.model_type}); fused weights, mixtures of experts among them, "
                "aren't supported yet",
                where=where,
            )
        if name not in wanted:
            known = _COMPUTED.search(key) or any(p.search(key) for p in ignored)
            # Some quantizers give every linear a bias; one of zeros changes nothing.
            if not known and not (key.endswith(".bias") and not checkpoint.read(key).any()):
                left_over.append(key)
            continue
        if checkpoint.shape(key) != wanted[name]:
            raise InputError(
                f"tensor {key} has shape {checkpoint.shape(key)}; "
                f"config.json asks for {wanted[name]}",
                where=where,
                fix="Do config.json and the weights belong together?",
            )
        names[name] = key
    for target, source in model.all_tied_weights_keys.items():
        if target in names or source in names:
            names.setdefault(target, names.get(source, ""))
            names.setdefault(source, names[target])
    missing = [name for name in wanted if name not in names]
    if missing or left_over:
        problems = []
        if missing:
            problems.append(f"lacks {listed(sorted(missing))}")
        if left_over:
            problems.append(f"holds {listed(sorted(left_over))}, which the model doesn't have")
        raise InputError(
            f"{' and '.join(problems)} (model type {model.config.model_type})",
            where=where,
            fix=_common_prefix(list(checkpoint.keys()), wanted, rename)
            or "Is the download complete, and do config.json and the weights belong together?",
        )
    return names


def renaming(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """A function from a key to the name that transformers gives it when it loads ``model``.

    The second is None, or names what would be fused with other tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    wanted = dict.fromkeys(model.state_dict(), True)
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]

    def rename(key: str) -> tuple[str, str | None]:
        name, fusion = rename_source_key(
            key, renamings, converters, model.base_model_prefix, wanted
        )
        return name, fusion

    return rename


def _common_prefix(
    keys: Collection[str], wanted: Collection[str], rename: Callable[[str], tuple[str, str | None]]
) -> str | None:
    """What to do about a name before all keys without which they are the model's; else None."""
    prefix = next(iter(keys), "").partition(".")[0] + "."
    bare = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    inside = len(bare) == len(keys) and all(rename(key)[0] in wanted for key in bare)
    if not inside or any(rename(key)[0] in wanted for key in keys):
        return None
    return (
        f"All its keys begin with {prefix!r}, which a wrapper of the model put there: save the "
        "model that is inside, or take it off the keys."
    )


def refuse_experts(model: nn.Module, model_type: str, where: str) -> None:
    """Raise InputError for a mixture of experts, which module names show."""
    for name, module in model.named_modules():
        if re.search(r"experts?$", name.rsplit(".", 1)[-1]) or "SparseMoe" in type(module).__name__:
            raise InputError(
                f"is a mixture of experts ({model_type}: {name} is {type(module).__name__}); "
                "only dense decoders are supported so far",
                subject=where,
            )
