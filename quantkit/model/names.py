"""Which checkpoint key each parameter of a model has, with none left over on either side.

transformers renames keys when it loads (a base-model prefix added or dropped, older spellings)
and makes one parameter of several tensors (experts). Its own rules give both here. A key or a
parameter without its counterpart is refused: a tensor that is silently not loaded would ruin every
result. What transformers knows and doesn't load (heads for multi-token prediction, the towers that
a text model leaves out) is listed, so that whoever writes the model anew can copy it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.names import listed
from quantkit.model.fusions import Fusion, transforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Buffers that old versions saved and that are computed today.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias)$")

# The linear of one expert, and the module of all.
_EXPERT = re.compile(r"(.+)\.\d+\.\w+\.(?:weight|bias)$")


class Described(Protocol):
    """A checkpoint, plain or quantized, whose tensors' shapes and values can be asked for."""

    @property
    def directory(self) -> Path: ...

    def keys(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str) -> Tensor: ...


@dataclass(frozen=True)
class Match:
    """How a model's parameters and persistent buffers, and a checkpoint's keys, belong together.

    names: the key of each parameter that is stored as one tensor, tied ones included; fusions: of
    those that transformers makes of other tensors; unused: keys that it knows and doesn't load.
    """

    names: dict[str, str]
    fusions: dict[str, Fusion]
    separate: dict[str, str]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class TextPart:
    """How the tensors of a text model alone are found in a model that has more.

    decoder, head: what the names of the decoder's and of the output embedding's tensors begin with,
    in the model of text and in the one that it is a part of.
    """

    decoder: tuple[str, str]
    head: tuple[str, str]

    def whole(self, key: str) -> str:
        """A key of the text model as the model that it is a part of would have it."""
        for own, outer in (self.decoder, self.head):
            if key.startswith(f"{own}."):
                return f"{outer}.{key.removeprefix(f'{own}.')}"
        return key

    def holds(self, name: str) -> bool:
        """Whether a parameter of the model that it is a part of belongs to it."""
        return name.startswith((f"{self.decoder[1]}.", f"{self.head[1]}."))


def match_names(
    model: PreTrainedModel, checkpoint: Described, part: TextPart | None = None
) -> Match:
    """Find the key of every parameter and persistent buffer of ``model``.

    part: where the checkpoint holds nothing but the text model; others then have no key.

    Raises InputError when a key or a parameter is left over, or when shapes differ.
    """
    where = str(checkpoint.directory)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rename = renaming(model)
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    names: dict[str, str] = {}
    sources: dict[str, dict[str, str]] = {}  # of fused parameters: patterns by key
    separate: dict[str, str] = {}
    experts = {name.rpartition(".")[0] for name, shape in wanted.items() if len(shape) == 3}
    left_over, unused = [], []
    for key in sorted(checkpoint.keys()):
        name, pattern = rename(part.whole(key) if part else key)
        if pattern is not None:
            sources.setdefault(name, {})[key] = pattern
        elif name not in wanted and (expert := _EXPERT.match(name)) and expert[1] in experts:
            separate[name] = key
        elif name not in wanted:
            known = _COMPUTED.search(key) or any(p.search(key) for p in ignored)
            # Some quantizers give every linear a bias; one of zeros changes nothing.
            if known or (key.endswith(".bias") and not checkpoint.read(key).any()):
                unused.append(key)
            else:
                left_over.append(key if name == key else f"{key} (for transformers {name})")
        elif checkpoint.shape(key) != wanted[name]:
            raise InputError(
                f"tensor {key} has shape {checkpoint.shape(key)}; "
                f"config.json asks for {wanted[name]}",
                where=where,
                fix="Do config.json and the weights belong together?",
            )
        else:
            names[name] = key
    fusions: dict[str, Fusion] = {}
    renamings, converters = transforms(model) if sources else ([], [])
    for name, patterns in sources.items():
        fusion = Fusion(name, patterns, model, renamings, converters)
        fusions |= dict.fromkeys(fusion.targets(checkpoint, wanted, where), fusion)
    for target, source in model.all_tied_weights_keys.items():
        if target in names or source in names:
            names.setdefault(target, names.get(source, ""))
            names.setdefault(source, names[target])
    apart = {_EXPERT.match(name)[1] for name in separate}  # type: ignore[index]
    missing = [
        name
        for name in wanted
        if name not in names and name not in fusions and name.rpartition(".")[0] not in apart
        if part is None or part.holds(name)
    ]
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
    return Match(names, fusions, separate, tuple(unused))


def renaming(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """A function from a key to the name that transformers gives it when it loads ``model``.

    The second is None, or the pattern of the converter that makes a parameter of that name of this
    tensor and others.
    """
    from transformers.core_model_loading import rename_source_key

    wanted = dict.fromkeys(model.state_dict(), True)
    renamings, converters = transforms(model)

    def rename(key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, wanted
        )
        return name, pattern

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
