"""What lies beside the weights: tokenizer, chat template, generation config, and config.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantkit.checkpoint.writer import MANIFEST, write_json

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
# Rewritten by us, or about the original alone.
_OWN = {
    "config.json",
    "quantize_config.json",
    "run.json",
    "README.md",
    MANIFEST,
}


def copy_sidecars(source: Path, target: Path) -> list[str]:
    """Copy every other file of a checkpoint byte for byte; returns the names copied."""
    copied = []
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix not in _WEIGHTS
            and path.name not in _OWN
            and not path.name.endswith(".index.json")
            and not path.name.startswith(".")
        ):
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    return copied


def write_config(target: Path, config: dict[str, Any], quantization: dict[str, Any] | None) -> None:
    """Write config.json: the original's keys, and how the weights are quantized.

    The dtype is written under both of its names: engines of different age read one or the other.
    """
    result = dict(config)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    result["dtype"] = result["torch_dtype"] = dtype
    if quantization is not None:
        result["quantization_config"] = quantization
    write_json(target / "config.json", result)
