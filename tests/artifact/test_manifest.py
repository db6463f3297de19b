"""The manifests: read as they were written, also by earlier versions, or refused by their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.artifact.manifest import read_manifest, read_run, write_manifest
from quantkit.base.errors import InputError
from quantkit.base.files import read_json
from quantkit.reports.files import read_comparison
from quantkit.results.manifest import MANIFEST, RUN, Manifest, MergedManifest, QuantizedManifest
from tests.helpers import manifests

BEFORE = Path(__file__).parent.parent / "data" / "before"  # written by version 0.1.0
ARTIFACTS = sorted(path.name for path in BEFORE.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_an_earlier_version_wrote_is_written_again_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    manifest, run = read_manifest(BEFORE / name), read_run(BEFORE / name)
    assert manifest is not None and run is not None
    write_manifest(tmp_path, manifest, run)
    for file in (MANIFEST, RUN):
        assert (tmp_path / file).read_bytes() == (BEFORE / name / file).read_bytes()


def test_quantizing_and_merging_have_manifests_of_their_own() -> None:
    quantized, merged = read_manifest(BEFORE / "adapted"), read_manifest(BEFORE / "merged")
    assert isinstance(quantized, QuantizedManifest) and isinstance(merged, MergedManifest)
    assert quantized.recipe.name == "awq-w4-g128" and quantized.calibration is not None
    assert merged.proof is not None and merged.proof.difference < merged.proof.limit
    assert quantized.adapters == merged.adapters


@pytest.mark.parametrize("manifest", [manifests.sample_manifest(), manifests.sample_merge()])
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest, tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest, manifests.RUN)
    assert read_manifest(tmp_path) == manifest
    assert read_run(tmp_path) == manifests.RUN


def test_a_plain_checkpoint_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None and read_run(tmp_path) is None


def change(directory: Path, **changes: Any) -> None:
    value = read_json(BEFORE / "awq" / MANIFEST) | changes
    kept = {key: item for key, item in value.items() if item is not ...}
    (directory / MANIFEST).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"schema": 2}, "schema is 2, and this version reads 1"),
        ({"schema": ...}, "schema is None, and this version reads 1"),
        ({"recipe": ...}, "recipe is missing"),
        ({"source": {}}, "source.files is missing"),
        ({"weights_bytes": "many"}, "weights_bytes is 'many': input should be a valid integer"),
        ({"layers": [{"name": "a"}]}, "layers.0.scheme is missing"),
        ({"method": "merge"}, "dtype is missing"),
    ],
)
def test_a_damaged_manifest_is_refused_by_file_and_key(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    change(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / MANIFEST)
    assert caught.value.what.startswith(what) and caught.value.fix


def test_a_key_of_a_later_version_is_left_out(tmp_path: Path) -> None:
    change(tmp_path, later=1)
    assert read_manifest(tmp_path) == read_manifest(BEFORE / "awq")


def test_a_comparison_of_an_earlier_version_is_read_with_its_manifests(tmp_path: Path) -> None:
    path = BEFORE / "comparison.json"
    comparison = read_comparison(path)
    awq = comparison.variants[0]
    assert isinstance(awq.manifest, QuantizedManifest) and awq.run is not None
    assert awq.manifest.recipe.name == "awq-w4-g128" and awq.run.model == "demo"
    written = comparison.to_json()["variants"][0]
    before = read_json(path)["variants"][0]
    assert (written["manifest"], written["run"]) == (before["manifest"], before["run"])


def test_a_damaged_manifest_in_a_comparison_is_refused_by_its_key(tmp_path: Path) -> None:
    value = read_json(BEFORE / "comparison.json")
    del value["variants"][1]["manifest"]["recipe"]["digest"]
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"variants\.1\.manifest\.recipe\.digest is missing"):
        read_comparison(path)
