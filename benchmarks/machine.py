"""What figures depend on: the commit of this checkout, the machine, the installed versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def installed(
    python: str, packages: Sequence[str], settings: Mapping[str, str] | None = None
) -> str:
    """Those of ``packages`` that an interpreter has, with versions: "torch 2.13.0, peft 0.19".

    ``settings`` are added to the environment variables.
    """
    code = (
        "import sys; from importlib import metadata as m\n"
        "have = {d.metadata['Name'].lower().replace('_', '-') for d in m.distributions()}\n"
        "print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:] if n in have))"
    )
    environment = os.environ | (settings or {})
    command = [python, "-c", code, *packages]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


def commit() -> str:
    """The commit of this checkout, with "-dirty" where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu() -> str:
    """The name of the first NVIDIA GPU, "" where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""
