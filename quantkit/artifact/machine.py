"""Date, machine and versions of libraries, as manifests and comparisons record them."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.base.version import __version__
from quantkit.results.comparison import Occasion

_LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
    "gguf",
    "xllamacpp",
)


def now() -> str:
    """This moment in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def system() -> dict[str, str]:
    """The operating system and the version of Python."""
    return {"platform": platform.platform(), "python": platform.python_version()}


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that the resulting bytes depend on."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def occasion(model: str, suite_digest: str) -> Occasion:
    """This moment on this machine, for a comparison of ``model``'s artifacts by a suite."""
    machine: dict[str, Any] = {
        **system(),
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        machine["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    return Occasion(
        model=model,
        suite_digest=suite_digest,
        finished=now(),
        quantkit=__version__,
        libraries=library_versions(),
        machine=machine,
    )


def _processor() -> str:
    """The processor's name, or its architecture where the system doesn't name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
