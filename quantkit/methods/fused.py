"""Where loops that visit one column after the other are single kernels.

On a CUDA device each small operation costs more to launch than to compute. So what a loop does with
a panel of columns is one kernel there, written in Triton, which comes with torch's CUDA builds. A
CPU has no such cost, and keeps its loops.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def fused(device: torch.device) -> bool:
    """Whether kernels compute on ``device``: a CUDA device where Triton is installed.

    With ``TRITON_INTERPRET=1`` in the environment, set before Triton is imported, Triton runs
    kernels in Python on tensors of the CPU: so they are tested where there is no GPU.
    """
    return (device.type == "cuda" or interpreted()) and _installed()


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
