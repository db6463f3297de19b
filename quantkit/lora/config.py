"""adapter_config.json of a LoRA adapter, as PEFT saves it.

Field names and matching rules are PEFT's (https://huggingface.co/docs/peft/package_reference/lora).
Options that would change the merge in a way that isn't computed here are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_json

CONFIG_FILE = "adapter_config.json"
_SOFT = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"}
# Options whose adapters add something other than scale · B · A to a weight that is on disk.
_UNMERGEABLE = {
    "alora_invocation_tokens": "Activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA truncates the base weights and adds a diagonal",
    "layer_replication": "replicated layers need a base of another depth",
    "monteclora_config": "MonteCLoRA samples at run time",
    "use_bdlora": "block-diagonal LoRA isn't supported",
    "use_qalora": "QA-LoRA pools its inputs",
}
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # of PEFT
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """The fields of adapter_config.json, by shorter names.

    base: the model that it was trained for; rank, alpha: of modules that no pattern matches;
    rslora: rank-stabilized scales; targets: the modules that have factors, as a regular expression
    or as names, or None where they can't be checked (PEFT's defaults, ``all-linear``); excluded:
    modules without factors, likewise; saved: modules that are replaced as a whole; layers: the only
    ones with factors, none for all; tokens: the trained rows by an embedding's name, which is ""
    for the input embedding; tied: whether the output embedding shares the input embedding's
    factors and rows; parameters: ends of the names of parameters that have factors by themselves,
    whatever module they are in; assumed: what it doesn't say, with PEFT's default for it.
    """

    base: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...]
    saved: tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    tied: bool
    parameters: tuple[str, ...]
    assumed: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> LoraConfig:
        """Read the config of an adapter directory.

        Raises InputError for methods other than LoRA, and for variants that can't be merged.
        """
        path = directory / CONFIG_FILE
        if not path.is_file():
            raise InputError(
                f"holds no {CONFIG_FILE}",
                subject=str(directory),
                fix="Pass the directory that PEFT's save_pretrained made.",
            )
        values = read_json(path)
        _refuse(values, str(path))
        try:
            return cls._of(values)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise InputError(f"isn't a LoRA config of PEFT ({error})", subject=str(path)) from error

    @classmethod
    def _of(cls, values: dict[str, Any]) -> LoraConfig:
        assumed = tuple(f"{k} {v}" for k, v in _DEFAULTS.items() if k not in values)
        values = _DEFAULTS | values
        targets = values.get("target_modules")
        tokens = values.get("trainable_token_indices") or {}
        if isinstance(tokens, list):
            tokens = {"": tokens}
        config = cls(
            base=_text(values.get("base_model_name_or_path")) or None,
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            rank_pattern=dict(values.get("rank_pattern") or {}),
            alpha_pattern=dict(values.get("alpha_pattern") or {}),
            rslora=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
            fan_in_fan_out=bool(values.get("fan_in_fan_out")),
            targets=None if targets in (None, "all-linear") else _names(targets),
            excluded=_names(values.get("exclude_modules")),
            saved=_strings(values.get("modules_to_save")),
            layers=_integers(values.get("layers_to_transform")),
            layers_pattern=_strings(values.get("layers_pattern")),
            tokens={name: _integers(rows) for name, rows in tokens.items()},
            tied=bool(values.get("ensure_weight_tying")),
            parameters=_strings(values.get("target_parameters")),
            assumed=assumed,
        )
        if min([config.rank, *config.rank_pattern.values()]) < 1:
            raise ValueError("a rank is less than 1")
        if not all(
            math.isfinite(alpha) for alpha in (config.alpha, *config.alpha_pattern.values())
        ):
            raise ValueError("an alpha isn't a finite number")
        expressions = [config.targets, config.excluded, *config.rank_pattern, *config.alpha_pattern]
        for expression in (*expressions, *config.saved, *config.layers_pattern):
            if isinstance(expression, str):  # a list of names holds no expressions
                re.compile(expression)
        return config

    def settings_of(self, module: str) -> tuple[int, float]:
        """The rank and the scale of one module's factors."""
        return self.rank_of(module), self.scale_of(module)

    def rank_of(self, module: str) -> int:
        """The rank of one module's factors."""
        return int(self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank))

    def scale_of(self, module: str) -> float:
        """The scale of a module: alpha / r, or alpha / √r if rank-stabilized (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = float(self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def largest_rank(self) -> int:
        """The rank that PEFT gives to a combination of adapters."""
        return max(self.rank, *self.rank_pattern.values()) if self.rank_pattern else self.rank

    def targets_module(self, module: str) -> bool:
        """Whether PEFT would give a module of this name factors; ``targets`` mustn't be None."""
        if _matches(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if isinstance(self.targets, str) or module in (self.targets or ()):
            return _matches(self.targets or (), module)
        if not _matches(self.targets or (), module):
            return False
        return not self.layers or self._layer(module) in self.layers

    def targets_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` names this parameter."""
        return _matches(self.parameters, name)

    def _layer(self, module: str) -> int | None:
        """The number of the layer that a module is in, from its name."""
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, module):
                return int(match[1])
        return None

    def rows_of(self, module: str) -> tuple[int, ...]:
        """The trained rows of an embedding module, or of one that is tied to it."""
        for name, rows in self.tokens.items():
            if module == name or module.endswith("." + name):
                return rows
        return next(iter(self.tokens.values())) if len(self.tokens) == 1 else ()


def _refuse(values: dict[str, Any], where: str) -> None:
    kind = str(values.get("peft_type"))
    if kind in _SOFT:
        raise InputError(
            f"is of PEFT type {kind}, which learns virtual tokens: it has no weights to merge",
            subject=where,
            fix="Serve it with PEFT, or train a LoRA adapter.",
        )
    if kind != "LORA":
        raise InputError(
            f"is of PEFT type {kind}; only LORA can be merged",
            subject=where,
            fix="Merge it with PEFT's merge_and_unload where that exists, then quantize.",
        )
    for option, reason in _UNMERGEABLE.items():
        if values.get(option):
            raise InputError(f"sets {option}: {reason}, so it can't be merged", subject=where)
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise InputError(
            f"was trained with init_lora_weights={start}, which changed the base's weights too",
            subject=where,
            fix="Save it again with path_initial_model_for_weight_conversion, which makes it an "
            'ordinary adapter; or set "init_lora_weights": true and pass the base as changed.',
        )


def _matches(names: str | Iterable[str], module: str) -> bool:
    """Whether PEFT would match the module: a string is a regular expression, else ends of names."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _pattern(patterns: Iterable[str], module: str) -> str:
    """The first pattern that matches the end of a module's name; the name itself if none does."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"{value!r} is no name of a model")
    return value


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _strings(value)


def _strings(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{odd[0]!r} is no name of a module")
    return names


def _integers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(int(item) for item in value or ())
