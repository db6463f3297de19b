"""The manifests: what quantkit.json and run.json beside an artifact's weights hold.

A manifest has nothing that changes from run to run, so that the same inputs give the same bytes;
dates, timings and the machine are in run.json, outside every digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Discriminator, Tag

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MANIFEST = "quantkit.json"
RUN = "run.json"
SCHEMA = 1
# What manifests of earlier versions lack.
_LATER = ("tensors", "kept")
MERGE = "merge"  # the method of a merged checkpoint


@dataclass(frozen=True)
class RecipeRecord:
    """The recipe that an artifact was made by. content: all of it, defaults included."""

    name: str
    version: str
    digest: str
    content: dict[str, Any]


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that an artifact was made of. files: sha256 by name."""

    files: dict[str, str]


@dataclass(frozen=True)
class AdapterRecord:
    """A LoRA adapter that was folded in. base: the model that its config names; files: sha256."""

    name: str
    weight: float
    base: str | None
    rank: int
    alpha: float
    files: dict[str, str]


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that an artifact was calibrated on, and how many rows of it.

    rows_wanted: what the recipe asked for; the text may have had fewer; beginning: the tokens that
    the tokenizer puts before a text, and with which every row begins; None where the recipe didn't
    ask for it.
    """

    dataset_sha256: str
    rows: int
    rows_wanted: int
    sequence_length: int
    seed: int
    beginning: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_none(_json(self))


@dataclass(frozen=True)
class BitsPerWeight:
    """file: of the weight files over all weights; quantized: of the quantized tensors alone.

    quantized: None where no tensor is.
    """

    file: float
    quantized: float | None


@dataclass(frozen=True)
class LayerReport:
    """How well one linear was quantized.

    error: squared output error over squared output on the calibration tokens
    (``measured_on: outputs``), or squared weight error over squared weight (``weights``).
    weighted_error: the latter, with every input feature weighted by its importance.
    damping: gptq's; None where the Hessian couldn't be factorized and the codes are the nearest.
    scaled: whether awq or smoothquant rescaled the linear's input.
    tokens: how many calibration tokens were routed to the expert whose linear it is; all_tokens:
    whether they were too few, so that the linear was measured on all tokens instead.
    """

    name: str
    scheme: str
    error: float
    measured_on: str
    weighted_error: float | None = None
    damping: float | None = None
    scaled: bool | None = None
    tokens: int | None = None
    all_tokens: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_none(_json(self))


@dataclass(frozen=True)
class Summary:
    """The layers, counted. None: the method doesn't factorize, or doesn't scale.

    not_factorized, not_scaled: names; scaled: how many were.
    """

    layers: int
    not_factorized: tuple[str, ...] | None = None
    scaled: int | None = None
    not_scaled: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return _without_none(_json(self))


@dataclass(frozen=True)
class Fate:
    """Tensors of the checkpoint that the same became of. names: with a star for each number."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Fates:
    """What became of every tensor of the checkpoint.

    rescaled: kept, but multiplied by a scale; copied: kept byte for byte; unused: kept so too, and
    not needed for text (towers for images, heads for more than one token); left_out: not in the
    artifact, because --text-only asked for that, or GGUF holds no such thing.
    """

    quantized: Fate
    rescaled: Fate
    copied: Fate
    unused: Fate
    left_out: Fate = Fate(0, ())


@dataclass(frozen=True)
class MergeFates:
    """What became of every tensor of a merged checkpoint: changed by an adapter, or copied."""

    changed: Fate
    copied: Fate


@dataclass(frozen=True)
class FileRecord:
    """A file of an artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class QuantizedManifest:
    """quantkit.json of an artifact that a recipe made.

    quantkit: the version that made it; calibration: None where the method needs none;
    parameters: weights of the model; weights_bytes: size of the weight files; libraries: their
    versions; files: all but run.json and the manifest itself; tensors: what became of the
    checkpoint's, None in older manifests; kept: why linears that the recipe doesn't leave out
    weren't quantized, by name.
    """

    schema: ClassVar[int] = SCHEMA

    quantkit: str
    recipe: RecipeRecord
    source: SourceRecord
    adapters: tuple[AdapterRecord, ...]
    calibration: CalibrationRecord | None
    method: str
    format: str
    parameters: int
    weights_bytes: int
    bits_per_weight: BitsPerWeight
    layers: tuple[LayerReport, ...]
    summary: Summary
    libraries: dict[str, str]
    files: dict[str, FileRecord]
    tensors: Fates | None = None
    kept: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.schema,
            **{name: value for name, value in _json(self).items() if name not in _LATER or value},
            "calibration": self.calibration.to_json() if self.calibration else None,
            "layers": [layer.to_json() for layer in self.layers],
            "summary": self.summary.to_json(),
        }


@dataclass(frozen=True)
class VocabularyRecord:
    """Rows of the merged embedding. resized: whether the base has another number of them."""

    rows: int
    resized: bool


@dataclass(frozen=True)
class MergeProof:
    """How far a merge is from what its adapters do at run time, on ``rows`` × ``tokens`` inputs.

    difference: of the logits of the float32 merge from those of base and adapter at run time,
    ‖Δ‖ / ‖logits‖ of the token where it is largest; kl: mean KL(float32 merge ‖ stored), in nats;
    limit: the largest difference that was accepted.
    """

    difference: float
    kl: float
    rows: int
    tokens: int
    limit: float


@dataclass(frozen=True, kw_only=True)
class MergedManifest:
    """quantkit.json of a checkpoint with LoRA adapters merged into it; no recipe made it.

    dtype: None where the base's config has none; dequantized_base: whether the base was packed;
    changed_tensors: how many the adapters changed; untied: whether embeddings that were tied are
    stored apart; proof: None where it was left out; tensors: what became of each.
    """

    schema: ClassVar[int] = SCHEMA

    quantkit: str
    source: SourceRecord
    adapters: tuple[AdapterRecord, ...]
    method: str
    format: str
    dtype: str | None
    dequantized_base: bool
    parameters: int
    weights_bytes: int
    changed_tensors: int
    untied: bool
    vocabulary: VocabularyRecord
    warnings: tuple[str, ...]
    proof: MergeProof | None
    libraries: dict[str, str]
    files: dict[str, FileRecord]
    tensors: MergeFates | None = None

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in _json(self).items() if name != "tensors" or value}
        return {"schema": self.schema, **values}


def _tag(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<merged>" if value.get("method") == MERGE else "<quantized>"
    return "<merged>" if isinstance(value, MergedManifest) else "<quantized>"


Manifest = Annotated[
    Annotated[QuantizedManifest, Tag("<quantized>")] | Annotated[MergedManifest, Tag("<merged>")],
    Discriminator(_tag),
]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """run.json: when, where and how long an artifact was made.

    model: what was named on the command line; recipe: the path of its file, None for a merge;
    adapters: the directories of what was merged; finished: UTC, ISO 8601.
    """

    model: str
    recipe: str | None = None
    adapters: tuple[str, ...] | None = None
    device: str
    finished: str
    seconds: float
    machine: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return _without_none(_json(self))


def _json(record: DataclassInstance) -> dict[str, Any]:
    """A record as its file has it, with lists for tuples."""
    values: dict[str, Any] = _lists(asdict(record))
    return values


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
