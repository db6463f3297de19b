"""The text model of a checkpoint that has images or sound beside it, as a checkpoint of its own.

Its tensors get the names that they have in transformers' class for text alone, whose loading rules
then prove that none is missing. Nothing is written: the tensors are read from where they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_optional_json
from quantkit.base.names import dtype_name, listed, starred
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import Sidecars
from quantkit.model.build import empty_model
from quantkit.model.names import Match, match_names
from quantkit.model.skeleton import name_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Settings that a wrapper may have where its text model looks for them.
_SHARED = ("bos_token_id", "eos_token_id")
# What describes images, videos and sound.
_PROCESSORS = {
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
}


class TextOnly(Checkpoint):
    """The text model within a checkpoint. Implements ``Weights``.

    config: what config.json of the text model alone holds; entries: its tensors, by the names that
    they have there; left_out: keys of the whole checkpoint's other tensors; settings: the config as
    transformers has it.
    """

    def __init__(self, whole: Checkpoint) -> None:
        """Raises InputError for a model of text, and for one whose text model has no class."""
        self.directory, self.files = whole.directory, whole.files
        where = str(whole.directory)
        model = empty_model(whole, None)
        self.settings = model.config.get_text_config(decoder=True)
        if self.settings is model.config:
            raise InputError(
                f"{type(model).__name__} is a model of text alone, and nothing can be left out",
                subject="--text-only",
                fix="Leave the option out.",
            )
        self.entries = whole.entries
        match = match_names(model, whole)
        class_name = _class_name(self.settings, type(model).__name__, where)
        self.config = self._config(model, class_name, tied=_tied(model, match))
        text = empty_model(self, None)
        renamed = _renamed(model, match, text, where)
        known = [re.compile(p) for p in text._keys_to_ignore_on_load_unexpected or ()]
        # What the class knows and doesn't load, such as heads for more than one token.
        kept = {
            key: key
            for key in match.unused
            if key not in renamed and any(pattern.search(key) for pattern in known)
        }
        names = {key: name for key, name in (renamed | kept).items() if key in whole.entries}
        self.entries = {name: whole.entries[key] for key, name in sorted(names.items())}
        match_names(text, self)
        self.left_out = sorted(whole.entries.keys() - names.keys())

    @property
    def remark(self) -> str:
        """A sentence on what was left out."""
        names = list(dict.fromkeys(starred(key) for key in self.left_out))
        count = len(self.left_out)
        what = f"{count} tensors are left out ({listed(names)})" if count else "nothing is left out"
        return f"--text-only: {what}, and config.json is that of {self.config['architectures'][0]}"

    @property
    def sidecars(self) -> Sidecars:
        """The files beside the weights, without those for images and sound."""
        found = Sidecars.of(self.directory)
        files = {name: path for name, path in found.files.items() if name not in _PROCESSORS}
        return Sidecars(files, found.settings)

    def _config(self, model: PreTrainedModel, class_name: str, *, tied: bool) -> dict[str, Any]:
        settings = self.settings
        for key in _SHARED:
            value = model.config.to_dict().get(key)
            if value is not None and getattr(settings, key, None) is None:
                setattr(settings, key, value)
        settings.tie_word_embeddings = tied
        settings.architectures = [class_name]
        settings.dtype = model.dtype
        content: dict[str, Any] = settings.to_dict()
        content.pop("_name_or_path", None)
        return {**content, "dtype": dtype_name(model.dtype)}


def holds_text_only(artifact: Path, whole: Checkpoint) -> bool:
    """Whether an artifact is the text model of a checkpoint that has more."""
    own, outer = read_optional_json(artifact / "config.json").get("model_type"), whole.config
    parts = [part.get("model_type") for part in outer.values() if isinstance(part, dict)]
    return own is not None and own != outer.get("model_type") and own in parts


def _class_name(settings: Any, whole: str, where: str) -> str:
    """transformers' class for the text model alone. Raises InputError without one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    name = CAUSAL.get(settings.model_type, "")
    kind = getattr(transformers, name, None)
    if kind is None or not isinstance(settings, kind.config_class):
        raise InputError(
            f"transformers has no class for the text model of {whole} alone "
            f"(model type {settings.model_type})",
            where=where,
            fix="Leave --text-only out: the other parts are then copied as they are.",
        )
    return name


def _tied(model: PreTrainedModel, match: Match) -> bool:
    """Whether the output embedding is stored as the input's, whatever the config says: engines go
    by the config, and would leave out one that is stored beside it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = [f"{name_of(model, module)}.weight" for module in (head, embedding) if module]
    return len({match.names.get(name) for name in names}) == 1


def _place(model: PreTrainedModel, module: nn.Module) -> str:
    """What the names of a module's parameters begin with."""
    name = name_of(model, module)
    return f"{name}." if name else ""


def _renamed(
    model: PreTrainedModel, match: Match, text: PreTrainedModel, where: str
) -> dict[str, str]:
    """The name of each key of the text model in ``text``, a model of text alone."""
    inside, outside = (_place(whole, whole.get_decoder()) for whole in (model, text))
    pairs = {
        name.removeprefix(inside): key
        for name, key in match.names.items()
        if name.startswith(inside)
    }
    prefixes = {key.removesuffix(rest) for rest, key in pairs.items() if key.endswith(rest)}
    odd = [key for rest, key in pairs.items() if not key.endswith(rest)]
    if odd or len(prefixes) != 1:
        raise InputError(
            "the text model's tensors have no prefix in common, so that --text-only can't tell "
            f"their names ({(odd or sorted(prefixes))[0]})",
            where=where,
        )
    [prefix] = prefixes
    keys = [*match.names.values(), *match.separate.values()]
    keys += [key for fusion in match.fusions.values() for key in fusion.keys]
    renamed = {
        key: f"{outside}{key.removeprefix(prefix)}" for key in keys if key.startswith(prefix)
    }
    head, own = model.get_output_embeddings(), text.get_output_embeddings()
    if head is not None and own is not None:
        name, new = name_of(model, head), name_of(text, own)
        for part in ("weight", "bias"):
            key = match.names.get(f"{name}.{part}")
            if key is not None and key not in renamed:
                renamed[key] = f"{new}.{part}"
    return renamed
