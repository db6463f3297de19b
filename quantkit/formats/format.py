"""What a format is: everything that depends on how an artifact stores its quantized linears.

``Format`` is what planning needs to know of any of them; ``SafetensorsFormat`` adds how a linear's
tensors are written and read. Each format is a class in a file of its own that subclasses one of
these two, and ``registry.py`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.methods.grids import Quantized
from quantkit.methods.inputs import InputRounding

T = TypeVar("T")


@dataclass(frozen=True)
class Loading:
    """Whether an engine loads an artifact: ``yes``, ``no`` or ``untried``, and why or with what."""

    engine: str
    loads: str
    why: str = ""


@dataclass(frozen=True)
class Contents:
    """What decides which engines load an artifact, apart from its format.

    schemes and shapes (out, in): of its quantized linears; layout: compressed-tensors' own name of
    how codes are stored; permuted: whether groups aren't of consecutive columns; auto_round:
    whether only AutoRound's own loader takes it.
    """

    schemes: Sequence[object] = ()
    shapes: Sequence[tuple[int, ...]] = ()
    layout: str | None = None
    permuted: bool = False
    auto_round: bool = False


@dataclass(frozen=True)
class Dialect:
    """A ``quantization_config``, understood.

    format: by its name in a recipe; variant: of its layout; settings: under the names that the
    format's class reads; writer: the tool that signed it, where one did; method: how the codes were
    chosen, where the settings leave no doubt; auto_round: whether only AutoRound's own loader takes
    it.
    """

    format: str
    variant: str | None
    settings: Mapping[str, Any]
    writer: str | None
    method: str | None = None
    auto_round: bool = False

    def __str__(self) -> str:
        return f"{self.format} ({self.variant})" if self.variant else self.format


class Unreadable(Exception):
    """A ``quantization_config`` that names what can't be read; ``kind`` is its name."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear as a checkpoint stores it: its tensors by suffix, read when asked for.

    module: its full name; settings: of the checkpoint's ``Dialect``; suffixes: of the tensors
    that are there. ``shape`` and ``read`` take a suffix and raise KeyError for an absent one.
    """

    module: str
    settings: Mapping[str, Any]
    suffixes: Collection[str]
    shape: Callable[[str], tuple[int, ...]]
    read: Callable[[str], Tensor]


class Format(Protocol):
    """A format, by the name that a recipe gives it.

    holds: the classes of the schemes that it can store; ``check_scheme`` decides on each instance.
    lowest_zero: the lowest zero point that an asymmetric grid may have. exact_minimum: whether
    scale · zero point must be exact in fp16, because the format stores that product. records: the
    method's settings that config.json repeats. needed_by_transformers: the packages, as pip names
    them, that transformers needs to load it. readable: the name, with what can be read of it, for
    messages. without_experts: why it can't hold the experts of a mixture, None where it can.
    """

    name: ClassVar[str]
    holds: ClassVar[tuple[type, ...]]
    lowest_zero: ClassVar[int] = 0
    exact_minimum: ClassVar[bool] = False
    records: ClassVar[tuple[str, ...]] = ()
    needed_by_transformers: ClassVar[tuple[str, ...]] = ()
    without_experts: ClassVar[str | None] = None

    @property
    def readable(self) -> str:
        return self.name

    def check_scheme(
        self, name: str, shape: tuple[int, int], scheme: object, default: object
    ) -> None:
        """Raise InputError when the linear ``name`` of ``shape`` (out, in) can't be stored.

        ``default``: the scheme of the linears that the recipe makes no exception for.
        """
        if not isinstance(scheme, self.holds):
            raise self.refusal(name, scheme)

    def refusal(self, name: str, scheme: object) -> InputError:
        """The error for a scheme of a kind that the format doesn't have."""
        return InputError(
            f"the {self.name} format can't hold {scheme}",
            where=name,
            fix="Choose another format, or another method.",
        )

    def nbytes(self, shape: tuple[int, int], scheme: object, dtype: torch.dtype) -> int:
        """Bytes of one linear of ``shape`` (out, in), of a model in ``dtype``."""
        ...

    def config(
        self,
        default: object,
        schemes: Mapping[str, object],
        skipped: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """``quantization_config`` of config.json; empty for a format that doesn't need one.

        default: the scheme of the linears that the recipe makes no exception for; schemes: of all
        quantized linears, by full name; skipped: full names of the linears that are kept in the
        model's ``dtype``.
        """
        ...

    def loading(self, contents: Contents) -> tuple[Loading, ...]:
        """Which engines load it, and which that one might try don't."""
        ...


@runtime_checkable
class SafetensorsFormat(Format, Protocol):
    """A format that stores each linear as several tensors, ``MODULE.SUFFIX``, in safetensors.

    suffixes: of the tensors that ``pack`` may give; markers: those that only a quantized linear
    has; read_suffixes: all that other tools' linears may have; group_index: the suffix of the
    group of each column, where groups can be permuted; old_config: the file beside config.json
    in which older tools kept their settings.
    """

    suffixes: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]]
    read_suffixes: ClassVar[tuple[str, ...]]
    group_index: ClassVar[str | None] = None
    old_config: ClassVar[str | None] = None

    def pack(self, tensor: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one linear, by suffix, for a model in ``dtype``, on the codes' device."""
        ...

    def unpack(self, linear: StoredLinear) -> Quantized:
        """Inverse of ``pack``, for other tools' linears too.

        Raises InputError where the tensors disagree or their layout can't be read, and KeyError
        where one is missing.
        """
        ...

    def scheme(self, linear: StoredLinear) -> object:
        """What a linear is rounded to. Raises what ``unpack`` raises."""
        ...

    def weight_shape(self, linear: StoredLinear) -> tuple[int, ...]:
        """(out, in) of the weight. Raises KeyError where a tensor that is needed is missing."""
        ...

    def dialect(self, quantization: Mapping[str, Any]) -> Dialect:
        """Understand a ``quantization_config``, ours or another tool's. Raises Unreadable."""
        ...

    def input_rounding(self, linear: StoredLinear) -> InputRounding | None:
        """What engines do to the linear's inputs before they multiply; None for nothing."""
        return None

    def other_files(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """JSON files to write beside config.json, by name; ``config``: what ``config`` returned."""
        return {}


def expect(value: object, kind: type[T]) -> T:
    """``value``, which is of ``kind`` if ``check_scheme`` was asked. Raises TypeError if not."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, not {type(value).__name__}")
    return value


def first_setting(quantization: Mapping[str, Any], *names: str, default: str) -> str:
    """The first of the settings that is set, as lower-case text."""
    values = (quantization[name] for name in names if quantization.get(name) is not None)
    return str(next(values, default)).lower()


def signature(quantization: Mapping[str, Any]) -> str | None:
    """The tool that wrote it: by GPTQModel's ``meta``, or as AutoRound signs its exports."""
    named = (quantization.get("meta") or {}).get("quantizer")
    if named:
        names = named if isinstance(named, list) else [named]
        return ", ".join(str(name).replace(":", " ") for name in names)
    release = quantization.get("autoround_version")
    return f"auto-round {release}" if release else quantization.get("provider")
