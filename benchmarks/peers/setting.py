"""What the figures depend on: the date, the machine and the versions."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime
from typing import Any

from benchmarks import environments, machine
from benchmarks.peers.jobs import OURS
from benchmarks.peers.runs import Options

OUR_PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "gguf", "xllamacpp")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def describe_setting(options: Options) -> dict[str, Any]:
    """The setting of a benchmark as it is written to its JSON."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": {
            "processor": machine.processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load": round(os.getloadavg()[0], 2),
            "device": machine.gpu() if options.device == "cuda" else "cpu",
            "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        },
        "versions": {OURS: machine.commit(), **versions(options)},
    }


def versions(options: Options) -> dict[str, str]:
    """The versions of the distributions that matter, for every environment that is there."""
    result = {"ours, transformers, PEFT": machine.installed(sys.executable, OUR_PACKAGES)}
    for name, environment in environments.ENVIRONMENTS.items():
        python = environments.python_of(name, options.environments)
        if python.is_file():
            result[name] = machine.installed(str(python), environment.shown)
    if "llama.cpp" in result:
        result["llama.cpp"] = f"of {environments.LLAMA_CPP}; {result['llama.cpp']}"
    return result
