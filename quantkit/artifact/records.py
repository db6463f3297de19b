"""What a manifest records of an artifact's recipe, source, adapters, calibration and layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.artifact.machine import library_versions
from quantkit.base.files import digests
from quantkit.base.version import __version__
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import more_templates
from quantkit.lora.adapter import Adapter
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.lora.config import CONFIG_FILE
from quantkit.plan.base import Plan
from quantkit.recipes.recipe import Recipe
from quantkit.results.manifest import (
    AdapterRecord,
    BitsPerWeight,
    CalibrationRecord,
    Fates,
    FileRecord,
    LayerReport,
    QuantizedManifest,
    RecipeRecord,
    SourceRecord,
    Summary,
)

_WEIGHT_FILES = (".safetensors", ".gguf")


def quantized_manifest(
    directory: Path,
    *,
    recipe: Recipe,
    source: Checkpoint,
    source_files: dict[str, str],
    rows: Rows | None,
    plan: Plan,
    layers: Sequence[LayerReport],
    tensors: Fates | None,
) -> QuantizedManifest:
    """The manifest of the finished artifact in ``directory``.

    source: the checkpoint, with its adapters if it has any; source_files: its
    ``checkpoint_digests``; rows: of the calibration text; layers: the method's reports; tensors:
    what became of the checkpoint's, where that is known.
    """
    nbytes = weights_bytes(directory)
    weights = sum(tensor.weights for tensor in plan.tensors)
    adapters = source.adapters if isinstance(source, AdaptedCheckpoint) else []
    return QuantizedManifest(
        quantkit=__version__,
        recipe=_recipe(recipe),
        source=SourceRecord(source_files),
        adapters=tuple(record_adapter(adapter) for adapter in adapters),
        calibration=_calibration(recipe, rows),
        method=plan.method,
        format=plan.format,
        parameters=weights,
        weights_bytes=nbytes,
        bits_per_weight=BitsPerWeight(8 * nbytes / weights, plan.quantized_bits_per_weight),
        layers=tuple(layers),
        summary=_summary(layers),
        libraries=library_versions(),
        files=record_files(directory),
        tensors=tensors,
        kept=plan.kept,
    )


def record_adapter(adapter: Adapter) -> AdapterRecord:
    """An adapter that is folded into a checkpoint, with the digests of its files."""
    return AdapterRecord(
        name=adapter.name,
        weight=adapter.weight,
        base=adapter.lora.base,
        rank=adapter.lora.rank,
        alpha=adapter.lora.alpha,
        files=checkpoint_digests(adapter),
    )


def record_files(directory: Path) -> dict[str, FileRecord]:
    """Every file of a finished directory, by its path in it."""
    own = sorted(path for path in directory.iterdir() if path.is_file())
    files = [*own, *more_templates(directory).values()]
    return {
        name: FileRecord((directory / name).stat().st_size, sha256)
        for name, sha256 in digests(files, directory).items()
    }


def weight_files(directory: Path) -> list[Path]:
    """The weight files in a directory."""
    return [path for path in directory.iterdir() if path.suffix in _WEIGHT_FILES]


def weights_bytes(directory: Path) -> int:
    """Size of the weight files in a directory."""
    return sum(path.stat().st_size for path in weight_files(directory))


def checkpoint_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the weights and the config of a checkpoint or an adapter, by file name."""
    configs = [checkpoint.directory / name for name in ("config.json", CONFIG_FILE)]
    return digests(sorted([*filter(Path.is_file, configs), *checkpoint.files]))


def _recipe(recipe: Recipe) -> RecipeRecord:
    content = recipe.model_dump(mode="json", by_alias=True)
    return RecipeRecord(recipe.name, recipe.version, recipe.digest, content)


def _calibration(recipe: Recipe, rows: Rows | None) -> CalibrationRecord | None:
    settings = recipe.calibration
    if settings is None or rows is None:
        return None
    return CalibrationRecord(
        dataset_sha256=rows.digest,
        rows=rows.count,
        rows_wanted=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        beginning=rows.beginning,
    )


def _summary(layers: Sequence[LayerReport]) -> Summary:
    factorizes = any(layer.damping is not None for layer in layers)
    scales = any(layer.scaled is not None for layer in layers)
    return Summary(
        layers=len(layers),
        not_factorized=tuple(layer.name for layer in layers if layer.damping is None)
        if factorizes
        else None,
        scaled=sum(bool(layer.scaled) for layer in layers) if scales else None,
        not_scaled=tuple(layer.name for layer in layers if not layer.scaled) if scales else None,
    )
