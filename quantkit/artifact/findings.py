"""The results of inspect and verify: frozen dataclasses that become JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.formats.format import Loading
from quantkit.plan.base import Plan


@dataclass(frozen=True)
class Facts:
    """What an artifact's files tell about it.

    format: with its variant, such as ``gptq (v2)``; producer, method: None where no file names
    them; plan: every tensor's scheme and size; files_bytes: size of the weight files; dtypes:
    bytes by the dtype they are stored in; tokenizer: special tokens, and the chat template's
    length and digest; metadata: a GGUF file's, with long lists replaced by their length;
    provenance: the manifest's part about where the artifact comes from, None without a manifest.
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
        """Number of weights."""
        return sum(tensor.weights for tensor in self.plan.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the weight files, metadata included, over the number of weights."""
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
    """One check of an artifact. passed: None where there was nothing to compare it with."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of an artifact. engine: that it ran in."""

    path: str
    baseline: str | None
    engine: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}
