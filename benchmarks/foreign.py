"""Artifacts that others made, read by quantkit and by those who made them.

    python -m benchmarks.foreign [NAME...] [--work DIR] [--environments DIR] [--out FILE]

Each peer quantizes the demo model in its own environment (``environments.py``) and loads the
artifact that it wrote; the weights that the loaded model computes with are saved as a plain
checkpoint (``foreign_jobs/weights.py``). Quantkit then judges artifact and checkpoint on the same
rows: perplexity and KL divergence must agree to 1%. Where inputs are rounded as well, the figures
of the peer's loaded model itself are compared instead; for int8, quantkit is also given the peer's
rule for the scale of inputs (absmax / 127.5, where vLLM and so ``quantkit eval`` have
absmax / 127). Artifacts are kept under --work; delete a folder to make one again. Exits with code 1
where a peer failed or figures differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import environments, processes
from benchmarks.printing import say

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "benchmarks" / "foreign_jobs"
SAMPLES, SEQUENCE_LENGTH = 32, 256
AGREEMENT = 0.01
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Case:
    """One artifact of one peer.

    environment: the peer's, our own when None. script: of foreign_jobs, which makes the artifact.
    variant: the script's own name for the settings to make it with.
    reader: environment and script that read the weights, where ``script`` doesn't.
    """

    environment: str | None
    script: str
    variant: str
    reader: tuple[str | None, str] | None = None

    @property
    def name(self) -> str:
        return f"{self.environment or self.script}-{self.variant}"


@dataclass(frozen=True)
class Row:
    """What came of a case; each pair of figures is quantkit's and the maker's."""

    name: str
    format: str
    schemes: str
    perplexity: tuple[float, float]
    kl: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether both pairs of figures are equal to 1%."""
        pairs = (self.perplexity, self.kl)
        return all(abs(ours - theirs) <= AGREEMENT * theirs for ours, theirs in pairs)


CASES = (
    Case("autoawq", "auto_awq", "g128"),
    *(
        Case("gptqmodel", "gptq_model", variant)
        for variant in ("v1-sym", "v1-asym", "v2-asym", "act-order", "dynamic", "3bit")
    ),
    *(Case("auto-round", "rounding", variant) for variant in ("auto_gptq", "gptqmodel")),
    Case("auto-round", "rounding", "auto_awq", ("autoawq", "awq_weights")),
    *(
        Case("llm-compressor", "llm_compressor", variant)
        for variant in ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8")
    ),
    *(Case(None, "bits_and_bytes", variant) for variant in ("nf4-double", "fp4", "int8")),
    *(
        Case("llama.cpp", "llama_cpp", variant, (None, "gguf_weights"))
        for variant in ("Q4_K_M", "IQ4_XS", "Q3_K_M")
    ),
)


