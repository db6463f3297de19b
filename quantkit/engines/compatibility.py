"""Which engines load an artifact, by what was tried and by what their sources say.

Tried: vLLM 0.32 on CPU, transformers 5.23, llama.cpp. docs/artifacts.md has the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.artifact.findings import Loading
from quantkit.checkpoint.reader import Checkpoint
from quantkit.engines import int4
from quantkit.formats.packed import PackedCheckpoint
from quantkit.methods.fp8 import Fp8Scheme
from quantkit.methods.grids import Grid

_VLLM_GROUPS = (-1, 32, 64, 128)
_NO_LLAMA = Loading("llama.cpp", "no", "reads GGUF; make one of the BF16 checkpoint")


def of_gguf() -> tuple[Loading, ...]:
    """For a GGUF file of a type that llama.cpp has."""
    return (
        Loading("llama.cpp", "yes"),
        Loading("transformers", "yes", "with gguf; dequantizes it when loading"),
        Loading("vLLM", "no", "0.32 has no GGUF method"),
    )


def of_plain(checkpoint: Checkpoint) -> tuple[Loading, ...]:
    """For a checkpoint that isn't quantized."""
    return Loading("transformers", "yes"), Loading("vLLM", "yes"), _NO_LLAMA


@dataclass(frozen=True)
class Contents:
    """What decides who loads a quantized checkpoint in safetensors.

    schemes and shapes (out, in): of its quantized linears; layout: compressed-tensors' own name of
    how codes lie; permuted: whether groups aren't those of the stored order; auto_round: whether
    it is in AutoRound's own packing.
    """

    format: str
    schemes: Sequence[object]
    shapes: Sequence[tuple[int, ...]]
    layout: str | None = None
    permuted: bool = False
    auto_round: bool = False


def of_packed(source: PackedCheckpoint) -> tuple[Loading, ...]:
    """For a quantized checkpoint in safetensors."""
    keys = list(source.quantized())
    contents = Contents(
        source.format,
        [source.scheme_of(key) for key in keys],
        [source.shape(key) for key in keys],
        source.dialect.variant,
        permuted=any(source.permuted(key) for key in keys),
        auto_round="auto_round" in str(source.dialect),
    )
    ours = int4.runs(source)
    why = "" if ours else "takes 4-bit codes in groups of 32 to 256"
    return (*of_contents(contents), Loading(int4.NAME, "yes" if ours else "no", why))


def of_contents(contents: Contents) -> tuple[Loading, ...]:
    """The same for one that may not exist yet, without our own engine."""
    grids = [scheme for scheme in contents.schemes if isinstance(scheme, Grid)]
    floats = [scheme for scheme in contents.schemes if isinstance(scheme, Fp8Scheme)]
    fine = all(rows % 32 == 0 and columns % 32 == 0 for rows, columns in contents.shapes)
    found = {
        "awq": lambda: _awq(fine, contents.auto_round),
        "gptq": lambda: _gptq(grids, fine, contents.permuted, contents.auto_round),
        "compressed-tensors": lambda: _compressed(contents, grids, floats),
        "bitsandbytes": _bitsandbytes,
    }[contents.format]()
    return (*found, _NO_LLAMA)


def _awq(fine: bool, auto_round: bool) -> tuple[Loading, ...]:
    if auto_round:
        return _auto_round()
    vllm = Loading("vLLM", "yes")
    if not fine:
        vllm = Loading("vLLM", "no", "on CPU: widths must be divisible by 32; on a GPU untried")
    return Loading("transformers", "yes", "with gptqmodel and accelerate"), vllm


def _gptq(grids: list[Grid], fine: bool, permuted: bool, auto_round: bool) -> tuple[Loading, ...]:
    if auto_round:
        return _auto_round()
    transformers = Loading("transformers", "yes", "with optimum and gptqmodel")
    if permuted:
        transformers = Loading("transformers", "untried", "permuted groups; needs gptqmodel")
    elif any(grid.bits == 4 and grid.group_size == -1 for grid in grids):
        transformers = Loading("transformers", "untried", "4 bits, a group a row: may fail on CPU")
    bits = {grid.bits for grid in grids}
    reasons = [
        (any(not grid.symmetric for grid in grids), "asymmetric GPTQ"),
        (permuted, "permuted groups (desc_act)"),
        (not bits <= {4, 8}, f"{min(bits, default=0)} bits"),
        (any(grid.group_size not in _VLLM_GROUPS for grid in grids), "groups of another size"),
    ]
    refused = [why for holds, why in reasons if holds]
    if refused:
        return transformers, Loading("vLLM", "no", ", ".join(refused))
    if bits == {4} and fine:
        return transformers, Loading("vLLM", "yes")
    why = "8 bits" if 8 in bits else "widths must be divisible by 32"
    return transformers, Loading("vLLM", "no", f"on CPU: {why}; on a GPU untried")


def _auto_round() -> tuple[Loading, ...]:
    return (
        Loading("transformers", "yes", "with auto-round"),
        Loading("vLLM", "untried", "has a method for AutoRound's own packing"),
    )


def _compressed(
    contents: Contents, grids: list[Grid], floats: list[Fp8Scheme]
) -> tuple[Loading, ...]:
    packed = contents.layout == "pack-quantized"
    transformers = Loading("transformers", "yes", "with compressed-tensors")
    if packed and any(not grid.symmetric for grid in grids):
        why = "with compressed-tensors 0.17; 0.18 to 0.20 fail on asymmetric codes"
        transformers = Loading("transformers", "yes", why)
    if packed and any(grid.bits != 4 for grid in grids):
        return transformers, Loading("vLLM", "no", "on CPU: 4 bits only; on a GPU untried")
    if any(not (scheme.per_row and scheme.rounds_inputs) for scheme in floats):
        why = "on CPU: FP8 by channel with inputs by token only; on a GPU untried"
        return transformers, Loading("vLLM", "no", why)
    if contents.permuted:
        return transformers, Loading("vLLM", "no", "permuted groups")
    return transformers, Loading("vLLM", "yes")


def _bitsandbytes() -> tuple[Loading, ...]:
    return (
        Loading("transformers", "yes", "with bitsandbytes and accelerate"),
        Loading("vLLM", "no", "0.32 has no bitsandbytes method"),
    )
