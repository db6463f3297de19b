"""What adapters do to one parameter: the arithmetic of LoRA and DoRA, as in PEFT.

Sums are computed in float32, a slice of rows at a time, and cast once, so that no more is in memory
than the weight and its factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.lora.adapter import Adapter, Part

SLICE = 1 << 22  # elements of a weight that are summed at a time


@dataclass(frozen=True)
class Factors:
    """What is added to one weight: scale · b · a. Then DoRA sets the length of each output.

    a: (r, in) and b: (out, r), float32; magnitude: DoRA's lengths (out,), or None; transposed:
    whether the weight is stored as (in, out), as those of Conv1D and of embeddings are.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    transposed: bool

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The adapted weight in ``dtype``; ``weight`` is overwritten if it has that dtype."""
        ratio = None if self.magnitude is None else self.magnitude / self._lengths(weight)
        out = weight if weight.dtype == dtype else torch.empty(weight.shape, dtype=dtype)
        for rows, part in self._sums(weight):
            if ratio is not None:
                part *= ratio if self.transposed else ratio[rows, None]
            out[rows] = part
        return out

    def _sums(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """W + scale · b · a (or its transpose) in float32, a slice of rows at a time."""
        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        count = max(1, SLICE // weight.shape[1])
        for start in range(0, len(weight), count):
            rows = slice(start, start + count)
            yield rows, torch.addmm(weight[rows].float(), left[rows], right, alpha=self.scale)

    def _lengths(self, weight: Tensor) -> Tensor:
        """The Euclidean length (out,) of each output's row in the adapted weight, before DoRA."""
        across = 0 if self.transposed else 1
        squares = [part.double().square_().sum(across) for _, part in self._sums(weight)]
        total = torch.stack(squares).sum(0) if self.transposed else torch.cat(squares)
        return total.sqrt().float()


