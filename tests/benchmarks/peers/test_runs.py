"""Which tools run, in which order, how often, and what becomes of those that can't."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.peers import runs
from benchmarks.peers.jobs import JOBS, Tool
from benchmarks.peers.runs import Options, Run, bench, parameters, read_runs
from benchmarks.processes import Measured
from tests.helpers.peer_runs import options_of, run_of
from tests.helpers.tiny import Tiny

Fail = Callable[[Tool], str | None]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tools in the order in which they were started; none really is. "PEFT" fails."""
    names: list[str] = []

    def measure(tool: Tool, job: str, feed: Path, options: Options) -> tuple[Measured, int]:
        names.append(tool.name)
        error = "ValueError: no" if tool.name == "PEFT" else None
        return Measured(1.0, 2.0, 3, error), 4

    monkeypatch.setattr(runs, "measure", measure)
    monkeypatch.setattr(runs, "make_feed", lambda model, work: work / model)
    monkeypatch.setattr(runs, "parameters", lambda model: 5)
    return names


def test_tools_take_turns(started: list[str], tmp_path: Path) -> None:
    done = list(bench(options_of(tmp_path, runs=2), []))
    assert started == ["quantkit", "transformers + bitsandbytes"] * 2
    assert [run.number for run in done] == [0, 0, 1, 1]
    first = run_of("quantkit", parameters=5, wall=1.0, cpu=2.0, peak=3, weights=4)
    assert done[0] == first


def test_a_tool_that_failed_is_not_started_again(started: list[str], tmp_path: Path) -> None:
    options = options_of(tmp_path, jobs=["merge"], peers=["PEFT"], runs=3)
    done = list(bench(options, []))
    assert started == ["quantkit", "PEFT", "quantkit", "quantkit"]
    assert [run.error for run in done if run.tool == "PEFT"] == ["ValueError: no"]


def test_runs_that_are_kept_are_not_repeated(started: list[str], tmp_path: Path) -> None:
    kept = [run_of("quantkit", number=0), run_of("transformers + bitsandbytes", number=1)]
    done = list(bench(options_of(tmp_path, runs=2), kept))
    assert done[:2] == kept and len({run.key for run in done}) == 4
    assert started == ["transformers + bitsandbytes", "quantkit"]


def test_a_peer_that_cannot_be_installed_has_a_run_with_the_reason(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, directory: Path) -> None:
        assert directory == tmp_path / "environments"
        raise environments.EnvironmentFailed(f"no distribution for {name}")

    monkeypatch.setattr(environments, "make", refuse)
    options = options_of(tmp_path, jobs=["q4_k_m"], peers=["llama.cpp"], runs=2)
    done = list(bench(options, []))
    assert started == ["quantkit", "quantkit"]
    [failed] = [run for run in done if run.tool == "llama.cpp"]
    assert failed.error == "can't be installed: no distribution for llama.cpp"
    assert (failed.wall, failed.weights) == (0.0, 0)


def test_only_environments_that_are_needed_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(environments, "make", lambda name, directory: made.append(name))
    peers = ["GPTQModel", "llm-compressor", "AutoRound", "transformers + bitsandbytes"]
    options = options_of(tmp_path, jobs=["gptq", "nf4"], peers=peers, models=["1.1b"])
    assert runs.make_environments(options) == {}
    assert made == ["gptqmodel", "llm-compressor"]  # AutoRound would take hours on 1.1b


def test_slow_tools_do_large_models_on_a_gpu_only(tmp_path: Path) -> None:
    peers = [tool.name for tool in JOBS["awq"] if not tool.is_ours]
    on_cpu = options_of(tmp_path, peers=peers)
    on_gpu = replace(on_cpu, device="cuda")

    def names(options: Options, model: str) -> list[str]:
        return [tool.name for tool in options.tools("awq", model)]

    assert names(on_cpu, "82m") == names(on_gpu, "7b") == ["quantkit", *peers]
    assert names(on_cpu, "7b") == ["quantkit", "llm-compressor"]


def test_peers_that_are_not_chosen_are_left_out(tmp_path: Path) -> None:
    options = options_of(tmp_path, peers=[])
    assert all(tool.is_ours for job in ("gptq", "nf4") for tool in options.tools(job, "tiny"))
    assert options.tools("idle", "tiny") == list(JOBS["idle"])


def test_failed_runs_of_a_record_are_run_again(tmp_path: Path) -> None:
    good, bad = run_of("quantkit"), run_of("PEFT", error="ValueError: no")
    record = tmp_path / "results.json"
    record.write_text(json.dumps({"date": "today", "runs": [asdict(good), asdict(bad)]}))
    assert read_runs(record) == [good]


@pytest.mark.parametrize(
    ("code", "error", "weights"),
    [
        ("o.mkdir(); (o / 'a.gguf').write_bytes(b'12345'); (o / 'b.txt').write_text('x')", None, 5),
        ("raise ValueError('no room')", "ValueError: no room", 0),
    ],
)
def test_a_tool_is_measured_and_its_artifact_deleted(
    tmp_path: Path, code: str, error: str | None, weights: int
) -> None:
    (tmp_path / "out.partial").mkdir()
    program = "import pathlib, sys; o = pathlib.Path(sys.argv[1]); " + code
    tool = Tool("A + B", ("-c", program, "{out}"))
    measured, size = runs.measure(tool, "nf4", tmp_path / "tiny", options_of(tmp_path))
    assert (measured.error, size) == (error, weights)
    assert measured.wall > 0 and measured.peak > 2**20
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["tiny-nf4-a---b.log"]


def test_parameters_are_counted_by_headers(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert parameters(directory) == sum(p.numel() for p in model.parameters())


def test_a_run_is_told_from_others_by_all_but_its_figures() -> None:
    one = run_of("quantkit")
    assert one.key == replace(one, wall=3.0, error="x").key != replace(one, number=1).key
    assert Run(**asdict(one)) == one
