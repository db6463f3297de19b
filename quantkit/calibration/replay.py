"""Parts of a block whose outputs needn't be computed again.

The corrected pass runs a block on the same rows again for each of its inputs, while its linears get
their quantized weights one after the other. Attention returns what its output projection makes of
its input, and an MLP what its down projection makes of its own. Once all linears inside such a part
have their final weights, the part returns the same in every further forward of the same rows, and
where the input of its last linear was kept, this one product is all there is to compute.
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
    """A module of a block that returns the output of the last linear inside it, unchanged.

    linears: names of all linears inside it; rest: what it returns after that output, where it
    returns a tuple (some models' attention: the output and None), else None.
    """

    module: nn.Module
    linears: frozenset[str]
    rest: tuple[None, ...] | None

    def returns(self, output: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """What the module returns, from the output of its last linear."""
        return output if self.rest is None else (output, *self.rest)


class Replay:
    """Computes forwards of ``block`` without the parts that are known.

    linears: those of the block, by name. ``watching`` observes one forward first. Then
    ``use_inputs`` is told where the input of some linears is kept, ``finish`` which linears have
    their final weights, and ``compute`` runs a forward.
    """

    def __init__(self, block: nn.Module, linears: dict[str, nn.Linear]) -> None:
        self._block = block
        self._linears = linears
        self._parts: dict[str, _Part] = {}  # by the name of the last linear inside
        self._inputs: dict[str, HiddenStates] = {}  # by the same; what that linear reads
        self._finished: set[str] = set()

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Find the parts of the block in the one forward of ``batch`` inside the ``with`` block."""
        outputs: dict[str, list[Any]] = {}

        def append(name: str) -> Callable[..., None]:
            return lambda module, args, output: outputs.setdefault(name, []).append(output)

        with ExitStack() as hooks:
            for name, module in self._block.named_modules():
                hooks.callback(module.register_forward_hook(append(name)).remove)
            yield
        # No name is known, in any family of models: a part is a module that returns the very tensor
        # that a linear inside it has returned. A module that is called twice has two outputs.
        once = {name: made[0] for name, made in outputs.items() if len(made) == 1}
        lasts = {id(once[name]): name for name in self._linears if name in once}
        # Hooks are called in the order in which modules return: the outermost module comes last,
        # and is the one that counts.
        for name, output in once.items():
            rest = output[1:] if type(output) is tuple else None
            last = lasts.get(id(output if rest is None else next(iter(output), None)), "")
            if last.startswith(f"{name}.") and all(other is None for other in rest or ()):
                inside = frozenset(n for n in self._linears if n.startswith(f"{name}."))
                # Kept rows get the batch's shape back, so the linear must have read it in that.
                if once[last].shape[:-1] == batch.ids.shape:
                    self._parts[last] = _Part(self._block.get_submodule(name), inside, rest)

    def use_inputs(self, linears: Iterable[str], inputs: HiddenStates) -> bool:
        """Take ``inputs``, one (tokens, width) a batch, for what ``linears`` read from now on.

        False where no part ends in any of them, so that ``inputs`` needn't be kept. Where it is
        True, they must hold what the linears read before these are finished.
        """
        lasts = [name for name in linears if name in self._parts]
        self._inputs.update(dict.fromkeys(lasts, inputs))
        return bool(lasts)

    def finish(self, linears: Iterable[str]) -> None:
        """Note that ``linears`` have their final weights."""
        self._finished.update(linears)

    def compute(self, number: int, batch: Batch, forward: Callable[[], Tensor]) -> Tensor:
        """What ``forward`` returns, which runs the block on batch ``number``, in less time."""
        known = [last for last in self._inputs if self._parts[last].linears <= self._finished]
        if not known:
            return forward()
        with ExitStack() as stack:
            for last in known:
                stack.enter_context(self._replaying(last, number, batch))
            replayed = forward()
        # What one forward showed needn't hold in another: the first batch is computed in both
        # ways, and where the results differ, no part of this block is replayed any more.
        if number == 0:
            whole = forward()
            if not torch.equal(replayed, whole):
                self._parts.clear()
                self._inputs.clear()
                return whole
        return replayed

    @contextmanager
    def _replaying(self, last: str, number: int, batch: Batch) -> Iterator[None]:
        """Let the part that ends in ``last`` be its last linear alone."""
        part, linear, inputs = self._parts[last], self._linears[last], self._inputs[last]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return part.returns(linear(inputs.read(number).view(*batch.ids.shape, -1)))

        with forward_as(part.module, forward):
            yield