@dataclass
class Change:
    """What one or several adapters do to one parameter of ``module``.

    conv1d: whether the module stores its weight as (in, out); combined: None for one adapter, else
    the factor that PEFT gives a combination; parts: each adapter with what it does.
    """

    module: str
    conv1d: bool
    combined: float | None
    parts: list[tuple[Adapter, Part]]

    def replaced(self) -> Tensor | None:
        """The tensor that replaces the base's, in its stored dtype."""
        for adapter, part in self.parts:
            if part.replaced:
                return adapter.read(part.replaced)
        return None

    def applied(self, tensor: Tensor, dtype: torch.dtype, *, add: bool) -> Tensor:
        """The base's ``tensor`` with the change in ``dtype``; it may be overwritten.

        add: with what is added, and not only what is replaced.
        """
        if (replaced := self.replaced()) is not None:
            tensor = replaced
        if not tensor.is_floating_point():
            return tensor
        if add and (factors := self.factors()) is not None:
            return factors.merge(tensor, dtype)
        if add and (added := self.added()) is not None:
            return tensor.float().add_(added).to(dtype)
        return self.with_tokens(tensor.to(dtype))

    def with_tokens(self, tensor: Tensor) -> Tensor:
        """``tensor`` (vocabulary, hidden) with the trained rows written into it."""
        for adapter, part in self.parts:
            if part.tokens:
                rows = torch.tensor(adapter.lora.rows_of(self.module))
                tensor[rows] = adapter.read(part.tokens).to(tensor.dtype)
        return tensor

    def added(self) -> Tensor | None:
        """What is added to a bias: (out,) float32, or None."""
        for adapter, part in self.parts:
            if part.added:
                return adapter.read(part.added).float() * self._scale(adapter, part)
        return None

    def factors(self) -> Factors | None:
        """The factors of all adapters as one pair, or None.

        Several adapters are combined as by PEFT's ``add_weighted_adapter`` with
        ``combination_type="linear"``: the sum of their A times the sum of their B, each multiplied
        by the root of its weight and scale. So the result also has products of one adapter's B
        with another's A.
        """
        paired = [(adapter, part) for adapter, part in self.parts if part.a and part.b]
        if not paired:
            return None
        adapter, part = paired[0]
        transposed = self.conv1d or is_embedding(part)
        if self.combined is None:
            a, b = (adapter.read(key or "").float() for key in (part.a, part.b))
            magnitude = adapter.read(part.magnitude).float() if part.magnitude else None
            return Factors(a, b, self._scale(adapter, part), magnitude, transposed)
        sums: list[Tensor] = []
        for field in ("a", "b"):
            total = torch.zeros(())
            for adapter, part in paired:
                scale = self._scale(adapter, part)
                root = math.sqrt(abs(scale))
                if field == "a":  # one of both has the sign
                    root = math.copysign(root, scale)
                total = total + root * adapter.read(getattr(part, field)).float()
            sums.append(total)
        return Factors(sums[0], sums[1], self.combined, None, transposed)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a changed tensor of ``shape``: rows may be added or removed.

        Raises InputError where shapes or ranks don't fit, or several adapters replace the tensor.
        """
        whole = [adapter for adapter, part in self.parts if part.replaced or part.tokens]
        if len(whole) > 1:
            raise InputError(
                f"{whole[0].name} and {whole[1].name} both replace its tensor",
                where=self.module,
                fix="Only one of several adapters may have this module, or rows of it, as a whole.",
            )
        for adapter, part in self.parts:  # what is replaced decides what the rest must fit
            if part.replaced:
                own = adapter.shape(part.replaced)
                if own[1:] != shape[1:] or len(own) != len(shape):
                    raise _misfit(adapter, part.replaced, own, shape)
                shape = own
        for adapter, part in self.parts:
            rows = adapter.lora.rows_of(self.module) if part.tokens else ()
            if part.tokens and (
                adapter.shape(part.tokens)[1:] != shape[1:] or max(rows, default=0) >= shape[0]
            ):
                raise _misfit(adapter, part.tokens, adapter.shape(part.tokens), shape)
            if part.added and adapter.shape(part.added) != shape:
                raise _misfit(adapter, part.added, adapter.shape(part.added), shape)
            if part.a and part.b:
                fits = adapter.shape(part.b)[0], adapter.shape(part.a)[1]
                if part.magnitude and adapter.shape(part.magnitude) != fits[:1]:
                    own = adapter.shape(part.magnitude)
                    raise _misfit(adapter, part.magnitude, own, fits[:1])
                if self.conv1d or is_embedding(part):
                    fits = fits[1], fits[0]
                if fits != shape:
                    raise _misfit(adapter, f"B · A of {self.module}", fits, shape)
        ranks = {a.lora.rank_of(part.of or self.module) for a, part in self.parts if part.a}
        if len(ranks) > 1:
            raise InputError(
                f"the adapters have the ranks {', '.join(map(str, sorted(ranks)))} here, "
                "which can't be combined",
                where=self.module,
                fix="Merge one, then merge the next into the result.",
            )
        return shape

    def same(self, other: Change) -> bool:
        """Whether both changes make equal tensors of equal tensors."""
        if self is other:
            return True
        mine, yours = self.replaced(), other.replaced()
        if (mine is None) != (yours is None) or (
            mine is not None and yours is not None and not torch.equal(mine, yours)
        ):
            return False
        if not _same_tokens(self, other):
            return False
        one, two = self.factors(), other.factors()
        if one is None or two is None:
            return one is two
        if one.scale != two.scale or one.magnitude is not None or two.magnitude is not None:
            return False
        # The factors of an embedding and of a linear tied to it are each other's transposes.
        a, b = (two.a, two.b) if one.transposed == two.transposed else (two.b.T, two.a.T)
        return torch.equal(one.a, a) and torch.equal(one.b, b)

    def _scale(self, adapter: Adapter, part: Part) -> float:
        return adapter.weight * adapter.lora.scale_of(part.of or self.module)


def _same_tokens(one: Change, other: Change) -> bool:
    mine, yours = (
        [(a.lora.rows_of(c.module), a.read(p.tokens)) for a, p in c.parts if p.tokens]
        for c in (one, other)
    )
    return len(mine) == len(yours) and all(
        rows == others and torch.equal(tensor, counterpart)
        for (rows, tensor), (others, counterpart) in zip(mine, yours, strict=True)
    )


def is_embedding(part: Part) -> bool:
    """Whether the factors are an embedding's, whose weight has a row for each input."""
    return part.a is not None and ".lora_embedding_A" in part.a


def _misfit(
    adapter: Adapter, what: str, own: tuple[int, ...], wanted: tuple[int, ...]
) -> InputError:
    return InputError(
        f"{what} has the shape {own}, the base's tensor {wanted}",
        where=str(adapter.directory),
        fix="It was trained for another base"
        + (f": {adapter.lora.base}." if adapter.lora.base else "."),
    )
