"""One decoder block by any method: its linears and what was measured in, quantized tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError, not_finite
from quantkit.base.parallel import spread
from quantkit.calibration.folds import Fold
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods import awq, fp8, nf4, rtn, smoothquant
from quantkit.methods.fp8 import Fp8Scheme
from quantkit.methods.gptq import feedback as gptq_feedback
from quantkit.methods.gptq import pieces as gptq
from quantkit.methods.grids import Grid, Quantized, QuantizedTensor, total
from quantkit.methods.nf4 import Nf4Scheme, Nf4Tensor
from quantkit.recipes.recipe import Awq, Fp8, Gptq, Nf4, Rtn, SmoothQuant

Scheme = Grid | Fp8Scheme | Nf4Scheme

_ROWS = 1024  # whose error is taken together


@dataclass(frozen=True)
class LayerReport:
    """How one linear fared.

    error: squared output error over squared output on the calibration tokens
    (``measured_on: outputs``), or squared weight error over squared weight (``weights``);
    weighted_error: the latter, weighted by the importance of each input feature; damping: of
    gptq, missing where nothing could be factorized and the codes are the nearest; scaled:
    whether awq or smoothquant rescaled its input.
    """

    name: str
    scheme: str
    error: float
    measured_on: str
    weighted_error: float | None = None
    damping: float | None = None
    scaled: bool | None = None


@dataclass
class BlockResult:
    """tensors: by linear's name within the block; changed: other parameters that were rescaled."""

    tensors: dict[str, Quantized] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)


def quantize_block(
    method: Rtn | Gptq | Awq | SmoothQuant | Fp8 | Nf4,
    block: nn.Module,
    schemes: dict[str, Scheme],
    inputs: Sequence[InputStatistics],
    folds: Sequence[Fold],
    prefix: str = "",
) -> BlockResult:
    """Quantize the linears of ``block`` named in ``schemes``; reports name them after ``prefix``.

    inputs: Gram matrices, for gptq and awq; diagonals, for smoothquant; folds: proven, for awq
    and smoothquant. ``block`` isn't changed.
    Raises InputError for a weight that isn't finite and for a linear that calibration never ran.
    """
    weights = {name: block.get_parameter(f"{name}.weight").detach() for name in schemes}
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise not_finite(f"{prefix}{name}.weight")
    if isinstance(method, Gptq | Awq | SmoothQuant):
        run = {name for group in inputs for name in group.consumers}
        if idle := [name for name in schemes if name not in run]:
            raise InputError(
                "the calibration rows never ran through it, so nothing is known of its inputs",
                where=", ".join(prefix + name for name in idle),
                fix="Skip it in the recipe (overrides: match, skip: true), or use method rtn.",
            )
    if isinstance(method, Awq):
        awq_of = partial(_AwqInput, method)
        result = _rescaled(awq_of, block, weights, schemes, inputs, folds)
    elif isinstance(method, SmoothQuant):
        smooth_of = partial(_SmoothInput, method)
        result = _rescaled(smooth_of, block, weights, schemes, inputs, folds)
    elif isinstance(method, Gptq):
        result = _gptq(method, weights, schemes, inputs)
    else:
        result = _direct(weights, schemes)
    result.layers = [replace(layer, name=prefix + layer.name) for layer in result.layers]
    return result


def _direct(weights: dict[str, Tensor], schemes: dict[str, Scheme]) -> BlockResult:
    def quantize(name: str) -> tuple[Quantized, float]:
        weight, scheme = weights[name], schemes[name]
        tensor: Quantized
        if isinstance(scheme, Grid):
            tensor = rtn.quantize(weight, scheme)
        elif isinstance(scheme, Fp8Scheme):
            tensor = fp8.quantize(weight)
        else:
            tensor = nf4.quantize(weight, scheme)
        return tensor, _relative_error(tensor, weight)

    device = next(iter(weights.values())).device
    result = BlockResult()
    for name, (tensor, error) in zip(weights, spread(quantize, weights, device), strict=True):
        result.tensors[name] = tensor
        result.layers.append(LayerReport(name, str(schemes[name]), error, "weights"))
    return result


def _relative_error(tensor: Quantized, weight: Tensor) -> float:
    """Squared error over squared weights; some rows at a time, for the weights may be large."""
    taken = tensor.computed() if isinstance(tensor, Nf4Tensor) else tensor.dequantize()
    lost, whole = [], []
    for value, original in zip(taken.split(_ROWS), weight.split(_ROWS), strict=True):
        rows = original.float()
        lost.append((rows - value).square_().sum(1))
        whole.append(rows.square().sum(1))
    return total(torch.cat(lost)) / max(total(torch.cat(whole)), 1e-30)


