"""LoRA on the parameters that hold all experts of a layer: PEFT's ``target_parameters``.

PEFT puts one wrapper around a module for each of its targeted parameters, in the order in which the
module defines them, so that the keys of the first have ``base_layer`` in them most often. A pair
of factors is for all experts of a parameter: A (experts · r, in) has one expert after the other,
and of B (out, r · experts) expert e has the columns e, e + experts and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quantkit.base.errors import InputError
from quantkit.lora.adapter import Adapter, Part
from quantkit.lora.config import CONFIG_FILE
from quantkit.lora.modules import Modules
from quantkit.model.expert_layout import is_transposed
from quantkit.model.experts import FIRST, LAST, Experts

_WRAPPER = ".base_layer"


def separate(adapter: Adapter, modules: Modules) -> None:
    """Give each expert's linears, in ``adapter.parts``, their own parts of what is for all.

    Raises InputError for what isn't a LoRA of experts' matrices, by its key.
    """
    parts: dict[str, Part] = {}
    for name, part in adapter.parts.items():
        if part.a is None or part.b is None:
            if name.rpartition(".")[0] in modules.experts:
                raise InputError(
                    f"tensor {part.replaced} replaces what all experts of a layer have in "
                    f"{name}, which can't be merged",
                    where=str(adapter.files[0]),
                )
            parts[name] = part
            continue
        module = name.removesuffix(".weight")
        while module.endswith(_WRAPPER):
            module = module.removesuffix(_WRAPPER)
        depth = (len(name.removesuffix(".weight")) - len(module)) // len(_WRAPPER)
        module = modules.find_module(module)
        targeted = [
            leaf
            for leaf in modules.parameters_of(module)
            if adapter.lora.targets_parameter(f"{module}.{leaf}")
        ]
        if not targeted and not depth and module not in modules.experts:
            parts[name] = part  # of target_modules
            continue
        if depth >= len(targeted):
            raise InputError(
                f"holds {part.a}, but its target_parameters name {_counted(targeted)} of {module}",
                subject=str(adapter.files[0]),
                fix=f"Do {CONFIG_FILE} and the tensors belong together?",
            )
        leaf = targeted[len(targeted) - 1 - depth]
        parameter = f"{module}.{leaf}"
        experts = modules.experts.get(module)
        if experts is not None and leaf in (*FIRST, LAST):
            parts |= _Stack(adapter, parameter, part, experts).parts(module, leaf)
        elif experts is None and leaf == "weight":
            parts[parameter] = replace(part, of=parameter)
        else:
            raise InputError(
                f"tensor {part.a} is LoRA on {parameter}, which is neither a linear's weight nor "
                "the matrices of a layer's experts, so it can't be merged",
                where=str(adapter.files[0]),
            )
    adapter.parts = parts


def _counted(leaves: list[str]) -> str:
    return f"only {', '.join(leaves)}" if leaves else "none"


@dataclass(frozen=True)
class _Stack:
    """The factors of all experts of one parameter."""

    adapter: Adapter
    parameter: str
    part: Part
    experts: Experts

    def parts(self, module: str, leaf: str) -> dict[str, Part]:
        """The parts of each expert's linears, by the names of their weights.

        Raises InputError where the factors' shapes aren't those of such parameters.
        """
        a, b = self.part.a or "", self.part.b or ""
        pieces = self.experts.pieces
        swapped = self._swapped(a, b, leaf)
        cut = partial(self.adapter.slice, count=len(pieces))
        result = {}
        for number, parameters in enumerate(pieces):
            for piece in parameters[leaf]:
                rows = piece.rows
                if swapped:
                    own = Part(
                        a=cut(b, number, interleaved=True, transposed=True),
                        b=cut(a, number, interleaved=False, transposed=True, rows=rows),
                    )
                else:
                    own = Part(
                        a=cut(a, number, interleaved=False),
                        b=cut(b, number, interleaved=True, rows=rows),
                    )
                own.of = self.parameter
                result[f"{module}.{number}.{piece.leaf}.weight"] = own
        return result

    def _swapped(self, a: str, b: str, leaf: str) -> bool:
        """Whether A is of the outputs and B of the inputs.

        That is how PEFT takes a parameter that is stored (in, out) by a module which doesn't say
        so, and how its first versions took those that are stored (out, in).
        """
        count = len(self.experts.pieces)
        rank = self.adapter.lora.rank_of(self.parameter)
        linears = [self.experts.get_submodule(f"0.{p.leaf}") for p in self.experts.pieces[0][leaf]]
        shapes = [tuple(linear.get_parameter("weight").shape) for linear in linears]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        usual = (count * rank, inputs), (outputs, rank * count)
        other = (count * rank, outputs), (inputs, rank * count)
        found = self.adapter.shape(a), self.adapter.shape(b)
        if found not in (usual, other):
            raise InputError(
                f"{a} and {b} have the shapes {found[0]} and {found[1]}; LoRA of rank {rank} on "
                f"{self.parameter}, {count} experts of {outputs} × {inputs}, has {usual[0]} and "
                f"{usual[1]}",
                where=str(self.adapter.files[0]),
                fix="It was trained for another base.",
            )
        if usual != other:
            return found == other
        whole: Any = self.experts.original
        stored = is_transposed(dict(whole.named_parameters(recurse=False)))
        return stored != bool(getattr(whole, "is_transposed", False))
