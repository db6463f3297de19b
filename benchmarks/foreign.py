"""Artifacts that others made, read by quantkit and by those who made them.

    python benchmarks/foreign.py [NAME...] [--work DIR] [--environments DIR] [--out FILE]

Each peer quantizes the demo model in its own environment (``environments.py``), loads what it
wrote, and every linear of the loaded model is asked for its weights (``foreign_jobs/weights.py``).
Artifact and weights are then judged by ``quantkit eval``'s code on the same rows: perplexity and
KL divergence must agree to 1%. Where inputs are rounded as well, the figures are those of the
peer's loaded model itself; for int8 its rule for their scale is taken too (absmax / 127.5, where
vLLM and so ``quantkit eval`` take absmax / 127). What was made is kept under --work; delete a
folder to remake it. Ends with code 1 where a peer failed or figures differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import environments
import processes

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "benchmarks" / "foreign_jobs"
SAMPLES, SEQUENCE_LENGTH = 32, 256
AGREEMENT = 0.01
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Case:
    """script and variant: what makes the artifact; environment: whose, ours when None.

    reader: environment and script that give the weights, where the first doesn't.
    """

    environment: str | None
    script: str
    variant: str
    reader: tuple[str | None, str] | None = None

    @property
    def name(self) -> str:
        return f"{self.environment or self.script}-{self.variant}"


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
    """The demo model as every peer's transformers reads it, and rows to calibrate with."""
    from quantkit.base.resources import demo_model
    from quantkit.calibration.text import load_tokenizer, pack
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
    rows = pack(
        ROOT / "calibration" / "demo-world-v1.jsonl",
        load_tokenizer(demo_model()),
        sequence_length=SEQUENCE_LENGTH,
        rows=SAMPLES,
        seed=0,
    )
    (folder / "rows.json").write_text(json.dumps(rows.ids.tolist()))
    judged = load_suite("demo")
    likelihood = judged.suite.likelihood
    heldout = pack(
        judged.resolve(likelihood.dataset),
        load_tokenizer(demo_model()),
        sequence_length=likelihood.sequence_length,
        rows=likelihood.rows,
        seed=None,
    )
    (folder / "heldout.json").write_text(json.dumps(heldout.ids.tolist()))
    return folder


def make(case: Case, source: Path, work: Path, directory: Path) -> str | None:
    """Let the peer quantize and read back; what it said when it failed."""
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


def judge(cases: list[Case], source: Path, work: Path) -> list[dict[str, object]]:
    """Perplexity and KL divergence of each artifact, and of the peer's own weights."""
    from quantkit.base.progress import Silent
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.commands.inspect import inspect
    from quantkit.formats import compressed_tensors as compressed
    from quantkit.judging.quality import judge_quality
    from quantkit.methods import inputs
    from quantkit.recipes.suite import load_suite

    suite = load_suite("demo")
    suite.suite = suite.suite.model_copy(update={"regression": None})
    baseline = Checkpoint(source / "model")

    def figures(paths: list[Path]) -> dict[Path, tuple[float, float]]:
        found = judge_quality(paths, baseline, suite, device="cpu", progress=Silent()).artifacts
        return {
            path: (quality.perplexity.value, quality.kl_divergence.mean)
            for path, quality in zip(paths, found, strict=True)
        }

    paths = [work / case.name / part for case in cases for part in ("artifact", "weights")]
    by_transformers = [p for p in paths if p.is_dir() and p.parent.name.endswith("-W8A8")]
    measured = figures([p for p in paths if p.is_dir() and p not in by_transformers])
    if by_transformers:
        compressed.round_int8 = round_as_transformers
        measured |= figures(by_transformers)
        compressed.round_int8 = inputs.round_int8
    rows = []
    for case in cases:
        ours = measured[work / case.name / "artifact"]
        theirs = measured.get(work / case.name / "weights")
        if theirs is None:
            said = json.loads((work / case.name / "figures.json").read_text())
            theirs = said["perplexity"], said["kl"]
        facts = inspect(work / case.name / "artifact")
        schemes = dict.fromkeys(t.scheme for t in facts.plan.tensors if t.quantized)
        rows.append(
            {
                "name": case.name,
                "format": facts.format,
                "schemes": ", ".join(schemes),
                "producer": facts.producer,
                "perplexity": [ours[0], theirs[0]],
                "kl": [ours[1], theirs[1]],
            }
        )
    return rows


def round_as_transformers(inputs: Tensor, scale: Tensor | None = None) -> Tensor:
    """Inputs in int8 as compressed-tensors has it; judging imitates vLLM, which takes 127."""
    values = inputs.float()
    if scale is None:
        scale = (values.abs().amax(-1, keepdim=True) / 127.5).clamp(min=1e-30)
    return (values / scale).round_().clamp_(-128, 127).mul_(scale).to(inputs.dtype)


def agrees(row: dict[str, object]) -> bool:
    """Whether both figures are equal to 1%."""
    pairs = (row["perplexity"], row["kl"])
    return all(abs(ours - theirs) <= AGREEMENT * theirs for ours, theirs in pairs)


def table(rows: list[dict[str, object]], failures: dict[str, str]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Foreign artifacts\n",
        "Written by `python benchmarks/foreign.py`: the demo model quantized by others, judged by "
        "quantkit, beside the weights that the maker's own loaded model computes with (W8A8 and "
        "FP8: beside that model itself; for W8A8 with the maker's scale of inputs).\n",
        "| artifact | format | schemes | ppl: quantkit | maker | KL: quantkit | maker | same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ppl, kl = row["perplexity"], row["kl"]
        figures = f"{ppl[0]:.4f} | {ppl[1]:.4f} | {kl[0]:.6f} | {kl[1]:.6f}"
        verdict = "yes" if agrees(row) else "**no**"
        lines.append(
            f"| {row['name']} | {row['format']} | {row['schemes']} | {figures} | {verdict} |"
        )
    lines += [f"| {name} | failed: {said} | | | | | | |" for name, said in failures.items()]
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
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    work = options.work.resolve()
    source = feed(work)
    failures, made = {}, []
    for name in options.names or known:
        print(f"making {name}", file=sys.stderr, flush=True)
        said = make(known[name], source, work, options.environments)
        if said:
            failures[name] = said
        else:
            made.append(known[name])
    rows = judge(made, source, work) if made else []
    options.out.write_text(table(rows, failures), encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))
    raise SystemExit(0 if rows and not failures and all(map(agrees, rows)) else 1)


if __name__ == "__main__":
    main()
