"""What config.json may say of quantized weights, ours or another's, in one language.

Every tool has names of its own for the same layouts. What can be read is brought to the names
that the formats' own files use; everything else is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError
from quantkit.base.files import read_json

# AutoRound's packing_format → the format, and GPTQ's version.
_AUTO_ROUND = {
    **dict.fromkeys(("auto_gptq", "auto_round:auto_gptq"), ("gptq", "gptq")),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), ("gptq", "gptq_v2")),
    **dict.fromkeys(("auto_awq", "auto_round:auto_awq"), ("awq", "gemm")),
}
READABLE = "awq (gemm), gptq (v1 and v2), compressed-tensors, bitsandbytes, gguf"


@dataclass(frozen=True)
class Dialect:
    """format: one that can be read; variant: of its layout; settings: as the format's file reads.

    writer: who says that he wrote it, where it is said.
    """

    format: str
    variant: str | None
    settings: dict[str, Any]
    writer: str | None

    def __str__(self) -> str:
        return f"{self.format} ({self.variant})" if self.variant else self.format


def quantization_of(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of its quantization, or None for a plain one.

    Older tools wrote it beside config.json: AutoGPTQ as quantize_config.json, AutoAWQ as
    quant_config.json.
    """
    inside: dict[str, Any] | None = config.get("quantization_config")
    if inside:
        return inside
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (directory / name).is_file():
            return {"quant_method": method, **read_json(directory / name)}
    return None


def dialect_of(quantization: Mapping[str, Any], where: str) -> Dialect:
    """Understand a ``quantization_config``. Raises InputError, by name, for what can't be read."""
    method = str(quantization.get("quant_method")).lower()
    read = {
        "awq": _awq,
        "gptq": _gptq,
        "auto-round": _auto_round,
        "intel/auto-round": _auto_round,
        "compressed-tensors": _compressed,
        "bitsandbytes": _bitsandbytes,
    }.get(method)
    if read is None:
        raise _unreadable(method, where)
    return read(quantization, where)


def _awq(quantization: Mapping[str, Any], where: str) -> Dialect:
    version = _first(quantization, "version", "checkpoint_format", "format", default="gemm")
    bits = int(_first(quantization, "bits", "w_bit", default="4"))
    if version != "gemm" or bits != 4:
        raise _unreadable(f"awq ({version}, {bits} bits)", where)
    settings = dict(quantization)
    settings.setdefault("group_size", quantization.get("q_group_size", -1))
    return Dialect("awq", "gemm", settings, _meta(quantization))


def _gptq(quantization: Mapping[str, Any], where: str) -> Dialect:
    version = _first(quantization, "checkpoint_format", "format", default="gptq")
    if quantization.get("is_marlin_format"):
        version = "marlin"
    if version not in ("gptq", "gptq_v2"):
        raise _unreadable(f"gptq ({version})", where)
    word = _first(quantization, "pack_dtype", default="int32")
    if word != "int32":
        raise _unreadable(f"gptq (packed in {word})", where)
    settings = {**quantization, "checkpoint_format": version}
    return Dialect("gptq", _version(version), settings, _meta(quantization))


def _auto_round(quantization: Mapping[str, Any], where: str) -> Dialect:
    packing = _first(quantization, "packing_format", "backend", default="none")
    kind = _first(quantization, "data_type", default="int")
    activations = int(quantization.get("act_bits") or 16)
    rotated = bool(quantization.get("rotation_config") or quantization.get("hadamard_config"))
    if packing not in _AUTO_ROUND or kind != "int" or activations < 16 or rotated:
        more = "" if activations >= 16 else f", {activations}-bit activations"
        more += ", rotated" if rotated else ""
        raise _unreadable(f"auto-round ({packing}, {kind}{more})", where)
    name, version = _AUTO_ROUND[packing]
    settings = {**quantization, "quant_method": name}
    if name == "gptq":
        settings["checkpoint_format"] = version
    else:
        settings["zero_point"] = not quantization.get("sym", False)
    release = quantization.get("autoround_version")
    writer = f"auto-round {release}" if release else "auto-round"
    return Dialect(name, f"{_version(version)}, by {packing}", settings, writer)


def _compressed(quantization: Mapping[str, Any], where: str) -> Dialect:
    layout = str(quantization.get("format"))
    sparsity = quantization.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _unreadable(f"compressed-tensors ({sparsity['format']})", where)
    if quantization.get("transform_config"):
        raise _unreadable("compressed-tensors (with rotations at run time)", where)
    version = quantization.get("version")
    writer = f"compressed-tensors {version}" if version else None
    return Dialect("compressed-tensors", layout, dict(quantization), writer)


def _bitsandbytes(quantization: Mapping[str, Any], where: str) -> Dialect:
    kind = "int8"
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        kind = str(quantization.get("bnb_4bit_quant_type") or "fp4")
    return Dialect("bitsandbytes", kind, dict(quantization), None)


def _first(quantization: Mapping[str, Any], *names: str, default: str) -> str:
    """The first of the settings that is there, as lower-case text."""
    found = (quantization[name] for name in names if quantization.get(name) is not None)
    return str(next(found, default)).lower()


def _version(name: str) -> str:
    return {"gptq": "v1", "gptq_v2": "v2"}.get(name, name)


def _meta(quantization: Mapping[str, Any]) -> str | None:
    """The writer by GPTQModel's ``meta``, or as AutoRound signs what it exports for others."""
    named = (quantization.get("meta") or {}).get("quantizer")
    if named:
        names = named if isinstance(named, list) else [named]
        return ", ".join(str(name).replace(":", " ") for name in names)
    release = quantization.get("autoround_version")
    return f"auto-round {release}" if release else quantization.get("provider")


def _unreadable(name: str, where: str) -> InputError:
    return InputError(
        f"is quantized as {name}, which can't be read; formats that can: {READABLE}", subject=where
    )
