"""Work on all cores that gives the same bytes on any number of them, and memory given back.

Linear algebra rounds differently for every number of threads that share one product or one
factorization. So each piece of work here is computed by one thread alone, and how the work is cut
into pieces doesn't depend on the number of cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 4 << 20  # bytes

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """``[function(item) for item in items]``, on as many threads as torch may use.

    device: that ``function`` computes on. What isn't on the CPU runs on the calling thread alone.
    """
    items = list(items)
    workers = min(torch.get_num_threads(), len(items))
    if device.type != "cpu":  # a GPU is parallel in itself
        return [function(item) for item in items]
    if workers <= 1:
        with one_thread():
            return [function(item) for item in items]
    with pool(workers) as threads:
        return list(threads.map(function, items))


def pool(threads: int) -> ThreadPoolExecutor:
    """A pool of ``threads`` threads, on each of which torch computes with that one thread."""
    return ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def bfloat16_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices by the units for bfloat16 (CPU) or TF32 (CUDA).

    For matrices whose values bfloat16 can all hold: then the products are the same, are summed in
    float32 as before, and come several times as fast. The switch is for the whole process.
    """
    cuda = device.type == "cuda"
    if not cuda and not multiplies_bfloat16(device):
        yield
        return
    backends: Any = torch.backends
    backend = backends.cuda.matmul if cuda else backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if cuda else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices faster than those of float32."""
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def return_large_blocks() -> None:
    """Let the C library hand large freed blocks back to the system at once."""
    # By default glibc keeps freed blocks of up to 32 MB for every thread, which adds up to a third
    # of the memory that quantizing needs.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def return_free_blocks() -> None:
    """Hand the freed blocks that the C library keeps back to the system."""
    # Every layer fragments the share of each thread that worked on it, and the shares would grow.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Shared(Generic[R]):
    """The result of ``function``, computed by the first thread that calls; others wait for it."""

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self._result: list[R] = []  # empty until it is computed
        self._lock = Lock()

    def __call__(self) -> R:
        with self._lock:
            if not self._result:
                self._result.append(self._function())
            return self._result[0]


class Ahead:
    """Results that will be needed soon, computed in the background meanwhile."""

    def __init__(self) -> None:
        self._pool = pool(1)
        self._pending: dict[Hashable, Future[Any]] = {}

    def start(self, key: Hashable, function: Callable[[], object]) -> None:
        """Begin to compute ``function``, so that ``result`` has it at once."""
        self._pending[key] = self._pool.submit(function)

    def result(self, key: Hashable, function: Callable[[], R]) -> R:
        """The result of ``function``, whether it was started under ``key`` or not.

        Results that were started under other keys are dropped.
        """
        pending, self._pending = self._pending, {}
        if key in pending:
            result: R = pending[key].result()
            return result
        return function()
