"""Where loops that visit one column after the other are single kernels.

On a CUDA device each small operation costs more to launch than to compute. So what a loop does with
a panel of columns is one kernel there, written in Triton, which comes with torch's CUDA builds. A
CPU has no such cost, and keeps its loops.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# Tests add "cpu", where Triton interprets kernels if TRITON_INTERPRET=1 was set before its import.
DEVICES = ["cuda"]


def fused(device: torch.device) -> bool:
    """Whether kernels compute on ``device``: on CUDA devices, where Triton is installed."""
    return device.type in DEVICES and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
