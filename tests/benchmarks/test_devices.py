"""What the table says of artifacts that two devices made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import devices

CUDA, CPU = [0.00100, 0.0008, 0.0012], [0.00105, 0.0009, 0.0013]


def judged(work: Path, device: str, part: int, **figures: list[float]) -> None:
    named = {name.replace("__", "-0/"): value for name, value in figures.items()}
    (work / f"judged-{device}-{part}.json").write_text(json.dumps(named))


def artifact(work: Path, folder: str, recipe: str, content: str) -> None:
    (work / folder / recipe).mkdir(parents=True)
    (work / folder / recipe / "model.safetensors").write_text(content)


def test_a_row_has_every_pair_of_devices_and_the_verdicts(tmp_path: Path) -> None:
    for recipe, second in (("gptq", "same"), ("awq", "other")):
        artifact(tmp_path, "cuda-0", recipe, "same")
        artifact(tmp_path, "cuda-1", recipe, second)
    worse = [0.004, 0.003, 0.005]
    for device in ("cuda", "cpu"):
        judged(tmp_path, device, 0, cuda__gptq=CUDA, cpu__gptq=CPU)
        judged(tmp_path, device, 1, cuda__awq=CUDA, cpu__awq=worse)
    lines = devices.table(["cuda", "cpu"], tmp_path, ["gptq", "awq", "nf4"])
    columns = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert columns[1] == "made on cuda, judged on cuda" and columns[-1] == "cuda twice"
    gptq, awq, nf4 = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert gptq[1] == "0.001000 (0.000800 to 0.001200)" and gptq[3][:8] == "0.001050"
    assert gptq[-2:] == ["yes", "the same bytes"]
    assert awq[-2:] == ["NO", "OTHER BYTES"]
    assert nf4 == ["nf4", "–", "–", "–", "–", "not made", "not made"]


def test_a_recipe_that_cannot_be_made_is_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices.make("demo", ["no-such-recipe"], "cpu", tmp_path)
    assert "InputError" in (tmp_path / "no-such-recipe.failed").read_text()
    assert "no-such-recipe" in capsys.readouterr().err
