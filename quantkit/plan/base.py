"""A plan: the scheme and size of every tensor of an artifact, and what to print of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from quantkit.base.names import starred

FLOATS = ("F32", "F16", "BF16")  # ggml's types that aren't quantized


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor: name, shape as in the checkpoint, scheme to read, bytes on disk."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    nbytes: int
    quantized: bool

    @property
    def weights(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class PlanRow:
    """Tensors that differ only in their layer, taken together."""

    name: str
    scheme: str
    count: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """0 for tensors without elements, which checkpoints may hold."""
        return 8 * self.nbytes / max(self.weights, 1)


@dataclass(frozen=True)
class Plan:
    """All tensors of an artifact.

    notes: sentences for people on what the artifact won't be able to do, known before work starts;
    kept: why linears that the recipe doesn't leave out aren't quantized, by full module name.
    """

    method: str
    format: str
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    kept: dict[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights."""
        return 8 * self.nbytes / sum(tensor.weights for tensor in self.tensors)

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Over the weights that are quantized."""
        chosen = [tensor for tensor in self.tensors if tensor.quantized]
        if not chosen:
            return None
        return 8 * sum(t.nbytes for t in chosen) / sum(t.weights for t in chosen)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "format": self.format,
            "bytes": self.nbytes,
            "bits_per_weight": {
                "file": self.bits_per_weight,
                "quantized": self.quantized_bits_per_weight,
            },
            "groups": [
                {**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.rows()
            ],
            "notes": list(self.notes),
            "kept": self.kept,
        }

    def rows(self) -> list[PlanRow]:
        """One row for each name (layer numbers as ``*``) and scheme, in order of appearance."""
        groups: dict[tuple[str, str], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            groups.setdefault((starred(tensor.name), tensor.scheme), []).append(tensor)
        return [
            PlanRow(name, scheme, len(ts), sum(t.weights for t in ts), sum(t.nbytes for t in ts))
            for (name, scheme), ts in groups.items()
        ]
