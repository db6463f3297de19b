"""What a method is given of a block, and what it returns: linears in, quantized linears out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError, not_finite
from quantkit.base.parallel import parallel_map
from quantkit.calibration.folds import Fold
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.grids import Quantized, total
from quantkit.results.manifest import LayerReport

_ROWS = 1024  # whose error is computed together, since weights may be large


class Scheme(Protocol):
    """What the weights of one linear are rounded to. ``str`` names it: ``int4 g128 sym``."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether engines round the linear's inputs too."""
        ...


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight and its report."""

    tensor: Quantized
    report: LayerReport


@dataclass
class BlockResult:
    """What quantizing a block gave.

    linears: by the linear's name within the block; changed: other parameters of the block that
    were rescaled, by name.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Linears:
    """The linears of a block that are to be quantized together.

    weights: (out, in) by the linear's name within the block, of any float dtype; schemes: by the
    same names; inputs: what was measured of the tensors that they read, empty where the method
    asked for nothing; folds: which inputs may be rescaled, where the method asked for that;
    prefix: what precedes names in reports and errors.
    """

    block: nn.Module
    weights: dict[str, Tensor]
    schemes: Mapping[str, Scheme]
    inputs: Sequence[InputStatistics]
    folds: Sequence[Fold]
    prefix: str = ""

    @classmethod
    def of(
        cls,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        inputs: Sequence[InputStatistics] = (),
        folds: Sequence[Fold] = (),
        prefix: str = "",
    ) -> Linears:
        """The linears of ``block`` named in ``schemes``. Raises InputError for NaN or infinity."""
        weights = {name: block.get_parameter(f"{name}.weight").detach() for name in schemes}
        for name, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise not_finite(f"{prefix}{name}.weight")
        return cls(block, weights, schemes, inputs, folds, prefix)

    def require_inputs(self) -> None:
        """Raise InputError for a linear that no calibration row ever reached."""
        measured = {name for group in self.inputs for name in group.consumers}
        if idle := [name for name in self.weights if name not in measured]:
            raise InputError(
                "the calibration rows never ran through it, so nothing is known of its inputs",
                where=", ".join(self.prefix + name for name in idle),
                fix="Skip it in the recipe (overrides: match, skip: true), or use method rtn.",
            )

    def readers(self, group: InputStatistics) -> list[str]:
        """Those of the linears that read one input."""
        return [name for name in group.consumers if name in self.weights]

    def report(self, name: str, error: float, measured_on: str) -> LayerReport:
        """A report that names a linear as the artifact does."""
        return LayerReport(self.prefix + name, str(self.schemes[name]), error, measured_on)

    def each(
        self,
        quantize: Callable[[Tensor, Scheme], Quantized],
        value: Callable[[Quantized], Tensor] = lambda tensor: tensor.dequantize(),
    ) -> BlockResult:
        """Quantize every weight by itself, in threads. ``value``: what a tensor dequantizes to."""

        def one(name: str) -> QuantizedLinear:
            weight = self.weights[name]
            tensor = quantize(weight, self.schemes[name])
            error = relative_error(value(tensor), weight)
            return QuantizedLinear(tensor, self.report(name, error, "weights"))

        device = next(iter(self.weights.values())).device
        return BlockResult(
            dict(zip(self.weights, parallel_map(one, self.weights, device), strict=True))
        )


def relative_error(value: Tensor, weight: Tensor) -> float:
    """‖W - Ŵ‖² / ‖W‖² for ``value`` Ŵ and ``weight`` W, (out, in) of any float dtype."""
    lost, whole = [], []
    for rounded, original in zip(value.split(_ROWS), weight.split(_ROWS), strict=True):
        rows = original.float()
        lost.append((rows - rounded).square_().sum(1))
        whole.append(rows.square().sum(1))
    return total(torch.cat(lost)) / max(total(torch.cat(whole)), 1e-30)


def output_energy(group: InputStatistics, name: str) -> float:
    """Squared output of a linear, summed over the calibration tokens."""
    return max(float(group.energy[name]), 1e-30)
