"""Work and copies beside the calling thread, so that a device needn't wait for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantkit.base.parallel import pool

R = TypeVar("R")


class Background:
    """A thread that works beside the caller's, on one piece of work at a time.

    threaded: False where the calling thread does the work itself, at once. Use it as a context
    manager: leaving it waits for the thread.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._pool = pool(1) if threaded else None
        self._last: Future[Any] | None = None

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Begin ``work``, once the piece before it has ended. Raises what that one raised."""
        self.wait()
        if self._pool is None:
            done: Future[R] = Future()
            done.set_result(work())
            return done
        future = self._pool.submit(work)
        self._last = future
        return future

    def wait(self) -> None:
        """Wait for the last piece. Raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None:
            self.wait()

    def close(self) -> None:
        """Wait until the thread has ended."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, which is complete once the device has come there: ``so_far``."""
    if tensor.device.type == "cpu":
        return tensor
    # A device copies to and from pinned memory by itself, while the host goes on.
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def so_far(device: torch.device) -> Callable[[], None]:
    """A function that waits, on any thread, until ``device`` has done what it was given so far."""
    if device.type == "cpu":
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Let copies from ``device`` run beside what it computes; they are complete at the end."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
