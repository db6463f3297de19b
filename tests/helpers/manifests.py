"""Manifests as quantizing and merging might have written them."""

from __future__ import annotations

from quantkit.results.manifest import (
    AdapterRecord,
    BitsPerWeight,
    CalibrationRecord,
    FileRecord,
    LayerReport,
    MergedManifest,
    MergeProof,
    QuantizedManifest,
    RecipeRecord,
    RunRecord,
    SourceRecord,
    Summary,
    VocabularyRecord,
)

RUN = RunRecord(
    model="demo",
    recipe="/recipes/awq-w4.yaml",
    device="cpu",
    finished="2026-11-20T10:00:00Z",
    seconds=9.5,
    machine={"platform": "Linux", "python": "3.11.7"},
)


def sample_manifest(method: str = "awq", error: float = 0.01) -> QuantizedManifest:
    """Of 24 linears with errors around ``error``; calibrated unless the method is rtn."""
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    content = {"schema": 1, "name": f"{method}-w4", "description": "4 bits for laptops."}
    layers = tuple(
        LayerReport(
            name=f"model.layers.{block}.{kind}",
            scheme="4 bits",
            error=error * (1 + place) / (1 + block),
            measured_on="outputs",
        )
        for block in range(6)
        for place, kind in enumerate(kinds)
    )
    return QuantizedManifest(
        quantkit="0.1.0",
        recipe=RecipeRecord(f"{method}-w4", "1.0.0", "ab" * 32, content),
        source=SourceRecord({"model.safetensors": "cd" * 32}),
        adapters=(),
        calibration=None if method == "rtn" else CalibrationRecord("ef" * 32, 64, 64, 256, 0),
        method=method,
        format=method,
        parameters=2_000_000,
        weights_bytes=1_234_567,
        bits_per_weight=BitsPerWeight(4.9, 4.25),
        layers=layers,
        summary=Summary(layers=len(layers)),
        libraries={"torch": "2.13.0"},
        files={"model.safetensors": FileRecord(1_234_567, "01" * 32)},
    )


def sample_merge() -> MergedManifest:
    """Of one adapter, proven."""
    return MergedManifest(
        quantkit="0.1.0",
        source=SourceRecord({"model.safetensors": "cd" * 32}),
        adapters=(
            AdapterRecord("adapter", 1.0, None, 8, 16.0, {"adapter_config.json": "23" * 32}),
        ),
        method="merge",
        format="safetensors",
        dtype="bfloat16",
        dequantized_base=False,
        parameters=2_000_000,
        weights_bytes=4_000_000,
        changed_tensors=28,
        untied=False,
        vocabulary=VocabularyRecord(1024, False),
        warnings=(),
        proof=MergeProof(5e-6, 2e-5, 2, 64, 1e-4),
        libraries={"torch": "2.13.0"},
        files={"model.safetensors": FileRecord(4_000_000, "01" * 32)},
    )
