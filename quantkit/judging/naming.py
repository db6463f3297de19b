"""The name of each model in a comparison: one of its own, the same in every report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from quantkit.artifact.manifest import read_manifest
from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.source import folder_name, hub_snapshot
from quantkit.formats.packed import open_artifact
from quantkit.results.manifest import QuantizedManifest

_DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
_BESIDE = ("", " + adapter", " vs FP32", " base", " GGUF")


def dtype_label(baseline: Checkpoint) -> str:
    """The baseline's name in a table, which is that of its dtype: BF16."""
    config = baseline.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return _DTYPES.get(dtype, dtype)


def artifact_name(path: Path) -> str:
    """An artifact's name by itself: its recipe's, or that of its directory or file."""
    manifest = read_manifest(path)
    return manifest.recipe.name if isinstance(manifest, QuantizedManifest) else folder_name(path)


def named_artifacts(artifacts: Sequence[Path], baseline: Checkpoint | None) -> dict[str, Path]:
    """The artifacts by their names, which neither another one nor a row of the baseline has.

    A name is the artifact's own or, where that isn't unique, the shortest end of its path that is:
    ``out``, or else ``monday/out``.

    Raises InputError where two paths are of the same artifact.
    """
    _check_given_once(artifacts)
    names = [artifact_name(path) for path in artifacts]
    parts = [_parts(path) for path in artifacts]
    reserved = [] if baseline is None else [dtype_label(baseline) + text for text in _BESIDE]
    shown = [0] * len(artifacts)  # parts of the path that a name consists of; 0: it is its own
    while True:
        counts = Counter([*names, *reserved])
        longer = [
            index
            for index, name in enumerate(names)
            if counts[name] > 1 and shown[index] < len(parts[index])
        ]
        if not longer:
            return dict(zip(names, artifacts, strict=True))
        for index in longer:
            shown[index] += 1
            names[index] = "/".join(parts[index][-shown[index] :])


def _parts(path: Path) -> list[str]:
    """The parts of an absolute path; the last one names model and commit of a Hub's snapshot."""
    # Links stay as they were written, unless ".." follows one.
    whole = path.resolve() if ".." in path.parts else path.absolute()
    parts = [part.strip("/") for part in whole.parts]
    return [*parts[:-1], hub_snapshot(whole) or parts[-1]]


def _check_given_once(artifacts: Sequence[Path]) -> None:
    """Raise InputError where an artifact is given twice, whatever its paths are called."""
    given: dict[tuple[Path, ...], Path] = {}
    for path in artifacts:
        # A directory and the file in it are one artifact. Files themselves stay unresolved, since
        # those of two snapshots in the Hub's cache may be links to the same bytes.
        files = tuple(file.parent.resolve() / file.name for file in open_artifact(path).files)
        if files in given:
            other = given[files]
            also = "" if other == path else f", also as {other}"
            raise InputError(
                f"is given twice{also}", subject=str(path), fix="Name each artifact once."
            )
        given[files] = path
