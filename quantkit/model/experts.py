"""Experts of a mixture as linears of their own.

transformers keeps the weights of all experts of a layer in parameters with three axes, whatever the
checkpoint has. Here each expert becomes a module with linears, so that an expert's linear is
quantized, measured and stored like any other. The module that takes the place of transformers' is
run beside it, on small random weights, before it is trusted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError
from quantkit.checkpoint.views import View

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Piece:
    """One linear of an expert: its name, the rows of the parameter that it is, and its tensor."""

    leaf: str
    rows: slice
    view: View


class _Linear(nn.Linear):
    """A linear whose weights come from elsewhere: there are thousands, and none is initialized."""

    def reset_parameters(self) -> None:
        pass


class Expert(nn.Module):
    """The linears of one expert."""


class Experts(nn.Module):
    """The experts of one layer, in the place of the module of transformers that holds them all.

    everyone: whether all tokens go through every expert, whatever was chosen for them.
    """

    def __init__(
        self,
        original: nn.Module,
        experts: Sequence[Mapping[str, Sequence[Piece]]],
        shapes: Mapping[str, tuple[int, int]],
        biases: Mapping[str, bool],
        dtype: torch.dtype,
    ) -> None:
        """original: the module of transformers; experts: the pieces of each one's parameters;
        shapes: (out, in) of each parameter for one expert; biases: whether it has biases.
        """
        super().__init__()
        # Not as a submodule: only its gate and its activation are used, which have no parameters.
        self.__dict__["original"] = original
        self.everyone = False
        self._watched: set[int] = set()
        self._note: Callable[[Tensor], None] | None = None
        self.first = next(name for name in FIRST if name in shapes)
        self.pieces = experts
        if hasattr(original, "post_expert_norm"):
            self.post_expert_norm = original.post_expert_norm
        for number, parameters in enumerate(experts):
            expert = Expert()
            for name, pieces in parameters.items():
                outputs, inputs = shapes[name]
                for piece in pieces:
                    count = len(range(*piece.rows.indices(outputs)))
                    linear = _Linear(
                        inputs, count, bias=biases[name], device="meta", dtype=dtype
                    ).requires_grad_(False)
                    expert.add_module(piece.leaf, linear)
            self.add_module(str(number), expert)

    def forward(
        self, hidden: Tensor, index: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """What ``original`` makes of ``hidden`` (tokens, features).

        index, weights (tokens, chosen): the experts of each token, and what they count for. Without
        them ``hidden`` has an equal share of rows for each expert in turn.
        """
        if index is None or weights is None:
            shares = hidden.view(len(self.pieces), -1, hidden.shape[-1])
            if self._note is not None:  # what wasn't chosen for a token was multiplied by zero
                self._note(_numbers(shares.any(-1).t()))
            outputs = [self.run(number, share) for number, share in enumerate(shares)]
            return torch.cat(outputs).view(-1, hidden.shape[-1])
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._note is not None:
            self._note(index.view(len(flat), -1).sort(1, descending=True).values.to(torch.int16))
        if self.everyone:
            count = len(self.pieces)
            index = torch.arange(count, device=hidden.device).expand(len(flat), -1)
            # Weights that differ, so that no expert's output can hide behind another's.
            weights = torch.linspace(0.5, 1, count, device=hidden.device).expand(len(flat), -1)
        result = torch.zeros_like(flat)
        for number in range(len(self.pieces)):
            tokens, places = torch.where(index == number)
            if number in self._watched:
                made = self.run(number, flat)[tokens]
            elif len(tokens):
                made = self.run(number, flat[tokens])
            if len(tokens):
                weighed = made * weights[tokens, places, None]
                result.index_add_(0, tokens, weighed.to(result.dtype))
        return result.view(hidden.shape)

    @contextmanager
    def all_tokens(self) -> Iterator[None]:
        """Send all tokens through every expert, so that a trial reaches each of them.

        What comes out isn't what the model computes.
        """
        self.everyone = True
        try:
            yield
        finally:
            self.everyone = False

    @contextmanager
    def watched(self, numbers: set[int]) -> Iterator[None]:
        """Run these experts on all tokens, for hooks on their linears; outputs stay the same."""
        self._watched = numbers
        try:
            yield
        finally:
            self._watched = set()

    @contextmanager
    def noted(self, note: Callable[[Tensor], None]) -> Iterator[None]:
        """Call ``note`` with the experts of each token, (tokens, chosen) int16: their numbers from
        the largest to the smallest, and -1 where fewer are chosen."""
        self._note = note
        try:
            yield
        finally:
            self._note = None

    def linears(self) -> list[list[str]]:
        """The names of each expert's linears, those that read the expert's input first."""
        return [
            [piece.leaf for name in (self.first, LAST) for piece in parameters[name]]
            for parameters in self.pieces
        ]

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """The output of one expert, (tokens, features), before it is weighed."""
        made = self._project(number, self.first, hidden)
        original: Any = self.original
        gated = self.first == "gate_up_proj"
        made = _gated(original, made) if gated else original.act_fn(made)
        made = self._project(number, LAST, made)
        norm = getattr(self, "post_expert_norm", None)
        return made if norm is None else norm(made)

    def _project(self, number: int, parameter: str, hidden: Tensor) -> Tensor:
        expert = self.get_submodule(str(number))
        pieces = self.pieces[number][parameter]
        if len(pieces) == 1:
            return expert.get_submodule(pieces[0].leaf)(hidden)
        parts = [expert.get_submodule(piece.leaf)(hidden) for piece in pieces]
        result = hidden.new_empty(len(hidden), sum(part.shape[1] for part in parts))
        for piece, part in zip(pieces, parts, strict=True):
            result[:, piece.rows] = part
        return result


def _numbers(chosen: Tensor) -> Tensor:
    """A choice (tokens, experts) as the numbers of those that are chosen, as ``noted`` has them."""
    every = torch.arange(chosen.shape[1], device=chosen.device, dtype=torch.int16)
    numbers = torch.where(chosen, every, -1).sort(1, descending=True).values
    return numbers[:, : int(chosen.sum(1).max())]


def _gated(original: Any, made: Tensor) -> Tensor:
    if hasattr(original, "_apply_gate"):
        return original._apply_gate(made)
    gate, up = made.chunk(2, dim=-1)
    return original.act_fn(gate) * up


@torch.inference_mode()
def prove(
    module: Any,
    experts: Sequence[Mapping[str, Sequence[Piece]]],
    shapes: Mapping[str, tuple[int, int]],
    transposed: bool,
    where: str,
) -> None:
    """Raise InputError where ``Experts`` of these pieces don't compute what ``module`` does.

    Both are run with the same small random weights, on tokens that go to all experts.
    transposed: whether the parameters of ``module`` are (experts, in, out).
    """
    inputs, middle, count = 8, 12, len(experts)
    sizes = {
        "gate_up_proj": (2 * middle, inputs),
        "up_proj": (middle, inputs),
        LAST: (inputs, middle),
    }
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small._parameters, small._modules = dict(module._parameters), dict(module._modules)
    if hasattr(module, "post_expert_norm"):  # it has the model's width
        small._modules["post_expert_norm"] = nn.Identity()
    for name in ("hidden_size", "hidden_dim"):
        if hasattr(small, name):
            setattr(small, name, inputs)
    small_pieces = [
        {
            name: [
                Piece(p.leaf, _fewer(p.rows, shapes[name][0], sizes[name][0]), p.view)
                for p in pieces
            ]
            for name, pieces in parameters.items()
        }
        for parameters in experts
    ]
    biases = {name: f"{name}_bias" in module._parameters for name in shapes}
    chosen = {name: sizes[name] for name in shapes}
    ours = Experts(small, small_pieces, chosen, biases, torch.float32)
    for name in shapes:
        value = torch.randn(count, *sizes[name], generator=generator) / 4
        bias = torch.randn(count, sizes[name][0], generator=generator) / 4
        stored = value.transpose(1, 2).contiguous() if transposed else value
        small._parameters[name] = nn.Parameter(stored, requires_grad=False)
        if biases[name]:
            small._parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
        for number, parameters in enumerate(small_pieces):
            for piece in parameters[name]:
                linear: Any = ours.get_submodule(f"{number}.{piece.leaf}")
                linear.weight = nn.Parameter(value[number][piece.rows], requires_grad=False)
                if biases[name]:
                    linear.bias = nn.Parameter(bias[number][piece.rows], requires_grad=False)
    hidden = torch.randn(2 * count, inputs, generator=generator)
    arguments: tuple[Tensor, ...] = (hidden,)
    if len(inspect.signature(type(module).forward).parameters) > 2:
        choices = [torch.randperm(count, generator=generator)[:2] for _ in hidden]
        index = torch.stack(choices)
        arguments = (hidden, index, torch.rand(index.shape, generator=generator))
    try:
        with _eager(small):
            expected = small(*arguments)
        made = ours(*arguments)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise unknown(module, f"a forward that can't be tried ({reason})", where) from error
    if made.shape != expected.shape or not torch.allclose(made, expected, rtol=1e-5, atol=1e-6):
        raise unknown(module, "something else than gate, up and down", where)


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Let transformers compute experts one after the other, as plain products."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    try:
        if config is not None:
            config._experts_implementation = "eager"
        yield
    finally:
        if config is not None:
            config._experts_implementation = implementation


def _fewer(rows: slice, outputs: int, small: int) -> slice:
    """The same part of fewer rows."""
    if rows.step not in (None, 1):
        return rows
    start, stop, _ = rows.indices(outputs)
    return slice(start * small // outputs, stop * small // outputs)


def unknown(module: nn.Module, what: str, where: str) -> InputError:
    return InputError(
        f"is a mixture of experts whose {type(module).__name__} have {what}, which isn't "
        "understood yet",
        subject=where,
    )
