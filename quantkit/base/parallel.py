"""How the processor is used: all of its cores, with the same bytes for any number of them.

Linear algebra rounds differently for every number of threads that share one product or one
factorization. Here each piece of work computes on one thread of its own, and the pieces are
fixed beforehand: more cores finish sooner, with the same bytes.
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


def spread(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """``[function(item) for item in items]``, on as many threads as torch may use.

    On another device than the CPU, which is parallel in itself, one after the other.
    """
    items = list(items)
    workers = min(torch.get_num_threads(), len(items))
    if device.type != "cpu":
        return [function(item) for item in items]
    if workers <= 1:
        with one_thread():
            return [function(item) for item in items]
    with pool(workers) as threads:
        return list(threads.map(function, items))


def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each compute alone."""
    return ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the calling thread compute alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def bfloat16_products(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices, all of whose values bfloat16 holds, be taken as such.

    They are the same products, summed in float32 as before, by units several times as fast: those
    of bfloat16 on a CPU, of TF32 on CUDA. The switch is the process's.
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
    """Whether products of bfloat16 matrices are faster than those of float32 there."""
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def return_large_blocks() -> None:
    """Let the C library hand large freed blocks back to the system at once.

    By default glibc keeps up to 32 MB of each for every thread, which adds up to a third of what
    quantizing needs.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def return_free_blocks() -> None:
    """Hand back what the C library holds of freed blocks: each thread's share is fragmented by
    every layer that it works on."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Shared(Generic[R]):
    """What ``function`` returns: computed by the thread that first asks, awaited by all others."""

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self._found: list[R] = []
        self._lock = Lock()

    def __call__(self) -> R:
        with self._lock:
            if not self._found:
                self._found.append(self._function())
            return self._found[0]


class Ahead:
    """Results wanted soon, computed in the background while the caller is busy."""

    def __init__(self) -> None:
        self._pool = pool(1)
        self._pending: dict[Hashable, Future[Any]] = {}

    def start(self, key: Hashable, function: Callable[[], object]) -> None:
        """Begin ``function`` under ``key``."""
        self._pending[key] = self._pool.submit(function)

    def take(self, key: Hashable, function: Callable[[], R]) -> R:
        """What ``function`` returns, begun under ``key`` or not. Anything else begun is dropped."""
        pending, self._pending = self._pending, {}
        if key in pending:
            result: R = pending[key].result()
            return result
        return function()
