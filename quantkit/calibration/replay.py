"""Parts of a block that needn't be computed again.

Attention returns what its output projection makes of its input, an MLP what its down projection
does. Once all linears in such a part have their new weights, it returns the same in every forward
of the same rows; and where the input of its last linear was kept, that linear is all that must be
computed. Which parts a block has is observed; whether they do what is said here is tried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.activations import HiddenStates
from quantkit.model.stream import Batch
from quantkit.model.stubs import forward_as


@dataclass(frozen=True)
class _Part:
    """A part of a block; linears: the names of all in it; beside: what it returns in a tuple with
    its tensor, None where it returns the tensor alone."""

    module: nn.Module
    linears: frozenset[str]
    beside: tuple[None, ...] | None

    def returns(self, value: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return value if self.beside is None else (value, *self.beside)


class Replay:
    """The parts of ``block``, whose ``linears`` are given by name, and what is known of them."""

    def __init__(self, block: nn.Module, linears: dict[str, nn.Linear]) -> None:
        self._block = block
        self._linears = linears
        self._parts: dict[str, _Part] = {}  # by the linear that is last
        self._finished: set[str] = set()
        self._inputs: dict[str, HiddenStates] = {}  # of such a linear

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Find the parts in a forward of ``batch``."""
        outputs: dict[str, list[Any]] = {}

        def watch(name: str) -> Callable[..., None]:
            return lambda module, args, output: outputs.setdefault(name, []).append(output)

        with ExitStack() as hooks:
            for name, module in self._block.named_modules():
                hooks.callback(module.register_forward_hook(watch(name)).remove)
            yield
        once = {name: made[0] for name, made in outputs.items() if len(made) == 1}
        lasts = {id(once[name]): name for name in self._linears if name in once}
        for name, output in once.items():  # what is around others returns after them
            beside = output[1:] if type(output) is tuple else None
            last = lasts.get(id(output if beside is None else next(iter(output), None)), "")
            if last.startswith(f"{name}.") and all(other is None for other in beside or ()):
                inside = frozenset(n for n in self._linears if n.startswith(f"{name}."))
                if once[last].shape[:-1] == batch.ids.shape:
                    self._parts[last] = _Part(self._block.get_submodule(name), inside, beside)

    def keep(self, linears: Iterable[str], read: HiddenStates) -> bool:
        """Whether it pays to put what ``linears`` read into ``read``, before they are finished."""
        lasts = [name for name in linears if name in self._parts]
        self._inputs.update(dict.fromkeys(lasts, read))
        return bool(lasts)

    def finish(self, linears: Iterable[str]) -> None:
        """Take in that ``linears`` have their new weights."""
        self._finished.update(linears)

    def compute(self, place: int, batch: Batch, forward: Callable[[], Tensor]) -> Tensor:
        """What ``forward`` of ``batch`` gives, without computing again what is known.

        In the first place it is computed in both ways: where they differ, nothing is known.
        """
        known = [last for last in self._inputs if self._parts[last].linears <= self._finished]
        if not known:
            return forward()
        with ExitStack() as stack:
            for last in known:
                stack.enter_context(self._replaying(last, place, batch))
            found = forward()
        if place == 0:
            whole = forward()
            if not torch.equal(found, whole):
                self._parts.clear()
                self._inputs.clear()
                return whole
        return found

    @contextmanager
    def _replaying(self, last: str, place: int, batch: Batch) -> Iterator[None]:
        part, linear, rows = self._parts[last], self._linears[last], self._inputs[last]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return part.returns(linear(rows.read(place).view(*batch.ids.shape, -1)))

        with forward_as(part.module, forward):
            yield
