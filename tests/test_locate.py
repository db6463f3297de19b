"""Where quality is lost: the harmed layer comes first, and the patch mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.resources import demo_model, suites

HARMED = 2
SUITE = """
schema: 1
name: short
version: 1.0.0
likelihood: {{dataset: {dataset}, sequence_length: 256, rows: 12}}
gates:
  - {{metric: kl_divergence.mean, max: {bound}}}
"""


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def harmed(tmp_path_factory) -> Path:
    """The demo, computing what it did, with weights of one linear that no grid of 4 bits holds.

    A row of up_proj is divided and the column of down_proj that reads it multiplied, by a power of
    two: exact in BF16. One such column in every group of 128 spoils the scales of all groups.
    """
    model = Path(shutil.copytree(demo_model(), tmp_path_factory.mktemp("harmed") / "model"))
    file = model / "model.safetensors"
    weights = load_file(file)
    mlp = f"model.layers.{HARMED}.mlp"
    columns = torch.arange(0, 512, 128)
    weights[f"{mlp}.up_proj.weight"][columns] /= 64
    weights[f"{mlp}.down_proj.weight"][:, columns] *= 64
    save_file(weights, file, metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "short.yaml"
    path.write_text(SUITE.format(dataset=suites() / "demo-heldout.jsonl", bound=0.01))
    return path


@pytest.fixture(scope="module")
def broken(harmed, tmp_path_factory) -> Path:
    """The harmed demo by plain rounding."""
    out = tmp_path_factory.mktemp("broken") / "rtn"
    assert run("quantize", "rtn-w4-g128", "--model", harmed, "--out", out).exit_code == 0
    return out


def judged(artifact: Path, model: Path, suite: Path, *more: object) -> tuple[int, dict]:
    """Exit code, and the artifact's row of the comparison."""
    done = run("eval", artifact, "--baseline", model, "--suite", suite, "--json", *more)
    assert done.exit_code in (0, 1), done.output
    (row,) = json.loads(done.stdout)["variants"]
    return done.exit_code, row


def test_the_patch_turns_fail_into_pass(harmed, broken, suite, tmp_path):
    code, row = judged(broken, harmed, suite, "--out", tmp_path / "eval.json")
    assert code == 1 and row["verdict"] == "FAIL"
    found = row["localisation"]
    worst, *others = found["places"]
    assert worst["modules"] == [f"model.layers.{HARMED}.mlp.down_proj"]
    assert worst["error"] > 10 * others[0]["error"]
    assert found["kl_divergence"] == pytest.approx(row["quality"]["kl_divergence"]["mean"])
    measured = [p["kl_divergence"] for p in found["places"]]
    assert None not in measured[:5] and set(measured[5:]) == {None}
    assert measured[0] < 0.2 * min(measured[1:5])

    patch = found["patch"]
    assert patch["changes"] == [{"match": worst["modules"][0], "skip": True}]
    assert patch["mends"] is True
    assert patch["predicted"] == {"kl_divergence.mean": pytest.approx(measured[0])}
    mended = tmp_path / "rtn-w4-g128-mended.yaml"
    done = run("quantize", mended, "--model", harmed, "--out", tmp_path / "mended")
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "mended" / "quantkit.json").read_text())
    assert (manifest["recipe"]["name"], manifest["recipe"]["version"]) == (mended.stem, "1.1.0")
    before = json.loads((broken / "quantkit.json").read_text())["weights_bytes"]
    assert manifest["weights_bytes"] - before == pytest.approx(patch["added_bytes"], rel=0.01)

    code, row = judged(tmp_path / "mended", harmed, suite)
    assert code == 0 and row["verdict"] == "PASS" and row["localisation"] is None
    reached = row["quality"]["kl_divergence"]["mean"]
    assert reached == pytest.approx(patch["predicted"]["kl_divergence.mean"], rel=0.01)


def test_what_people_see(harmed, broken, suite, tmp_path):
    arguments = ("compare", broken, "--baseline", harmed, "--suite", suite, "--no-bench")
    done = run(*arguments, "--out", tmp_path / "told")
    assert done.exit_code == 1
    text = (tmp_path / "told" / "comparison.md").read_text()
    place = f"model.layers.{HARMED}.mlp.down_proj"
    for said in (" ".join(done.stdout.split()), " ".join(text.split())):
        assert f"match: {place} skip: true" in said
        assert "KL divergence predicted 0.00" in said and "1 weight, +0.19 MB" in said
    assert "## Where rtn-w4-g128 loses" in text and f"| {place} |" in text
    assert (tmp_path / "told" / "rtn-w4-g128-mended.yaml").is_file()

    done = run(*arguments, "--no-locate", "--out", tmp_path / "untold")
    assert done.exit_code == 1 and "--locate finds the layers" in done.stderr
    assert not list((tmp_path / "untold").glob("*.yaml"))
