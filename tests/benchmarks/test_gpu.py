"""The benchmark on a GPU, tried on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import JOBS, PEER, Run, row
from benchmarks.gpu_feed import BOS, SEED
from benchmarks.peers.jobs import OURS
from benchmarks.processes import Measured
from quantkit.calibration.text import load_tokenizer, pack_rows
from quantkit.recipes.recipe import load_recipe

SAMPLES, LENGTH = 4, 128


def test_ours_runs_and_the_row_of_a_peer_that_is_missing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shape", "tiny", "--samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    places = ["--work", str(tmp_path), "--out", str(tmp_path / "page.md"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["gpu", "--cold", "--jobs", "gptq", *sizes, *places])
    gpu.main()
    page = (tmp_path / "page.md").read_text()
    assert capsys.readouterr().out == f"{page}\n"
    ours, theirs = (line.split("|")[1:-1] for line in page.splitlines()[-2:])
    assert [cell.strip() for cell in ours[:2]] == ["gptq", OURS] and float(ours[2]) > 0
    assert theirs[1].strip() == PEER
    assert "not installed here: ModuleNotFoundError: No module named 'llmcompressor'" in theirs[2]

    # What the peer would have read are the ids that our recipes draw from the text.
    [feed] = tmp_path.glob("tiny-*")
    rows = json.loads((feed / "rows.json").read_text())
    assert len(rows) == SAMPLES and {len(ids) for ids in rows} == {LENGTH}
    assert len({token for ids in rows for token in ids}) > 200
    for recipe, _ in JOBS.values():
        calibration = load_recipe(recipe, []).recipe.calibration
        assert calibration is not None
        assert (calibration.seed, calibration.bos) == (SEED, BOS)
    drawn = pack_rows(
        feed / "calibration.jsonl",
        load_tokenizer(feed / "model"),
        sequence_length=LENGTH,
        rows=SAMPLES,
        seed=SEED,
        bos=BOS,
    )
    assert drawn.ids.tolist() == rows


def run(tool: str, wall: float, *, error: str | None = None, device: int | None = None) -> Run:
    return Run("gptq", tool, Measured(wall, 2 * wall, 10**9, error), 5 * 10**6, device, None)


def test_a_row_holds_medians_the_most_memory_and_our_figures_over_theirs() -> None:
    ours = [run(OURS, 10.0, device=2 * 10**9), run(OURS, 8.0, device=3 * 10**9)]
    assert "| 9.0 (10.0, 8.0) | 18.0 | 1.00 | 3.00 | – | 5.0 |  |  |" in row(ours, ours)
    assert row([run(PEER, 36.0, device=6 * 10**9)], ours).endswith("| 5.0 | 0.25 | 0.50 |")
    assert row([run(PEER, 36.0)], ours).endswith("| 5.0 | 0.25 | – |")
    assert row([run(PEER, 36.0)], [run(OURS, 1.0, error="killed")]).endswith("| 5.0 |  |  |")


def test_a_process_over_its_limit_says_how_long_it_was_given() -> None:
    assert "| > 150 s |" in row([run(PEER, 150.1, error="stopped after 150 s")], [])


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    options = gpu.parse(["--jobs", "gptq", "--within", "0", "--work", str(tmp_path)])
    tools = [gpu.Tool(OURS, "/no/such/python", {}), gpu.Tool(PEER, "/no/such/python", {})]
    runs = list(gpu.bench(tmp_path, tools, options))
    assert [it.measured.error for it in runs] == ["not begun: no time was left"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "at least 1"),
        (["--samples", "-3"], "at least 1"),
        (["--jobs", "nf4"], "invalid choice: 'nf4'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_an_interpreter_that_is_not_there_is_a_reason(tmp_path: Path) -> None:
    options = gpu.parse(["--peer-python", "/no/python", "--work", str(tmp_path), "--device", "cpu"])
    assert gpu.their_tool(options).missing == "no such interpreter: /no/python"
