"""The device that computes, by the name that --device gives it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from threading import Thread

import torch

from quantkit.base.errors import InputError, MachineError


def resolve_device(name: str) -> torch.device:
    """The device named ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises InputError for another name, MachineError for a CUDA device that isn't there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"{name} is none of auto, cpu, cuda, cuda:N", where="--device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"{name} isn't available: torch sees {torch.cuda.device_count()} CUDA devices",
            where="--device",
            fix="Use --device cpu or auto.",
        )
    return device


def resolve_devices(name: str) -> tuple[torch.device, ...]:
    """The same, and also several CUDA devices, as in ``cuda:0,1``.

    Raises what ``resolve_device`` raises, and InputError for a device that is named twice.
    """
    if not re.fullmatch(r"cuda:\d+(,(cuda:)?\d+)+", name):
        if "," in name:
            raise InputError(
                f"{name} doesn't name CUDA devices",
                where="--device",
                fix="Several devices are named as in cuda:0,1.",
            )
        return (resolve_device(name),)
    numbers = [part.removeprefix("cuda:") for part in name.split(",")]
    devices = tuple(resolve_device(f"cuda:{int(number)}") for number in numbers)
    if len(set(devices)) < len(devices):
        raise InputError(f"{name} names a device twice", where="--device")
    return devices


def begin_using(devices: Iterable[torch.device]) -> None:
    """Begin what the first use of devices would wait for, in the background."""

    def use(device: torch.device) -> None:
        with suppress(RuntimeError):  # whoever uses it next will see it
            square = torch.zeros(16, 16, device=device)
            torch.mm(square, square)

    for device in devices:
        if device.type != "cpu":
            Thread(target=use, args=(device,), daemon=True).start()


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device with memory of its own has left; None for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for its next tensors isn't free for others, but it is for them.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
