"""Which tensors of a checkpoint, or which parts of them, each expert of a mixture is.

A checkpoint has a tensor for each expert, or one for all. transformers' own converters, which make
its parameters of them, are traced: no layout is known by a model's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.views import View
from quantkit.model.experts import FIRST, LAST, Experts, Piece, prove, unknown
from quantkit.model.fusions import Fusion, Shapes
from quantkit.model.names import Match

_NORM = "post_expert_norm"


def holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps several experts' weights in parameters with three axes."""
    first = [getattr(module, name, None) for name in FIRST]
    return any(map(_is_stack, first)) and _is_stack(getattr(module, LAST, None))


def _is_stack(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.dim() == 3


def separate(
    name: str,
    module: nn.Module,
    match: Match,
    checkpoint: Shapes,
    where: str,
    proven: set[Any],
) -> tuple[Experts, dict[str, View]]:
    """The experts of ``module``, called ``name``, as linears; and their parameters' views by name.

    proven: layouts that need no proof any more, to which this one is added. Raises InputError where
    the layout of the experts isn't understood.
    """
    parameters = dict(module.named_parameters(recurse=False))
    stacks = {leaf: value for leaf, value in parameters.items() if _is_stack(value)}
    others = set(parameters) - set(stacks) - {f"{leaf}_bias" for leaf in stacks}
    others |= {child for child, part in module.named_children() if list(part.parameters())}
    others |= set(stacks) - {*FIRST, LAST}
    if extra := others - {_NORM}:
        raise unknown(module, f"{', '.join(sorted(extra))} besides its weights", where)
    layout = _Layout(name, module, match, checkpoint, stacks[LAST].shape[0], where)
    layout = replace(layout, transposed=is_transposed(stacks))
    shapes: dict[str, tuple[int, int]] = {}
    experts: list[dict[str, list[Piece]]] = [{} for _ in range(layout.count)]
    views: dict[str, View] = {}
    for leaf, value in stacks.items():
        outputs, inputs = value.shape[:0:-1] if layout.transposed else value.shape[1:]
        shapes[leaf] = (outputs, inputs)
        for number, pieces in enumerate(layout.pieces(leaf, outputs)):
            experts[number][leaf] = pieces
            for piece in pieces:
                expert = f"{name}.{number}.{piece.leaf}"
                views[f"{expert}.weight"] = piece.view
                if f"{leaf}_bias" in parameters:
                    alone = len(pieces) == 1
                    views[f"{expert}.bias"] = layout.bias(leaf, number, piece, alone=alone)
    biases = {leaf: f"{leaf}_bias" in parameters for leaf in stacks}
    signature = (type(module), layout.transposed, _signature(experts))
    if signature not in proven:
        prove(module, experts, shapes, layout.transposed, where)
        proven.add(signature)
    return Experts(module, experts, shapes, biases, stacks[LAST].dtype), views


def _signature(experts: Sequence[Mapping[str, Sequence[Piece]]]) -> Any:
    """The names and rows of all pieces, which a proof depends on."""
    return tuple(
        (name, piece.leaf, str(piece.rows))
        for parameters in experts
        for name, pieces in parameters.items()
        for piece in pieces
    )


def is_transposed(stacks: Mapping[str, Tensor]) -> bool:
    """Whether the parameters of one expert are (in, out): down_proj's outputs are the inputs of
    the first, which tells."""
    first = next(stacks[name] for name in FIRST if name in stacks)
    return first.shape[2] != stacks[LAST].shape[1]


@dataclass(frozen=True)
class _Layout:
    """Where the parameters of ``module``, called ``name``, come from.

    count: of experts; transposed: whether the parameters are (experts, in, out).
    """

    name: str
    module: nn.Module
    match: Match
    checkpoint: Shapes
    count: int
    where: str
    transposed: bool = False

    def pieces(self, leaf: str, outputs: int) -> list[list[Piece]]:
        """The pieces of a parameter with so many outputs, for each expert."""
        name = f"{self.name}.{leaf}"
        if name in self.match.fusions:
            return self._traced(name, leaf, outputs)
        parts = self._parts(leaf, outputs)
        if name not in self.match.names:  # an artifact's, which has experts apart
            key = self.match.separate
            if any(f"{self.name}.0.{part}.weight" not in key for part, _ in parts):
                raise unknown(self.module, f"no {name} in the checkpoint", self.where)
            return [
                [
                    Piece(part, rows, View(key[f"{self.name}.{number}.{part}.weight"]))
                    for part, rows in parts
                ]
                for number in range(self.count)
            ]
        return [
            self._divided(View(self.match.names[name], number, self.transposed), leaf, outputs)
            for number in range(self.count)
        ]

    def bias(self, leaf: str, number: int, piece: Piece, *, alone: bool) -> View:
        """The bias of one piece, which has the parameter's outputs for itself where ``alone``."""
        name = f"{self.name}.{number}.{piece.leaf}.bias"
        if name in self.match.separate:
            return View(self.match.separate[name])
        stored = f"{self.name}.{leaf}_bias"
        if stored not in self.match.names:
            what = "biases that transformers makes of others"
            raise unknown(self.module, what, self.where)
        return View(self.match.names[stored], number, rows=None if alone else piece.rows)

    def _parts(self, leaf: str, outputs: int) -> list[tuple[str, slice]]:
        """The linears that engines know among the rows of a parameter."""
        if leaf != "gate_up_proj":
            return [(leaf, slice(0, outputs))]
        if getattr(self.module, "is_concatenated", True):
            half = outputs // 2
            return [("gate_proj", slice(0, half)), ("up_proj", slice(half, outputs))]
        return [("gate_proj", slice(0, outputs, 2)), ("up_proj", slice(1, outputs, 2))]

    def _divided(self, view: View, leaf: str, outputs: int) -> list[Piece]:
        """The linears of one expert, of which ``view`` has all rows of a parameter."""
        parts = self._parts(leaf, outputs)
        if len(parts) == 1:
            return [Piece(leaf, parts[0][1], view)]
        return [Piece(part, rows, replace(view, rows=rows)) for part, rows in parts]

    def _traced(self, name: str, leaf: str, outputs: int) -> list[list[Piece]]:
        """The pieces of a parameter that a converter makes of other tensors."""
        fusion = self.match.fusions[name]
        traced = fusion.trace(self.checkpoint, self.count)[name]
        result = []
        for number in range(self.count):
            places = traced[number].t() if self.transposed else traced[number]
            # A mixture may have one expert, whose tensor is as good as one for all.
            together = len(fusion.keys) == 1 and len(self.checkpoint.shape(fusion.keys[0])) == 3
            pieces = list(_pieces(places, fusion, number if together else None, outputs))
            if not pieces:
                raise unknown(self.module, f"{name} in an order of its own", self.where)
            whole = len(fusion.keys) == 1
            result.append(self._divided(pieces[0].view, leaf, outputs) if whole else pieces)
        return result


def _pieces(places: Tensor, fusion: Fusion, index: int | None, outputs: int) -> Iterator[Piece]:
    """Which tensors, or which part of the only one, are which rows of one expert's parameter.

    places: (out, in), as ``Fusion.trace`` gives them; index: of the expert, where one tensor has
    all of them; outputs: rows of the real parameter. Nothing is given where some rows are in no
    order that a view can show.
    """
    found = []
    for source in dict.fromkeys((places[:, 0] >> 32).tolist()):
        [rows] = torch.where(places[:, 0] >> 32 == source)
        part = places[rows] - (source << 32)
        first = 0 if index is None else index * part.numel()
        whole = torch.arange(first, first + part.numel())
        key = fusion.keys[source]
        chosen = _slice(rows, outputs // len(places))
        if torch.equal(part, whole.view(part.shape)):
            view = View(key, index)
        elif torch.equal(part, whole.view(part.shape[::-1]).t()):
            view = View(key, index, transposed=True)
        else:
            return
        if chosen is None:
            return
        leaf = key.removesuffix(".weight").rpartition(".")[2]
        found.append(Piece(leaf, chosen, view))
    yield from found


def _slice(rows: Tensor, scale: int) -> slice | None:
    """Numbers of rows as a slice, ``scale`` times as long; None where their gaps differ."""
    first, last = int(rows[0]), int(rows[-1])
    step = 1 if len(rows) == 1 else int(rows[1]) - first
    if rows.tolist() != list(range(first, last + 1, step)):
        return None
    return slice(first, None, step) if step > 1 else slice(first * scale, (last + 1) * scale)
