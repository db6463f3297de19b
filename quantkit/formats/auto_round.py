"""AutoRound's checkpoints: another tool's wrapping of the awq and gptq formats.

It names its packing in ``packing_format``. Where that begins with ``auto_round``, the tensors are
those of the format, but only AutoRound's own loader recognizes the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.formats.format import Dialect, Loading, Unreadable, first_setting

NAMES = ("auto-round", "intel/auto-round")  # as quant_method
NEEDED_BY_TRANSFORMERS = ("auto-round",)
LOADING = (
    Loading("transformers", "yes", "with auto-round"),
    Loading("vLLM", "untried", "has a method for AutoRound's own packing"),
)
# packing_format → the format, and its version.
_PACKINGS = {
    **dict.fromkeys(("auto_gptq", "auto_round:auto_gptq"), ("gptq", "gptq")),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), ("gptq", "gptq_v2")),
    **dict.fromkeys(("auto_awq", "auto_round:auto_awq"), ("awq", "gemm")),
}
_VERSIONS = {"gptq": "v1", "gptq_v2": "v2"}


def dialect(quantization: Mapping[str, Any]) -> Dialect:
    """Understand AutoRound's ``quantization_config``. Raises Unreadable."""
    packing = first_setting(quantization, "packing_format", "backend", default="none")
    kind = first_setting(quantization, "data_type", default="int")
    activations = int(quantization.get("act_bits") or 16)
    rotated = bool(quantization.get("rotation_config") or quantization.get("hadamard_config"))
    if packing not in _PACKINGS or kind != "int" or activations < 16 or rotated:
        more = "" if activations >= 16 else f", {activations}-bit activations"
        more += ", rotated" if rotated else ""
        raise Unreadable(f"auto-round ({packing}, {kind}{more})")
    name, version = _PACKINGS[packing]
    settings = {**quantization, "quant_method": name}
    if name == "gptq":
        settings["checkpoint_format"] = version
    else:
        settings["zero_point"] = not quantization.get("sym", False)
    release = quantization.get("autoround_version")
    writer = f"auto-round {release}" if release else "auto-round"
    variant = f"{_VERSIONS.get(version, version)}, by {packing}"
    return Dialect(name, variant, settings, writer, auto_round=packing.startswith("auto_round"))
