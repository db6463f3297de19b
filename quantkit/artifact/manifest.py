"""Reading and writing quantkit.json and run.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from quantkit.artifact.machine import now, system
from quantkit.base.errors import InputError
from quantkit.base.files import read_json, write_json
from quantkit.base.typed import typed
from quantkit.results.manifest import (
    MANIFEST,
    MERGE,
    RUN,
    SCHEMA,
    Manifest,
    MergedManifest,
    QuantizedManifest,
    RunRecord,
)


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of an artifact; None for a directory without one (a plain checkpoint).

    Raises InputError that names file and key for one that is damaged, or of a schema that this
    version doesn't know.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    value = read_json(path)
    if value.get("schema") != SCHEMA:
        raise InputError(
            f"schema is {value.get('schema')!r}, and this version reads {SCHEMA}",
            where=str(path),
            fix="Make the artifact again, or read it with the version of QuantKit that made it.",
        )
    fix = "The file is damaged: make the artifact again."
    if value.get("method") == MERGE:
        return typed(MergedManifest, value, str(path), fix=fix)
    return typed(QuantizedManifest, value, str(path), fix=fix)


def read_run(directory: Path) -> RunRecord | None:
    """Read run.json; None where there is none. Raises InputError for one that is damaged."""
    path = directory / RUN
    return typed(RunRecord, read_json(path), str(path)) if path.is_file() else None


def write_manifest(directory: Path, manifest: Manifest, run: RunRecord) -> None:
    """Write both files into a finished directory."""
    write_json(directory / MANIFEST, manifest.to_json())
    write_json(directory / RUN, run.to_json())


def run_record(
    started: float,
    *,
    model: str,
    device: str,
    recipe: str | None = None,
    adapters: Sequence[str] | None = None,
) -> RunRecord:
    """The record of a run that ends now, on this machine. started: monotonic seconds."""
    return RunRecord(
        model=model,
        recipe=recipe,
        adapters=None if adapters is None else tuple(adapters),
        device=device,
        finished=now(),
        seconds=round(time.monotonic() - started, 2),
        machine=system(),
    )
