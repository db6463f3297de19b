"""GPTQ as a recipe names it, on integer grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from quantkit.calibration.needs import Needs, Propagate
from quantkit.methods.gptq.feedback import Settings
from quantkit.methods.gptq.readers import Readers, quantize
from quantkit.methods.grids import as_grid
from quantkit.methods.linears import BlockResult, Linears, QuantizedLinear, output_energy
from quantkit.methods.method import AffineMethod

DampPercent = Annotated[float, Field(gt=0, lt=1)]


class Gptq(AffineMethod):
    """GPTQ, arXiv 2210.17323."""

    tag = "gptq"
    calibration = "required"

    method: Literal["gptq"]
    damp_percent: DampPercent = 0.01
    activation_order: bool = Field(default=True, description="static: no permutation is stored")
    clip_search: bool = True
    block_size: Annotated[int, Field(ge=1)] = 128
    propagate: Propagate = "original"

    def needs(self) -> Needs:
        return Needs("gram", propagate=self.propagate)

    def config(self) -> dict[str, Any]:
        return {"damp_percent": self.damp_percent}

    def quantize(self, linears: Linears) -> BlockResult:
        linears.require_inputs()
        groups = [group for group in linears.inputs if linears.readers(group)]
        inputs = [
            Readers(
                group.moment,
                [linears.weights[name] for name in linears.readers(group)],
                [as_grid(linears.schemes[name]) for name in linears.readers(group)],
                group.drift,
            )
            for group in groups
        ]
        settings = Settings(
            damping=self.damp_percent,
            activation_order=self.activation_order,
            clip_search=self.clip_search,
            block_size=self.block_size,
        )
        quantized: dict[str, QuantizedLinear] = {}
        for group, results in zip(groups, quantize(inputs, settings), strict=True):
            for name, rounded in zip(linears.readers(group), results, strict=True):
                report = linears.report(name, rounded.loss / output_energy(group, name), "outputs")
                report = replace(report, damping=rounded.damping)
                quantized[name] = QuantizedLinear(rounded.tensor, report)
        return BlockResult({name: quantized[name] for name in linears.weights})

    @classmethod
    def describes(cls, section: Mapping[str, Any]) -> bool:
        return section.get("method") == "gptq" and not names_a_mix(section)


def names_a_mix(section: Mapping[str, Any]) -> bool:
    """Whether a recipe wants GPTQ on the grids of llama.cpp's types, which need no bits."""
    return section.get("format") == "gguf" and ("mix" in section or "bits" not in section)
