"""Rotary embeddings: config.json's settings as GGUF metadata and tensors.

References: transformers' ``modeling_rope_utils.py`` (what the settings mean), llama.cpp's
``src/llama-model.cpp`` (what it reads) and ``ggml_rope_ext`` (what it computes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.base.errors import InputError

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """The settings of the layers with full attention.

    ``kind``: transformers' name of the scaling; ``theta``: the base of the frequencies;
    ``partial``: the part of a head that is rotated; ``local_theta``: the base in sliding layers,
    where it is another one; ``settings``: all others.
    """

    kind: str
    theta: float
    partial: float
    local_theta: float | None
    settings: Mapping[str, Any]

    @property
    def unrounded(self) -> bool:
        """Whether YaRN interpolates between places that llama.cpp would round."""
        return self.kind == "yarn" and self.settings.get("truncate") is False

    def number(self, name: str) -> float:
        """A setting that must be there. Raises InputError when it isn't."""
        value = self.settings.get(name)
        if not isinstance(value, int | float):
            raise InputError(f"rope type {self.kind} has no number {name}", where="config.json")
        return float(value)


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The settings in a config.json of any age.

    Raises InputError for a scaling of sliding layers, which GGUF has no key for.
    """
    # transformers 5 writes rope_parameters, nested by the layers' kind where there are two; before
    # that it was rope_theta at top level and rope_scaling (type before 4.43), and
    # rope_local_base_freq for sliding layers; GPT-NeoX had names of its own.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    local = dict(rope.get("sliding_attention") or {})
    settings = dict(rope.get("full_attention") or rope)
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    # Phi-3's first names for it.
    if kind == "su" or (kind == "yarn" and config.get("model_type") == "phi3"):
        kind = "longrope"
    largest = config.get("max_position_embeddings")
    # In transformers the one at top level wins, and the model's own size is the last resort.
    original = _first(config, settings, "original_max_position_embeddings") or largest
    for key, value in (
        ("max_position_embeddings", largest),
        ("original_max_position_embeddings", original),
    ):
        if value is not None:
            settings[key] = value
    if local.get("rope_type", "default") != "default":
        raise InputError(
            f"rope type {local['rope_type']} in sliding layers can't be written as GGUF",
            where="config.json",
        )
    theta = _first(settings, config, "rope_theta", "rotary_emb_base")
    partial = _first(settings, config, "partial_rotary_factor", "rotary_pct")
    local_theta = _first(local, config, "rope_theta" if local else "rope_local_base_freq")
    return Rope(
        kind=kind,
        theta=float(theta or _DEFAULT_THETA),
        partial=1.0 if partial is None else float(partial),
        local_theta=None if local_theta is None else float(local_theta),
        settings=settings,
    )


def rope_metadata(rope: Rope) -> dict[str, Any]:
    """The keys of the scaling, without the architecture's prefix.

    Raises InputError for a scaling that llama.cpp would compute in another way.
    """
    # llama3: in the tensor rope_freqs.weight; dynamic with alpha: in the base.
    if rope.kind in ("default", "llama3", "dynamic"):
        return {}
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.number("factor")}
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "longrope":
        original = rope.number("original_max_position_embeddings")
        return {
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": _longrope_attention(rope, original),
        }
    raise InputError(f"rope type {rope.kind!r} can't be written as GGUF", where="config.json")


def rope_notes(rope: Rope) -> tuple[str, ...]:
    """What llama.cpp computes otherwise than transformers."""
    if rope.unrounded:
        return (
            "yarn with truncate: false: llama.cpp rounds the two places between which frequencies "
            "are interpolated, transformers doesn't. Angles differ a little, as they do in every "
            "GGUF of such a model.",
        )
    if rope.kind != "longrope":
        return ()
    original = int(rope.number("original_max_position_embeddings"))
    if rope.number("max_position_embeddings") <= original:
        return ()
    return (
        f"longrope: once its context is over {original} tokens, llama.cpp takes the long factors "
        f"for every text, transformers only for texts over {original} tokens. Open the file with a "
        f"context of at most {original} (-c {original}) unless longer texts are needed.",
    )


def rope_tensors(rope: Rope, width: int) -> dict[str, Tensor]:
    """Divisors of the ``width / 2`` frequencies, float32, by GGUF name; none for most kinds."""
    if rope.kind == "llama3":
        return {FREQS: _llama3_divisors(rope, width)}
    if rope.kind == "longrope":
        return {
            LONG: _listed_divisors(rope, "long_factor", width),
            SHORT: _listed_divisors(rope, "short_factor", width),
        }
    return {}


def _first(settings: Mapping[str, Any], config: Mapping[str, Any], *names: str) -> Any:
    """The first of the names that is set, in the rope's settings, else at top level."""
    values = [settings.get(name) for name in names] + [config.get(name) for name in names]
    return next((value for value in values if value is not None), None)


def _yarn(rope: Rope) -> dict[str, Any]:
    betas = {
        f"rope.scaling.yarn_{key}": float(rope.settings[key])
        for key in ("beta_fast", "beta_slow")
        if rope.settings.get(key) is not None
    }
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope.number("factor"),
        "rope.scaling.original_context_length": int(
            rope.number("original_max_position_embeddings")
        ),
        **betas,
        **_yarn_attention(rope),
    }


def _yarn_attention(rope: Rope) -> dict[str, float]:
    """The scale of the rotated q and k, where it isn't the one that llama.cpp computes itself."""
    factor = rope.number("factor")

    def scale(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    wanted = usual = scale(1.0)
    if rope.settings.get("attention_factor") is not None:
        wanted = rope.number("attention_factor")
    elif rope.settings.get("mscale") and rope.settings.get("mscale_all_dim"):
        wanted = scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    if math.isclose(wanted, usual, rel_tol=1e-6):
        return {}
    return {"rope.scaling.attn_factor": wanted / usual}


def _longrope_attention(rope: Rope, original: float) -> float:
    """The scale of the rotated q and k: LongRoPE, arXiv 2402.13753, as transformers has it."""
    if rope.settings.get("attention_factor") is not None:
        return rope.number("attention_factor")
    # A factor of its own counts, as in transformers.
    factor = rope.settings.get("factor")
    factor = rope.number("max_position_embeddings") / original if factor is None else float(factor)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3_divisors(rope: Rope, width: int) -> Tensor:
    """Default over scaled frequencies, by transformers' ``_compute_llama3_parameters``."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, old_context = (rope.number(name) for name in names)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    wavelengths = 2 * math.pi * rope.theta**exponents
    smooth = (old_context / wavelengths - low) / (high - low)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(wavelengths > old_context / low, factor, divisors)
    return torch.where(wavelengths < old_context / high, 1.0, divisors)


def _listed_divisors(rope: Rope, name: str, width: int) -> Tensor:
    values = rope.settings.get(name)
    if not isinstance(values, list) or len(values) != width // 2:
        raise InputError(f"longrope has no {width // 2} numbers {name}", where="config.json")
    return torch.tensor(values, dtype=torch.float32)
