"""What a method gets of a block, and what it returns: linears in, quantized linears out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from quantkit.base.errors import InputError, not_finite
from quantkit.base.parallel import parallel_map
from quantkit.calibration.folds import Fold
from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.grids import Quantized, sum_of
from quantkit.results.manifest import LayerReport

_ROWS = 1024  # whose error is computed together: float32 copies of a whole weight may be large


class Scheme(Protocol):
    """The values that a weight may be rounded to. ``str`` names it, as in ``int4 g128 sym``."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether engines round the linear's inputs as well."""
        ...


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized weight and its report."""

    tensor: Quantized
    report: LayerReport


@dataclass
class BlockResult:
    """A quantized block.

    linears: by the linear's name within the block; changed: the new values of other parameters
    that had to be rescaled (norms, biases, unquantized linears), by their names.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Linears:
    """The linears of a block that are to be quantized together.

    weights: (out, in) of any float dtype, by the linear's name within the block; schemes: by the
    same names; inputs: statistics of the tensors that the linears read, empty where the method
    needs none; folds: the inputs that may be rescaled, empty where the method doesn't rescale;
    prefix: precedes names in reports and errors.
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
        """The linears of ``block`` that ``schemes`` names.

        Raises InputError where a weight holds NaN or infinity.
        """
        weights = {name: block.get_parameter(f"{name}.weight").detach() for name in schemes}
        # Read together, since a device is waited for.
        finite = [weight.isfinite().all() for weight in weights.values()]
        for name, whole in zip(
            weights, torch.stack(finite).tolist() if finite else (), strict=True
        ):
            if not whole:
                raise not_finite(f"{prefix}{name}.weight")
        return cls(block, weights, schemes, inputs, folds, prefix)

    def require_inputs(self) -> None:
        """Raise InputError where no calibration row reached a linear, as in an unused expert."""
        measured = {name for group in self.inputs for name in group.consumers}
        if unreached := [name for name in self.weights if name not in measured]:
            raise InputError(
                "no calibration row reached it, so nothing is known of its inputs",
                where=", ".join(self.prefix + name for name in unreached),
                fix="Skip it in the recipe (overrides: match, skip: true), or use method rtn.",
            )

    def readers(self, group: InputStatistics) -> list[str]:
        """Names of those linears that read the input of ``group``."""
        return [name for name in group.consumers if name in self.weights]

    def report(self, name: str, error: float, measured_on: str) -> LayerReport:
        """A report of the linear ``name``, with its full name and its scheme."""
        report = LayerReport(self.prefix + name, str(self.schemes[name]), error, measured_on)
        group = next((group for group in self.inputs if name in group.consumers), None)
        if group is None or name not in group.routed:
            return report
        few = True if group.routed[name] < group.tokens else None
        return replace(report, tokens=group.routed[name], all_tokens=few)

    def each(
        self,
        quantize: Callable[[Tensor, Scheme], Quantized],
        value: Callable[[Quantized], Tensor] = lambda tensor: tensor.dequantize(),
    ) -> BlockResult:
        """Quantize every weight by itself, several at a time.

        quantize: from a weight (out, in) and its scheme; value: the weight (out, in), of any float
        dtype, that the quantized one gives back, for the report.
        """

        def one(name: str) -> QuantizedLinear:
            weight = self.weights[name]
            tensor = quantize(weight, self.schemes[name])
            error = relative_error(value(tensor), weight)
            return QuantizedLinear(tensor, self.report(name, error, "weights"))

        device = next(iter(self.weights.values())).device  # all are of one block
        return BlockResult(
            dict(zip(self.weights, parallel_map(one, self.weights, device), strict=True))
        )


def relative_error(value: Tensor, weight: Tensor) -> float:
    """‖W - Ŵ‖² / ‖W‖² of ``value``, Ŵ, and ``weight``, W, (out, in) of any float dtype."""
    errors, squares = [], []
    for rounded, original in zip(value.split(_ROWS), weight.split(_ROWS), strict=True):
        rows = original.float()
        errors.append((rows - rounded).square_().sum(1))
        squares.append(rows.square().sum(1))
    return sum_of(torch.cat(errors)) / max(sum_of(torch.cat(squares)), 1e-30)


def output_energy(group: InputStatistics, name: str) -> float:
    """The sum of the squared outputs of linear ``name`` over the calibration tokens, above 0."""
    return max(float(group.energy[name]), 1e-30)
