"""Kernels on a CUDA device, else interpreted on the CPU; and what is launched and waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.methods import fused

# Operations that launch nothing.
_VIEWS: tuple[str, ...] = (
    "view",
    "slice",
    "select",
    "t",
    "transpose",
    "expand",
    "unsqueeze",
    "detach",
    "alias",
)
_VIEWS += ("split_with_sizes", "diagonal", "empty", "empty_like", "new_empty", "lift_fresh")
_WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


@contextmanager
def kernels() -> Iterator[torch.device]:
    """A device where kernels compute: a CUDA device, else the CPU, with kernels interpreted."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DEVICES", ["cpu"])
        yield torch.device("cpu")


@dataclass
class Launches(TorchDispatchMode):
    """What a device would have to launch, and what would wait for it, in order.

    events: names of operations of torch, "kernel" for each kernel, "wait" for each time that a
    value is read.
    """

    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0].rstrip("_")
        if name.removeprefix("_unsafe_") not in _VIEWS:
            self.events.append(name)
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return len([event for event in self.events if event != "wait"])

    @property
    def waits(self) -> int:
        """How often a value was read before the last kernel was launched."""
        last = len(self.events) - self.events[::-1].index("kernel")
        return self.events[:last].count("wait")


@contextmanager
def counted(module: ModuleType, kernel: str) -> Iterator[Launches]:
    """Count launches; ``kernel`` names the function of ``module`` that launches one, which is
    counted and not run."""
    launches = Launches()

    def launched(*args: Any, **kwargs: Any) -> None:
        launches.events.append("kernel")

    def waiting(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def wait(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            launches.events.append("wait")
            return original(tensor, *args, **kwargs)

        return wait

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, kernel, launched)
        for name in _WAITS:
            patch.setattr(torch.Tensor, name, waiting(name))
        with launches:
            yield launches
