"""Run a script or a module and print at its end what torch held on the GPU at most.

    python benchmarks/peak.py SCRIPT.py [ARGUMENTS]
    python benchmarks/peak.py -m MODULE [ARGUMENTS]

The last line is ``torch.cuda peak: BYTES allocated, BYTES reserved`` where CUDA was used; nothing
is printed elsewhere. It measures every tool alike and imports the standard library alone.
"""

from __future__ import annotations

import atexit
import runpy
import sys
from pathlib import Path


def tell() -> None:
    """Print the peak, if what ran used CUDA at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(f"\ntorch.cuda peak: {allocated} allocated, {reserved} reserved", flush=True)


def main() -> None:
    sys.path.pop(0)  # the folder of this file, whose neighbors aren't libraries
    atexit.register(tell)
    sys.argv.pop(0)
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
