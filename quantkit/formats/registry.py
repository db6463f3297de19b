"""Every format, by the name that a recipe gives it. A new one is a file and a line here."""

from __future__ import annotations

from quantkit.formats.awq import AwqFormat
from quantkit.formats.bitsandbytes import BitsandbytesFormat
from quantkit.formats.compressed_tensors import CompressedTensorsFormat
from quantkit.formats.format import Format, SafetensorsFormat
from quantkit.formats.gguf.grids import GgufFormat
from quantkit.formats.gptq import GptqFormat

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        AwqFormat(),
        GptqFormat(),
        CompressedTensorsFormat(),
        BitsandbytesFormat(),
        GgufFormat(),
    )
}


def safetensors_formats() -> dict[str, SafetensorsFormat]:
    """Those whose linears are tensors of a safetensors checkpoint."""
    return {
        name: format for name, format in FORMATS.items() if isinstance(format, SafetensorsFormat)
    }
