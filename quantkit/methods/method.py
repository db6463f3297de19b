"""What a method is: the settings that a recipe gives it, and what it does with them.

The section ``quantize`` of a recipe becomes an instance of one of the classes in ``registry``. A
class states in one place what may be set, what must be measured, which scheme a linear gets, and
how the linears of a block are quantized.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from quantkit.calibration.needs import Needs
from quantkit.documents.document import Strict
from quantkit.methods.grids import Grid, as_grid
from quantkit.methods.linears import BlockResult, Linears, Scheme

Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[int, Field(description="columns per group; -1 makes one group a row")]


class Method(Strict):
    """The settings of a method, which are its fields, and what it does.

    tag: names the class: the method's name, unless several classes share it; calibration: whether
    a recipe must, may or can't have a section ``calibration``; rounds_inputs: whether engines round
    the inputs of its linears too; rescales: whether it rescales weights before it rounds them, so
    that a quantized weight by itself can't be compared with the checkpoint's.
    """

    tag: ClassVar[str]
    calibration: ClassVar[Literal["required", "optional", "unused"]]
    rounds_inputs: ClassVar[bool] = False
    rescales: ClassVar[bool] = False

    method: str
    format: str

    @classmethod
    def describes(cls, section: Mapping[str, Any]) -> bool:
        """Whether a recipe's section ``quantize`` is meant for this class."""
        return section.get("method") == cls.tag

    @abstractmethod
    def needs(self) -> Needs | None:
        """What is measured where the recipe has a section ``calibration``; None for nothing."""


class LinearMethod(Method):
    """A method that quantizes linears, each by its scheme, and no other tensors."""

    ignore: list[str] = Field(
        default=["lm_head"], description="globs of modules that stay unquantized"
    )
    unfit: Literal["keep", "refuse"] = Field(
        default="keep",
        description="what becomes of linears whose shape can't hold the scheme: they stay as they "
        "are, and are named, or nothing is made",
    )

    def check_available(self) -> None:
        """Raise MachineError where a library that the method needs isn't installed."""

    @abstractmethod
    def default_scheme(self) -> Scheme:
        """The scheme of a linear that no override matches."""

    @abstractmethod
    def quantize(self, linears: Linears) -> BlockResult:
        """Quantize linears of one block, which isn't changed.

        Raises InputError for weights or statistics that can't be quantized.
        """

    def scheme_of(self, name: str, default: Scheme) -> Scheme | None:
        """The scheme of the linear with this full name; None where it stays unquantized."""
        return None if any(fnmatchcase(name, pattern) for pattern in self.ignore) else default

    def patterns(self) -> list[tuple[str, str]]:
        """All globs of the recipe, each with the key that it is under."""
        return [("quantize.ignore", pattern) for pattern in self.ignore]


class Override(Strict):
    """Another scheme for the modules whose full name matches a glob; the last match wins."""

    match: str
    skip: bool = False
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Override:
        changes = any(value is not None for value in (self.bits, self.group_size, self.symmetric))
        if self.skip == changes:
            raise ValueError("an override needs skip: true, or bits, group_size or symmetric")
        return self


class AffineMethod(LinearMethod):
    """A method that rounds to an affine integer grid; overrides change it for some linears."""

    bits: Bits
    group_size: GroupSize
    symmetric: bool
    overrides: list[Override] = Field(default=[])

    @model_validator(mode="after")
    def _group_sizes_are_possible(self) -> AffineMethod:
        for size in [self.group_size, *(o.group_size for o in self.overrides)]:
            if size is not None and size != -1 and size < 8:
                raise ValueError(f"group_size {size} must be -1 (one group a row) or at least 8")
        return self

    def default_scheme(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def scheme_of(self, name: str, default: Scheme) -> Scheme | None:
        scheme = super().scheme_of(name, default)
        if scheme is None:
            return None
        for override in self.overrides:
            if fnmatchcase(name, override.match):
                changes = override.model_dump(
                    include={"bits", "group_size", "symmetric"}, exclude_none=True
                )
                # After an override that skips, a later one starts from the default again.
                scheme = None if override.skip else replace(as_grid(scheme or default), **changes)
        return scheme

    def patterns(self) -> list[tuple[str, str]]:
        overrides = [("quantize.overrides", override.match) for override in self.overrides]
        return super().patterns() + overrides
