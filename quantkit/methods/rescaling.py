"""Methods that rescale inputs before they round the weights that read them.

A scale s on the input features of a linear multiplies the columns of its weight and is undone
where the features are made: a norm's weight, or the rows of an earlier linear, are divided by it
(``calibration.folds`` proves where that can be done).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.calibration.folds import Fold
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.grids import Grid, as_grid
from quantkit.methods.linears import BlockResult, Linears, QuantizedLinear


@dataclass(frozen=True)
class Target:
    """A linear that reads the input whose scale is searched.

    weight: (out, in) float32; rows: what a unit of each output counts, (out,). It isn't one where
    the outputs have been rescaled already, being the input of a later linear.
    """

    weight: Tensor
    grid: Grid
    rows: Tensor


class Rescaler(Protocol):
    """What a method does with one input of the block."""

    def scale(
        self, targets: Sequence[Target], realize: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """The scale (in,) to apply, as ``realize`` returned it; None for none."""
        ...

    def quantize(self, name: str, target: Target, scale: Tensor | None) -> QuantizedLinear:
        """The linear ``name``, whose weight is multiplied by ``scale`` before it is rounded."""
        ...


def centered(scale: Tensor) -> Tensor:
    """The scale with its extremes balanced around 1: only ratios between features matter."""
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)


def quantize_rescaled(
    linears: Linears, rescaler: Callable[[InputStatistics], Rescaler]
) -> BlockResult:
    """Rescale every input that can be, and quantize the linears that read it.

    rescaler: makes the ``Rescaler`` of one input. Raises InputError for a linear without inputs.
    """
    linears.require_inputs()
    modules = dict(linears.block.named_modules())
    values = {name: weight.float() for name, weight in linears.weights.items()}
    rows = {name: torch.ones(len(weight), device=weight.device) for name, weight in values.items()}
    by_consumer = {consumer: fold for fold in linears.folds for consumer in fold.consumers}
    result = BlockResult()
    # From the last input to the first: a producer's rows are then rescaled before its own input
    # is searched, so that every linear is quantized as it will be stored.
    for group in reversed(linears.inputs):
        names = linears.readers(group)
        if not names:
            continue
        targets = [
            Target(values[name], as_grid(linears.schemes[name]), rows[name]) for name in names
        ]
        method, fold = rescaler(group), by_consumer.get(names[0])
        scale = None
        if fold is not None:
            scale = method.scale(targets, _Realizable(fold, modules, set(linears.weights)))
            if scale is not None:
                _fold_back(fold, scale, modules, values, rows, result.changed)
        for name, target in zip(names, targets, strict=True):
            done = method.quantize(name, target, scale)
            report = replace(done.report, scaled=scale is not None)
            result.linears[name] = replace(done, report=report)
    result.linears = dict(reversed(result.linears.items()))
    return result


@dataclass(frozen=True)
class _Realizable:
    """Turns the scale that a method wants into the one that the producer can really undo.

    A norm's weight is divided and rounded to its dtype; what the rounding left is the scale in
    force. Where other stored tensors would be rounded too (a bias, an unquantized linear), scales
    become powers of two, which round nothing there.
    """

    fold: Fold
    modules: dict[str, nn.Module]
    quantized: set[str]

    def __call__(self, scale: Tensor) -> Tensor:
        fold, producer = self.fold, self.modules[self.fold.producer]
        scale = fold.reduce(scale)
        kept = [name for name in fold.consumers if name not in self.quantized]
        if fold.kind == "linear" and fold.producer not in self.quantized:
            kept.append(fold.producer)
        if kept or getattr(producer, "bias", None) is not None:
            scale = torch.exp2(scale.log2().round())
        if fold.kind != "linear":
            weight = _parameter(producer, "weight")
            base = 1.0 if fold.kind == "norm_plus_one" else 0.0
            stored = fold.divide(weight.float(), scale).to(weight.dtype).float()
            scale = (base + weight.float()) / (base + stored)
            scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
        return fold.expand(scale)


def _fold_back(
    fold: Fold,
    scale: Tensor,
    modules: dict[str, nn.Module],
    values: dict[str, Tensor],
    rows: dict[str, Tensor],
    changed: dict[str, Tensor],
) -> None:
    """Divide the producer by ``scale`` and multiply the consumers that stay unquantized."""
    made = fold.narrow(scale)
    producer = modules[fold.producer]
    if fold.producer in values:
        values[fold.producer] = fold.divide(values[fold.producer], made)
        rows[fold.producer] = rows[fold.producer] * made
    else:
        weight = _parameter(producer, "weight")
        changed[f"{fold.producer}.weight"] = fold.divide(weight.float(), made).to(weight.dtype)
    if getattr(producer, "bias", None) is not None:
        bias = _parameter(producer, "bias")
        changed[f"{fold.producer}.bias"] = (bias.float() / made).to(bias.dtype)
    for name in fold.consumers:
        if name not in values:
            weight = changed.get(f"{name}.weight", _parameter(modules[name], "weight"))
            changed[f"{name}.weight"] = (weight.float() * scale).to(weight.dtype)


def _parameter(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name).detach()
