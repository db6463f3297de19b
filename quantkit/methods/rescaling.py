"""Methods that rescale inputs before they round the weights that read them: awq and smoothquant.

A scale s, one factor for each input feature, multiplies the columns of the weights that read the
input. Where the features are made it is undone: a norm's weight, or the rows of an earlier linear,
are divided by s (``calibration.folds`` finds where that can be done).
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
    """A linear to be quantized that reads the input whose scale is chosen.

    weight: (out, in) float32, divided already by the scale of a later input that it makes; rows:
    that scale, (out,), by which the error of each output must be multiplied; ones where there is
    none.
    """

    weight: Tensor
    grid: Grid
    rows: Tensor


class Rescaler(Protocol):
    """How a method rescales inputs of the block, and quantizes the linears that read them."""

    def scale(
        self,
        inputs: Sequence[tuple[InputStatistics, Sequence[Target]]],
        realize: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """The scale (in,) to apply, None to apply none.

        inputs: what reads the tensor that is rescaled: all of it, or, each by itself, the tokens
        that a mixture of experts sends to one expert; realize: turns a scale (in,) into the nearest
        one that can be undone exactly; the result must be what it returned.
        """
        ...

    def quantize(
        self, name: str, group: InputStatistics, target: Target, scale: Tensor | None
    ) -> QuantizedLinear:
        """Quantize the linear ``name``; its weight is multiplied by ``scale`` (in,) first.

        group: the statistics of what it reads.
        """
        ...


def centered(scale: Tensor) -> Tensor:
    """The scale (in,) times a number that puts its extremes at equal ratios from 1.

    Only the ratios between features matter for rounding.
    """
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)


def quantize_rescaled(linears: Linears, method: Rescaler) -> BlockResult:
    """Rescale every input that has a fold, and quantize all linears.

    Raises InputError where no calibration row reached a linear.
    """
    linears.require_inputs()
    modules = dict(linears.block.named_modules())
    values = {name: weight.float() for name, weight in linears.weights.items()}
    rows = {name: torch.ones(len(weight), device=weight.device) for name, weight in values.items()}
    by_consumer = {consumer: fold for fold in linears.folds for consumer in fold.consumers}
    result = BlockResult()
    # From the last input to the first: a producer's rows are then rescaled before the scale of its
    # own input is searched, so that every linear is quantized as it will be stored.
    for fold, groups in reversed(_together(linears, by_consumer)):
        inputs = [
            (
                group,
                {
                    name: Target(values[name], as_grid(linears.schemes[name]), rows[name])
                    for name in linears.readers(group)
                },
            )
            for group in groups
        ]
        scale = None
        if fold is not None:
            realize = _Realizable(fold, modules, set(linears.weights))
            scale = method.scale([(group, list(of.values())) for group, of in inputs], realize)
            if scale is not None:
                _undo_scale(fold, scale, modules, values, rows, result.changed)
        for group, targets in reversed(inputs):
            for name, target in targets.items():
                linear = method.quantize(name, group, target, scale)
                report = replace(linear.report, scaled=scale is not None)
                result.linears[name] = replace(linear, report=report)
    # In the order of execution again, in which linears are reported and written.
    result.linears = dict(reversed(result.linears.items()))
    return result


def _together(
    linears: Linears, by_consumer: dict[str, Fold]
) -> list[tuple[Fold | None, list[InputStatistics]]]:
    """The inputs with linears to quantize; those that one fold rescales are at the first's place.

    What a mixture of experts reads are several: the tokens of each expert, and all of them.
    """
    result: list[tuple[Fold | None, list[InputStatistics]]] = []
    known: dict[Fold, list[InputStatistics]] = {}
    for group in linears.inputs:
        names = linears.readers(group)
        if not names:
            continue
        # Consumers of a fold all read one input, so any of them finds it.
        fold = by_consumer.get(names[0])
        if fold is not None and fold in known:
            known[fold].append(group)
            continue
        groups = [group]
        result.append((fold, groups))
        if fold is not None:
            known[fold] = groups
    return result


@dataclass(frozen=True)
class _Realizable:
    """Turns a scale into the nearest one that the producer can undo exactly.

    modules: those of the block, by name; quantized: names of the linears to be quantized.
    """

    fold: Fold
    modules: dict[str, nn.Module]
    quantized: set[str]

    def __call__(self, scale: Tensor) -> Tensor:
        fold, producer = self.fold, self.modules[self.fold.producer]
        scale = fold.reduce(scale)
        unquantized = [name for name in fold.consumers if name not in self.quantized]
        if fold.kind == "linear" and fold.producer not in self.quantized:
            unquantized.append(fold.producer)
        # Biases and unquantized weights are stored in their own dtype, where only a product with
        # powers of two isn't rounded.
        if unquantized or getattr(producer, "bias", None) is not None:
            scale = torch.exp2(scale.log2().round())
        # A norm's divided weight is rounded to its dtype. The scale that undoes the stored weight
        # exactly is the old weight over the new.
        if fold.kind != "linear":
            weight = _parameter(producer, "weight")
            base = 1.0 if fold.kind == "norm_plus_one" else 0.0
            stored = fold.divide(weight.float(), scale).to(weight.dtype).float()
            scale = (base + weight.float()) / (base + stored)
            # Weights of zero, and those that became zero, give no scale.
            scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
            scale = torch.where(self._exact(unquantized, scale), scale, torch.ones_like(scale))
        return fold.expand(scale)

    def _exact(self, names: Sequence[str], scale: Tensor) -> Tensor:
        """The features whose scale rounds no weight of ``names``, (in,): float16 may underflow."""
        exact = torch.ones_like(scale, dtype=torch.bool)
        for name in names:
            weight = _parameter(self.modules[name], "weight")
            if weight.dtype == torch.float16:
                product = weight.float() * scale
                exact &= (product.half().float() == product).all(0)
        return exact


def _undo_scale(
    fold: Fold,
    scale: Tensor,
    modules: dict[str, nn.Module],
    values: dict[str, Tensor],
    rows: dict[str, Tensor],
    changed: dict[str, Tensor],
) -> None:
    """Divide the producer by ``scale`` (in,), and multiply the consumers that stay unquantized.

    values, rows: of the linears to be quantized, updated in place; changed: the new values of all
    other parameters, added to.
    """
    narrow = fold.narrow(scale)
    producer = modules[fold.producer]
    if fold.producer in values:
        values[fold.producer] = fold.divide(values[fold.producer], narrow)
        rows[fold.producer] = rows[fold.producer] * narrow
    else:
        weight = _parameter(producer, "weight")
        changed[f"{fold.producer}.weight"] = fold.divide(weight.float(), narrow).to(weight.dtype)
    if getattr(producer, "bias", None) is not None:
        bias = _parameter(producer, "bias")
        changed[f"{fold.producer}.bias"] = (bias.float() / narrow).to(bias.dtype)
    for name in fold.consumers:
        if name not in values:
            # It may have been divided already, as the producer of a later input.
            weight = changed.get(f"{name}.weight", _parameter(modules[name], "weight"))
            changed[f"{name}.weight"] = (weight.float() * scale).to(weight.dtype)


def _parameter(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name).detach()