def _gptq(
    method: Gptq,
    weights: dict[str, Tensor],
    schemes: dict[str, Scheme],
    inputs: Sequence[InputStatistics],
) -> BlockResult:
    settings = gptq_feedback.Settings(
        method.damp_percent, method.activation_order, method.clip_search, method.block_size
    )
    groups = [(g, [name for name in g.consumers if name in weights]) for g in inputs]
    groups = [(group, names) for group, names in groups if names]
    problems = [
        gptq.Problem(
            group.moment,
            [weights[name] for name in names],
            [_grid(schemes[name]) for name in names],
            group.drift,
        )
        for group, names in groups
    ]
    result = BlockResult()
    for (group, names), outcomes in zip(groups, gptq.quantize(problems, settings), strict=True):
        for name, outcome in zip(names, outcomes, strict=True):
            result.tensors[name] = outcome.tensor
            error = outcome.loss / _energy(group, name)
            result.layers.append(
                LayerReport(name, str(schemes[name]), error, "outputs", damping=outcome.damping)
            )
    result.layers.sort(key=lambda layer: list(weights).index(layer.name))
    return result


class _Input(Protocol):
    """What a method that rescales does with one input of the block."""

    def scale(
        self, targets: Sequence[awq.Target], realise: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """The scale (in,) that was realised; None for none."""
        ...

    def quantize(
        self, name: str, target: awq.Target, scale: Tensor | None
    ) -> tuple[QuantizedTensor, dict[str, Any]]:
        """A reader's tensor, and the figures of its report."""
        ...


class _AwqInput:
    def __init__(self, method: Awq, group: InputStatistics) -> None:
        self._method, self._group = method, group
        self._read = awq.Inputs(group.moment.matrix())

    def scale(
        self, targets: Sequence[awq.Target], realise: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        steps, clip = self._method.scale_steps, self._method.clip_search
        return awq.search_scale(targets, self._read, realise, steps=steps, clip=clip)

    def quantize(
        self, name: str, target: awq.Target, scale: Tensor | None
    ) -> tuple[QuantizedTensor, dict[str, Any]]:
        found = awq.quantize(target, self._read, scale, clip=self._method.clip_search)
        error = found.loss / _energy(self._group, name)
        return found.tensor, {"error": error, "measured_on": "outputs"}


class _SmoothInput:
    def __init__(self, method: SmoothQuant, group: InputStatistics) -> None:
        self._method, self._importance = method, group.importance()

    def scale(
        self, targets: Sequence[awq.Target], realise: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        weights = [target.weight for target in targets]
        wished = smoothquant.scale(self._importance.sqrt(), weights, self._method.alpha)
        return realise(awq.centred(wished))

    def quantize(
        self, name: str, target: awq.Target, scale: Tensor | None
    ) -> tuple[QuantizedTensor, dict[str, Any]]:
        weight = target.weight
        tensor = rtn.quantize(weight if scale is None else weight * scale, target.grid)
        stood_for = tensor.dequantize() if scale is None else tensor.dequantize().div_(scale)
        lost, whole = stood_for.sub_(weight).square_(), weight.square()
        errors = [
            total((lost * counts).sum(1)) / max(total((whole * counts).sum(1)), 1e-30)
            for counts in (torch.ones_like(self._importance), self._importance)
        ]
        return tensor, {"error": errors[0], "measured_on": "weights", "weighted_error": errors[1]}


def _rescaled(
    of: Callable[[InputStatistics], _Input],
    block: nn.Module,
    weights: dict[str, Tensor],
    schemes: dict[str, Scheme],
    inputs: Sequence[InputStatistics],
    folds: Sequence[Fold],
) -> BlockResult:
    modules = dict(block.named_modules())
    values = {name: weight.float() for name, weight in weights.items()}
    rows = {name: torch.ones(len(weight), device=weight.device) for name, weight in values.items()}
    by_consumer = {consumer: fold for fold in folds for consumer in fold.consumers}
    result = BlockResult()
    # From the last input to the first: a producer's rows are then rescaled before its own input
    # is searched, so that every linear is quantized as it will be stored.
    for group in reversed(inputs):
        names = [name for name in group.consumers if name in weights]
        if not names:
            continue
        targets = [awq.Target(values[name], _grid(schemes[name]), rows[name]) for name in names]
        read, fold = of(group), by_consumer.get(names[0])
        scale = None
        if fold is not None:
            scale = read.scale(targets, _Realised(fold, modules, set(weights)))
            if scale is not None:
                _fold_back(fold, scale, modules, values, rows, result.changed)
        for name, target in zip(names, targets, strict=True):
            result.tensors[name], figures = read.quantize(name, target, scale)
            scaled = scale is not None
            result.layers.append(LayerReport(name, str(schemes[name]), **figures, scaled=scaled))
    result.layers.reverse()
    return result


@dataclass(frozen=True)
class _Realised:
    """Turns a wished input scale into the one that the producer can really undo.

    A norm is divided and rounded to its dtype; what the rounding left is the scale in force.
    Where other stored tensors would be rounded too (a bias, an unquantized linear), scales are
    powers of two, which round nothing there.
    """

    fold: Fold
    modules: dict[str, nn.Module]
    quantized: set[str]

    def __call__(self, wished: Tensor) -> Tensor:
        fold, producer = self.fold, self.modules[self.fold.producer]
        scale = fold.reduce(wished)
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


def _grid(scheme: Scheme) -> Grid:
    if not isinstance(scheme, Grid):
        raise TypeError(f"{scheme} is no affine grid")
    return scheme


def _energy(group: InputStatistics, name: str) -> float:
    """Squared output of a linear over the calibration tokens."""
    return max(float(group.energy[name]), 1e-30)
