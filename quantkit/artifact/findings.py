"""What is known of an artifact, and what was checked of it: dataclasses that become JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.formats.format import Loading
from quantkit.plan.base import Plan


@dataclass(frozen=True)
class Facts:
    """What an artifact says of itself.

    format: with its variant, such as ``gptq (v2)``; producer and method: None where nothing says
    so; plan: every tensor's scheme and size; files_bytes: of the weight files; dtypes: as stored →
    bytes; tokenizer: what its files say; metadata: of a GGUF file, long lists as their length;
    provenance: of the manifest, None without one.
    """

    path: str
    format: str
    method: str | None
    producer: str | None
    plan: Plan
    files: tuple[str, ...]
    files_bytes: int
    dtypes: dict[str, int]
    engines: tuple[Loading, ...]
    tokenizer: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None

    @property
    def parameters(self) -> int:
        return sum(tensor.weights for tensor in self.plan.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the weight files, over all weights."""
        return 8 * self.files_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "method": self.method,
            "producer": self.producer,
            "parameters": self.parameters,
            "files": list(self.files),
            "files_bytes": self.files_bytes,
            "bits_per_weight": {
                "file": self.bits_per_weight,
                "quantized": self.plan.quantized_bits_per_weight,
            },
            "dtypes": self.dtypes,
            "groups": self.plan.to_json()["groups"],
            "engines": [asdict(engine) for engine in self.engines],
            "tokenizer": self.tokenizer,
            "metadata": self.metadata,
            "provenance": self.provenance,
        }


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. passed: None where there was nothing to hold it against."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of an artifact."""

    path: str
    baseline: str | None
    engine: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}
