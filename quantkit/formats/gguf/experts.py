"""Which keys of a checkpoint the experts have that GGUF stacks."""

from __future__ import annotations

from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.model.experts import LAST, Experts
from quantkit.model.skeleton import Skeleton


def expert_keys(skeleton: Skeleton, architecture: Architecture) -> dict[str, str]:
    """The checkpoint's keys of all experts' tensors, by those that ``architecture`` describes."""
    stacked = {m.stored.split("_")[1]: m.name for m in architecture.modules if "*" in m.name}
    found = {}
    for layer in range(len(skeleton.layers)):
        for name, experts in skeleton.experts(layer).items():
            for number in range(len(experts.pieces)):
                expert = f"{skeleton.layer_name(layer)}.{name}.{number}"
                for role, leaf in _leaves(experts, number).items():
                    described = stacked.get(role, "").replace("*", str(number))
                    for part in ("weight", "bias"):
                        key = skeleton.names.get(f"{expert}.{leaf}.{part}")
                        if key is not None:
                            found[f"{architecture.blocks}.{layer}.{described}.{part}"] = key
    return found


def _leaves(experts: Experts, number: int) -> dict[str, str]:
    """An expert's linears by what they are in GGUF: gate, where it has one, up and down."""
    # Of gate and up in one parameter, the gate has the first row.
    first = sorted(experts.pieces[number][experts.first], key=lambda piece: piece.rows.start or 0)
    roles = ("gate", "up") if len(first) == 2 else ("up",)
    leaves = {role: piece.leaf for role, piece in zip(roles, first, strict=True)}
    return leaves | {"down": experts.pieces[number][LAST][0].leaf}