def feed(work: Path) -> Path:
    """The folder with the demo model as every peer's transformers reads it, and rows of tokens."""
    from quantkit.base.resources import demo_model
    from quantkit.calibration.text import load_tokenizer, pack_rows
    from quantkit.recipes.suite import load_suite

    folder = work / "feed"
    if folder.is_dir():
        return folder
    model = folder / "model"
    shutil.copytree(demo_model(), model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name before transformers 5
    settings.pop("extra_special_tokens", None)  # was a dictionary then
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = pack_rows(
        ROOT / "calibration" / "demo-world-v1.jsonl",
        load_tokenizer(demo_model()),
        sequence_length=SEQUENCE_LENGTH,
        rows=SAMPLES,
        seed=0,
    )
    (folder / "rows.json").write_text(json.dumps(rows.ids.tolist()))
    judged = load_suite("demo")
    likelihood = judged.suite.likelihood
    heldout = pack_rows(
        judged.likelihood_dataset(),
        load_tokenizer(demo_model()),
        sequence_length=likelihood.sequence_length,
        rows=likelihood.rows,
        seed=None,
    )
    (folder / "heldout.json").write_text(json.dumps(heldout.ids.tolist()))
    return folder


def make(case: Case, source: Path, work: Path, directory: Path) -> str | None:
    """Let the peer quantize and read back; returns its last message when it failed."""
    out = work / case.name
    if (out / "done").is_file():
        return None
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    steps = [(case.environment, case.script)]
    for environment, script in [*steps, case.reader] if case.reader else steps:
        python = sys.executable
        if environment is not None:
            try:
                environments.make(environment, directory)
            except environments.EnvironmentFailed as failure:
                return str(failure)
            python = str(environments.python_of(environment, directory))
        command = [python, str(JOBS / f"{script}.py"), case.variant]
        command += ["--feed", str(source), "--out", str(out)]
        measured = processes.run(command, out / f"{script}.log", settings=OFFLINE)
        if measured.error:
            return measured.error
    (out / "done").touch()
    return None


def judge(cases: list[Case], source: Path, work: Path) -> list[Row]:
    """Perplexity and KL divergence of each artifact, and of the peer's own weights or model."""
    import quantkit

    paths = [work / case.name / part for case in cases for part in ("artifact", "weights")]
    rounded = [path for path in paths if path.is_dir() and path.parent.name.endswith("-W8A8")]
    measured = figures([path for path in paths if path.is_dir() and path not in rounded], source)
    if rounded:
        with rounding_as_compressed_tensors():
            measured |= figures(rounded, source)
    rows = []
    for case in cases:
        folder = work / case.name
        theirs = measured.get(folder / "weights")
        if theirs is None:  # the maker reported the figures of its loaded model
            reported = json.loads((folder / "figures.json").read_text())
            theirs = reported["perplexity"], reported["kl"]
        facts = quantkit.inspect(folder / "artifact")
        schemes = dict.fromkeys(t.scheme for t in facts.plan.tensors if t.quantized)
        perplexity, kl = zip(measured[folder / "artifact"], theirs, strict=True)
        rows.append(Row(case.name, facts.format, ", ".join(schemes), perplexity, kl))
    return rows


def figures(paths: list[Path], source: Path) -> dict[Path, tuple[float, float]]:
    """Perplexity and mean KL divergence from the model of ``source``, by path."""
    from quantkit.base.progress import Silent
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.judging.quality import judge_quality
    from quantkit.recipes.suite import load_suite

    suite = load_suite("demo")
    suite.suite = suite.suite.model_copy(update={"regression": None})
    baseline = Checkpoint(source / "model")
    qualities = judge_quality(paths, baseline, suite, device="cpu", progress=Silent()).artifacts
    result = {}
    for path, quality in zip(paths, qualities, strict=True):
        assert quality.kl_divergence is not None
        result[path] = quality.perplexity.value, quality.kl_divergence.mean
    return result


@contextmanager
def rounding_as_compressed_tensors() -> Iterator[None]:
    """Let quantkit round inputs to int8 as compressed-tensors does, not as vLLM does."""
    from unittest.mock import patch

    with patch("quantkit.formats.compressed_tensors.round_int8", round_as_compressed_tensors):
        yield


def round_as_compressed_tensors(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """Inputs rounded to int8 with a scale of absmax / 127.5 for each token, unless one is given."""
    values = inputs.float()
    if scale is None:
        scale = (values.abs().amax(-1, keepdim=True) / 127.5).clamp(min=1e-30)
    return (values / scale).round_().clamp_(-128, 127).mul_(scale).to(inputs.dtype)


def table(rows: list[Row], failures: dict[str, str]) -> str:
    """The figures as Markdown. ``failures``: the last messages of those that failed, by name."""
    lines = [
        "# Foreign artifacts\n",
        "Written by `python -m benchmarks.foreign`: the demo model quantized by others, judged by "
        "quantkit, beside the weights that the maker's own loaded model computes with (W8A8 and "
        "FP8: beside that model itself; for W8A8 with the maker's scale of inputs).\n",
        "| artifact | format | schemes | ppl: quantkit | maker | KL: quantkit | maker | same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ppl, kl = row.perplexity, row.kl
        cells = f"{ppl[0]:.4f} | {ppl[1]:.4f} | {kl[0]:.6f} | {kl[1]:.6f}"
        verdict = "yes" if row.agrees else "**no**"
        lines.append(f"| {row.name} | {row.format} | {row.schemes} | {cells} | {verdict} |")
    lines += [f"| {name} | failed: {error} | | | | | | |" for name, error in failures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(c.name for c in CASES))
    parser.add_argument("--work", type=Path, default=ROOT / "reports" / "foreign")
    parser.add_argument("--environments", type=Path, default=environments.DIRECTORY)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "FOREIGN.md")
    options = parser.parse_args()
    known = {case.name: case for case in CASES}
    if unknown := set(options.names) - known.keys():
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    work = options.work.resolve()
    source = feed(work)
    failures, made = {}, []
    for name in options.names or known:
        say(f"making {name}")
        error = make(known[name], source, work, options.environments)
        if error:
            failures[name] = error
        else:
            made.append(known[name])
    rows = judge(made, source, work) if made else []
    options.out.write_text(table(rows, failures), encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))
    raise SystemExit(0 if rows and not failures and all(row.agrees for row in rows) else 1)


if __name__ == "__main__":
    main()
