"""The parts of the engine suite: it tells agreement from disagreement, and keeps its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.reader import Checkpoint
from tests.compatibility import engines, prediction, run
from tests.compatibility.engines import ENGINES, Engine
from tests.compatibility.prediction import Agreement, Disagreement, Logits, compare
from tests.compatibility.record import FAILED, MATCHED, NOT_RUN, Cell, Record, Setting
from tests.compatibility.scripts.exchange import Answer, Job

END = 7
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def directory(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def logits(directory: Path) -> Iterator[Logits]:
    with prediction.predicted(directory, Checkpoint(directory)) as function:
        yield function


@pytest.fixture(scope="module")
def job(directory: Path) -> Job:
    prompts = [[3, 5, 8], [13, 21, 34, 55]]
    rows = [list(range(10, 30)), list(range(40, 60))]
    return Job(str(directory), "float32", prompts, 6, [END], rows)


@pytest.fixture(scope="module")
def answer(job: Job, logits: Logits) -> Answer:
    """The answer of an engine without any error."""
    tokens = []
    for prompt in job.prompts:
        new: list[int] = []
        while len(new) < job.new_tokens and END not in new:
            new.append(int(logits([prompt + new])[0, -1].argmax()))
        tokens.append(new)
    return Answer(tokens, logits(job.rows)[:, :-1].log_softmax(-1).tolist())


def test_the_prediction_agrees_with_itself(job: Job, answer: Answer, logits: Logits) -> None:
    agreement = compare(job, answer, logits, TOLERANCE)
    assert agreement.error < 1e-5
    assert agreement.equal == agreement.tokens == sum(map(len, answer.tokens))
    assert agreement.holds(TOLERANCE)


def test_one_place_that_is_off_is_seen(job: Job, answer: Answer, logits: Logits) -> None:
    values = torch.tensor(answer.log_probabilities)
    spread = values[1, 4].std() * math.sqrt(values.shape[-1])
    values[1, 4, 9] += 0.05 * spread
    agreement = compare(job, replace(answer, log_probabilities=values.tolist()), logits, TOLERANCE)
    assert agreement.worst == pytest.approx(0.05, rel=0.05)
    assert agreement.error < TOLERANCE
    assert not agreement.holds(TOLERANCE)
    assert agreement.holds(2 * TOLERANCE)
    values[0, 0, 0] = math.nan
    agreement = compare(job, replace(answer, log_probabilities=values.tolist()), logits, TOLERANCE)
    assert not agreement.holds(0.05)


def test_a_shift_of_all_logits_is_no_error(job: Job, answer: Answer, logits: Logits) -> None:
    values = (torch.tensor(answer.log_probabilities) + 3.0).tolist()
    assert compare(job, replace(answer, log_probabilities=values), logits, TOLERANCE).error < 1e-5


@pytest.mark.parametrize(("place", "ties"), [(1, 1), (-1, 0)])
def test_the_second_best_token_counts_only_when_it_is_near(
    job: Job, answer: Answer, logits: Logits, place: int, ties: int
) -> None:
    """The last token of an answer is exchanged for another: the second best, or the worst."""
    [*kept, _] = answer.tokens[0]
    order = logits([job.prompts[0] + kept])[0, -1].sort(descending=True)
    tokens = [[*kept, int(order.indices[place])], answer.tokens[1]]
    gap = float(order.values[0] - order.values[1])
    near = gap / float(order.values.std()) / 3.8
    agreement = compare(job, replace(answer, tokens=tokens), logits, near)
    assert (agreement.tokens - agreement.equal, agreement.ties) == (1, ties)
    assert agreement.holds(near) == bool(ties)
    assert not compare(job, replace(answer, tokens=tokens), logits, near / 4).holds(1.0)


def test_an_answer_of_another_shape_is_refused(job: Job, answer: Answer, logits: Logits) -> None:
    short = replace(answer, tokens=[answer.tokens[0][:-1], answer.tokens[1]])
    with pytest.raises(Disagreement, match="tokens where"):
        compare(job, short, logits, TOLERANCE)
    with pytest.raises(Disagreement, match="1 answers to 2"):
        compare(job, replace(answer, tokens=answer.tokens[:1]), logits, TOLERANCE)
    narrow = [[place[:-1] for place in row] for row in answer.log_probabilities]
    with pytest.raises(Disagreement, match="shape"):
        compare(job, replace(answer, log_probabilities=narrow), logits, TOLERANCE)


def test_an_engine_in_its_own_process(
    tmp_path: Path, directory: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers of this environment in place of an engine; then a script that isn't there."""
    [artifact] = [it for it in run.artifacts() if it.name == "awq-w4-g128"]
    options = run.Options([], [], [], tmp_path, tmp_path, 120.0, tmp_path / "page.md")
    target = run.place(artifact, options)
    target.parent.mkdir()
    target.symlink_to(directory)
    monkeypatch.setattr(run, "checkpoint_of", lambda model, work: directory)
    engine = Engine("here", "with_transformers.py", "float32", ("torch",))
    cell = run.try_out(artifact, engine, job, options)
    assert cell.status == MATCHED, cell
    assert cell.error is not None and cell.error < 1e-4
    impossible = replace(engine, dtype="float33")
    cell = run.try_out(artifact, impossible, job, options)
    assert cell.status == FAILED
    assert "float33" in cell.why


SETTING = Setting("torch 2", "3.11", "a processor", "abc", "2026-01-01")


def test_what_is_not_run_again_stays(tmp_path: Path) -> None:
    figures = asdict(Agreement(0.001, 0.002, 40, 39, 1))
    first = Record()
    first.begin("vllm", SETTING)
    first.begin("llama.cpp", SETTING)
    first.put("nf4", "vllm", Cell(NOT_RUN, "no method"))
    first.put("awq", "vllm", Cell(MATCHED, dtype="float16", tolerance=0.01, **figures))
    first.put("q4", "llama.cpp", Cell(FAILED, "a crash"))
    first.write(tmp_path / "page.json")
    second = Record.read(tmp_path / "page.json")
    assert second == first
    second.begin("llama.cpp", replace(SETTING, date="2026-02-02"))
    assert second.cells == first.cells
    page = second.markdown(["awq", "nf4", "q4"], ["vllm", "llama.cpp"])
    assert "| `awq` | matched | not run (1) |" in page
    assert "| `q4` | not run (1) | **failed** (3) |" in page
    assert "3. a crash" in page
    assert "| `awq` | vllm | float16 | 0.100% | 0.200% | 1% | 39 of 40, 1 tie |" in page
    second.begin("vllm", replace(SETTING, versions="torch 3"))
    assert second.cells == {"awq": {}, "nf4": {}, "q4": first.cells["q4"]}


def test_every_artifact_has_an_engine_and_every_gap_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "_has", lambda feature: True)  # on some machine
    for artifact in run.artifacts():
        reasons = [engine.why_not(artifact) for engine in ENGINES.values()]
        assert None in reasons, artifact
        assert "" not in reasons, artifact
