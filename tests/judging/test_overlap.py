"""Overlap of a suite with calibration text is reported, and refused unless it is allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.artifact.manifest import write_manifest
from quantkit.base import resources
from quantkit.base.errors import InputError
from quantkit.commands.suite_check import check_suite
from quantkit.documents.dataset import Document, digest_of
from quantkit.judging.overlap import calibration_of, check_overlap, find_overlaps
from quantkit.recipes.recipe import load_recipe, shipped_recipes
from quantkit.recipes.suite import load_suite
from quantkit.results.manifest import RunRecord
from tests.helpers.manifests import RUN, sample_manifest

WORDS = [f"word{number}" for number in range(13)]


def documents(*texts: str) -> list[Document]:
    return [Document(f"text:{number}", text) for number, text in enumerate(texts, 1)]


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not() -> None:
    run = " ".join(WORDS)
    calibration = documents(f"Before, {run.upper()}!? After.")
    (found,) = find_overlaps(documents("nothing here", f"other {run} words"), calibration)
    assert (found.where, found.calibration, found.shared) == ("text:2", "text:1", 1)
    assert found.words == run
    assert find_overlaps(documents(" ".join(WORDS[:12]) + " fourteen"), calibration) == []


def test_runs_do_not_cross_documents_and_tags_are_no_words() -> None:
    half, rest = " ".join(WORDS[:6]), " ".join(WORDS[6:])
    assert find_overlaps(documents(f"{half} {rest}"), documents(half, rest)) == []
    tagged = Document("chat", f"<|user|>\n{half}<|end|>\n<|assistant|>\n{rest}<|end|>\n")
    chat = [{"role": "user", "content": half}, {"role": "assistant", "content": rest}]
    assert len(find_overlaps([tagged], [Document("m", chat)])) == 1


def test_short_documents_overlap_when_they_are_the_same() -> None:
    calibration = documents("What does the owl eat?", "yes")
    assert len(find_overlaps(documents("what does the owl eat"), calibration)) == 1
    assert find_overlaps(documents("What does the owl eat now?", "Yes"), calibration) == []


def test_text_without_spaces_has_a_word_a_character() -> None:
    text = "黒い猫は静かに庭を歩いています"
    assert len(find_overlaps(documents(f"昔{text}"), documents(f"今{text}"))) == 1


@pytest.mark.parametrize("suite", sorted(p.stem for p in resources.suites().glob("*.yaml")))
def test_shipped_suites_hold_no_calibration_text(suite: str) -> None:
    world = f"calibration.dataset={resources.calibration() / 'demo-world-v1.jsonl'}"
    loaded = load_suite(suite)
    recipes = [*shipped_recipes(), load_recipe("gptq-w4-g128", [world])]
    found = check_suite(loaded, recipes, allow_code=False)
    assert found.problems == ()
    assert sum("no overlap with" in note for note in found.notes) >= 8


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The manifest and run.json of an artifact that was calibrated on text.txt."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS))
    place = tmp_path / "artifact"
    place.mkdir()
    write_calibrated(place, "text.txt", text, replace(RUN, recipe=str(tmp_path / "recipe.yaml")))
    return place


def write_calibrated(place: Path, name: str, text: Path, run: RunRecord) -> None:
    """Beside an artifact's weights: a recipe that names ``name``, and the digest of ``text``."""
    manifest = sample_manifest()
    assert manifest.calibration is not None
    recipe = replace(manifest.recipe, content={"calibration": {"dataset": name}})
    calibration = replace(manifest.calibration, dataset_sha256=digest_of(text))
    manifest = replace(manifest, recipe=recipe, calibration=calibration)
    write_manifest(place, manifest, run)


def test_an_artifact_is_not_judged_on_what_it_has_seen(artifact: Path) -> None:
    assert calibration_of(artifact) == artifact.parent / "text.txt"
    judged = documents("another text", "well: " + " ".join(WORDS))
    with pytest.raises(InputError) as caught:
        check_overlap({"artifact": artifact}, judged, allow=False)
    assert str(caught.value).startswith(f"{artifact}: 1 of the suite's 2 texts overlap")
    assert "text:2 shares a run of words" in str(caught.value)
    assert caught.value.fix is not None and "--allow-overlap" in caught.value.fix
    (said,) = check_overlap({"artifact": artifact}, judged, allow=True)
    assert said == (
        "artifact: 1 of the suite's 2 texts overlap with its calibration text; "
        "its figures may flatter it."
    )
    assert check_overlap({"artifact": artifact}, judged[:1], allow=False) == []


def test_an_overlap_that_can_not_be_checked_is_a_remark(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("changed")
    (said,) = check_overlap({"artifact": artifact}, [], allow=False)
    assert said == (
        "artifact was calibrated on text.txt, which is missing or has changed since: "
        "overlap with the suite wasn't checked."
    )
    (artifact / "quantkit.json").unlink()
    (said,) = check_overlap({"artifact": artifact}, [], allow=False)
    assert "has no manifest" in said


def test_shipped_text_is_found_where_the_run_is_unknown(artifact: Path) -> None:
    name = "general-v1.jsonl"
    write_calibrated(artifact, f"../calibration/{name}", resources.calibration() / name, RUN)
    (artifact / "run.json").unlink()
    assert calibration_of(artifact) == resources.calibration() / name
