"""Which device computes."""

from __future__ import annotations

import re

import torch

from quantkit.base.errors import InputError, MachineError


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:n``.

    Raises InputError for another name, MachineError for a CUDA device that isn't there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"{name!r} is none of auto, cpu, cuda, cuda:n", where="--device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"{name} isn't available: {torch.cuda.device_count()} CUDA devices found",
            where="--device",
            fix="Use --device cpu or auto.",
        )
    return device
