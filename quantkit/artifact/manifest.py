"""quantkit.json: what an artifact was made of and how it fared. run.json: when and where.

The manifest holds nothing that changes from run to run, so that the same inputs give the same
bytes; dates, timings and the machine are in run.json, outside every digest.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quantkit.base.files import digests, read_json, write_json
from quantkit.base.version import __version__
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.lora.adapter import Adapter
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.lora.config import CONFIG_FILE
from quantkit.methods.linears import LayerReport
from quantkit.plan.base import Plan
from quantkit.recipes.recipe import Loaded
from quantkit.results.comparison import Occasion
from quantkit.results.manifest import MANIFEST, RUN

_WEIGHT_FILES = (".safetensors", ".gguf")
_LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
    "gguf",
    "xllamacpp",
)


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from.

    model: what was named on the command line; files: digests of the source's files.
    """

    loaded: Loaded
    model: str
    source: Checkpoint
    files: dict[str, str]
    calibration: Rows | None
    device: str


def write_manifest(
    directory: Path,
    provenance: Provenance,
    plan: Plan,
    layers: Sequence[LayerReport],
    started: float,
) -> dict[str, Any]:
    """Write quantkit.json and run.json into the finished ``directory``; returns the manifest."""
    recipe, source = provenance.loaded.recipe, provenance.source
    adapters = source.adapters if isinstance(source, AdaptedCheckpoint) else []
    weight_bytes = weights_bytes(directory)
    weights = sum(tensor.weights for tensor in plan.tensors)
    manifest = {
        "recipe": {
            "name": recipe.name,
            "version": recipe.version,
            "digest": recipe.digest,
            "content": recipe.model_dump(mode="json", by_alias=True),
        },
        "source": {"files": provenance.files},
        "adapters": [
            describe_adapter(adapter, file_digests(adapter.directory)) for adapter in adapters
        ],
        "calibration": _calibration(provenance),
        "method": plan.method,
        "format": plan.format,
        "parameters": weights,
        "weights_bytes": weight_bytes,
        "bits_per_weight": {
            "file": 8 * weight_bytes / weights,
            "quantized": plan.quantized_bits_per_weight,
        },
        "layers": [
            {key: value for key, value in asdict(layer).items() if value is not None}
            for layer in layers
        ],
        "summary": _summary(layers),
    }
    run = {
        "model": provenance.model,
        "recipe": str(provenance.loaded.path.resolve()),
        "device": provenance.device,
    }
    return seal(directory, manifest, run, started)


def seal(
    directory: Path, content: dict[str, Any], run: dict[str, Any], started: float
) -> dict[str, Any]:
    """Write quantkit.json and run.json into a finished directory; returns the manifest.

    The manifest is ``content`` with the libraries' versions and the digest of every file; run.json
    is ``run`` with when it was done, how long it took and where. ``started``: monotonic seconds.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    found = digests(files)
    manifest = {
        "schema": 1,
        "quantkit": __version__,
        **content,
        "libraries": library_versions(),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": found[path.name]} for path in files
        },
    }
    write_json(directory / MANIFEST, manifest)
    write_json(
        directory / RUN,
        {
            **run,
            "finished": _now(),
            "seconds": round(time.monotonic() - started, 2),
            "machine": _system(),
        },
    )
    return manifest


def occasion(model: str, suite_digest: str) -> Occasion:
    """This moment on this machine, for a comparison of ``model``'s artifacts by a suite."""
    import psutil

    machine: dict[str, Any] = {
        **_system(),
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        machine["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    return Occasion(model, suite_digest, _now(), __version__, library_versions(), machine)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _system() -> dict[str, str]:
    return {"platform": platform.platform(), "python": platform.python_version()}


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def weights_bytes(directory: Path) -> int:
    """Size of the weight files in a directory."""
    return sum(p.stat().st_size for p in directory.iterdir() if p.suffix in _WEIGHT_FILES)


def file_digests(directory: Path) -> dict[str, str]:
    """Digests of what a checkpoint or an adapter is made of, by file name."""
    paths = [
        path
        for path in sorted(directory.iterdir())
        if path.suffix == ".safetensors" or path.name in ("config.json", CONFIG_FILE)
    ]
    return digests(paths)


def describe_adapter(adapter: Adapter, files: dict[str, str]) -> dict[str, Any]:
    """What was folded into a checkpoint as it was read; ``files``: digests."""
    return {
        "name": adapter.directory.name,
        "weight": adapter.weight,
        "base": adapter.lora.base,
        "rank": adapter.lora.rank,
        "alpha": adapter.lora.alpha,
        "files": files,
    }


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of an artifact; None for a directory that has none (a plain checkpoint)."""
    path = directory / MANIFEST
    return read_json(path) if path.is_file() else None


def read_run(directory: Path) -> dict[str, Any] | None:
    """When, where and how long an artifact was made; None where nobody noted it."""
    path = directory / RUN
    return read_json(path) if path.is_file() else None


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that have a say in the result."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _calibration(provenance: Provenance) -> dict[str, Any] | None:
    settings = provenance.loaded.recipe.calibration
    rows = provenance.calibration
    if settings is None or rows is None:
        return None
    return {
        "dataset_sha256": rows.digest,
        "rows": rows.count,
        "rows_wanted": rows.wanted,
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
    }


def _summary(layers: Sequence[LayerReport]) -> dict[str, Any]:
    """What happened to the layers, counted."""
    summary: dict[str, Any] = {"layers": len(layers)}
    if any(layer.damping is not None for layer in layers):
        summary["not_factorized"] = [layer.name for layer in layers if layer.damping is None]
    if any(layer.scaled is not None for layer in layers):
        summary["scaled"] = sum(bool(layer.scaled) for layer in layers)
        summary["not_scaled"] = [layer.name for layer in layers if not layer.scaled]
    return summary
