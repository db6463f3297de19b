"""Which engines load an artifact.

Each format's ``loading`` knows, from what was tried (vLLM 0.32 on CPU, transformers 5.23,
llama.cpp) and from the engines' sources. docs/artifacts.md has the tables.
"""

from __future__ import annotations

from quantkit.engines import int4
from quantkit.formats.format import Contents, Loading
from quantkit.formats.packed import PackedCheckpoint
from quantkit.formats.registry import FORMATS, safetensors_formats

_NO_LLAMA = Loading("llama.cpp", "no", "reads GGUF; make one of the BF16 checkpoint")


def loading_of_plain() -> tuple[Loading, ...]:
    """For a checkpoint that isn't quantized."""
    return Loading("transformers", "yes"), Loading("vLLM", "yes"), _NO_LLAMA


def loading_of_packed(source: PackedCheckpoint) -> tuple[Loading, ...]:
    """For a quantized checkpoint in safetensors."""
    keys = list(source.quantized())
    contents = Contents(
        [source.scheme_of(key) for key in keys],
        [source.shape(key) for key in keys],
        source.dialect.variant,
        permuted=any(source.permuted(key) for key in keys),
        auto_round=source.dialect.auto_round,
    )
    ours = int4.runs(source)
    why = "" if ours else "takes 4-bit codes in groups of 32 to 256"
    others = loading_of(source.format, contents)
    return (*others, Loading(int4.NAME, "yes" if ours else "no", why))


def loading_of(format: str, contents: Contents) -> tuple[Loading, ...]:
    """For an artifact that may not exist yet. Leaves out our own engine."""
    loading = FORMATS[format].loading(contents)
    return (*loading, _NO_LLAMA) if format in safetensors_formats() else loading
