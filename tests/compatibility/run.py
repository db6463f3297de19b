"""Real artifacts in the engines that people serve with.

    python -m tests.compatibility.run [--engines ENGINE...] [--recipes RECIPE...] [--models NAME...]

Artifacts of every shipped recipe, and of some that differ from one by ``--set``, are made of the
demo model, a few of other architectures too, and run by each engine in a process of that engine's
own environment. Greedy tokens and log-probabilities are compared with what quantkit predicts from
the same files. The table goes to --out, all results to the .json beside it, after each cell. Cells
that aren't run this time keep their results.

Exit codes: 0 all that was run matched, 1 something didn't.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, processes
from benchmarks.environments import EnvironmentFailed
from quantkit.base.resources import demo_model, recipes, suites
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.checkpoint.reader import Checkpoint
from quantkit.recipes.recipe import load_recipe
from tests.compatibility import prediction
from tests.compatibility.engines import DIRECTORY, ENGINES, SCRIPTS, Artifact, Engine
from tests.compatibility.models import DEMO, MIXTURES, RANDOM, checkpoint_of
from tests.compatibility.record import FAILED, MATCHED, NOT_RUN, Cell, Record, Setting
from tests.compatibility.scripts.exchange import Answer, Job

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS, NEW_TOKENS = 64, 24
ROWS, ROW_LENGTH = 6, 64
TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.05
# Settings that no shipped recipe has, and that engines differ on.
VARIANTS = (
    ("awq-w4-g128", "quantize.group_size=64"),
    ("gptq-w4-g128", "quantize.group_size=64"),
    ("gptq-w4-g128", "quantize.group_size=-1"),
    ("gptq-w4-g128", "quantize.symmetric=false"),
    ("gptq-w4-g128", "quantize.bits=8"),
    ("nf4", "quantize.double_quant=false"),
    ("gptq-w4-g128", "quantize.format=gguf", "quantize.group_size=32"),
    ("awq-w4-g128", "quantize.format=gguf", "quantize.group_size=32"),
)
# Recipes that are tried on every random model.
EVERYWHERE = ("awq-w4-g128", "gptq-w4-g128", "ct-awq-w4a16-g128", "nf4", "gguf-q4-k-m")
# And on those with experts.
OF_EXPERTS = ("ct-w4a16-g128", "int8-w8a8")
# No engine looks anything up on the Hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
HEAD = """# Compatibility

Made by `make test-engines`. Every artifact is loaded by the engine as it is, and run on CPU:
{prompts} prompts continued greedily by up to {new} tokens, and the log-probabilities of the whole
vocabulary at {positions} places of held-out text. Both are compared with quantkit's prediction: the
model in float32 with the weights as unpacked from the artifact, and the inputs of its linears
rounded as the artifact's format has it.

**matched**: the error of all places together is within the tolerance, none is off by more than
four times the tolerance, and every token is the predicted one or a tie. The error is
‖engine - prediction‖ / ‖prediction‖ of the logits less their mean. A tie: the predicted logit is
below the best by less than four times the tolerance, of the spread of the logits. The tolerance is
{exact:.0%}, or {rounded:.0%} where the engine rounds what its linears read to 8 bits, or to BF16,
which has as many: llama.cpp always does, bitsandbytes' CPU kernel too, and INT8 and FP8 are made
for it.

Artifacts are made of the demo model, a Llama. Those *of* another architecture are made of a small
random model with the demo's tokenizer, so that biases, norms of queries and keys, and fused linears
pass through the engines too. Settings after a `+` were changed in the recipe by `--set`.

    make test-engines                           # all, in environments of their own
    make test-engines ENGINES="vllm llama.cpp"  # the other columns keep their results

"""


@dataclass(frozen=True)
class Options:
    """The command line."""

    engines: list[str]
    recipes: list[str]
    models: list[str]
    work: Path
    environments: Path
    timeout: float
    out: Path


def main() -> None:
    shelf = {artifact.name: artifact for artifact in artifacts()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    names = list(dict.fromkeys(artifact.recipe for artifact in shelf.values()))
    parser.add_argument("--recipes", nargs="+", default=names, choices=names)
    models = [DEMO, *RANDOM]
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--work", type=Path, default=Path("reports/engines"))
    parser.add_argument("--environments", type=Path, default=DIRECTORY)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one process")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "compatibility.md")
    given = vars(parser.parse_args())
    given["work"] = given["work"].resolve()
    options = Options(**given)
    record = Record.read(options.out.with_suffix(".json"))
    note_reasons(record, shelf)
    failed = []
    for artifact, engine, cell in run(options, shelf, record):
        record.put(artifact, engine, cell)
        if cell.status == FAILED:
            failed.append(f"{artifact} in {engine}")
        report(f"{artifact}, {engine}: {outcome(cell)}")
        write(options.out, record, list(shelf))
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def artifacts() -> Iterator[Artifact]:
    """Every shipped recipe, then the variants, then the other models."""
    shipped = [(path.stem,) for path in sorted(recipes().glob("*.yaml"))]
    tried = [(DEMO, *recipe) for recipe in (*shipped, *VARIANTS)]
    tried += [(model, recipe) for model in RANDOM for recipe in EVERYWHERE]
    tried = [case for case in tried if case[0] not in MIXTURES or case[1] != "nf4"]
    tried += [(model, recipe) for model in MIXTURES for recipe in OF_EXPERTS]
    for model, recipe, *settings in tried:
        scheme = load_recipe(recipe, settings).recipe.quantize.model_dump()
        yield Artifact(
            recipe=recipe,
            settings=tuple(settings),
            model=model,
            format=scheme["format"],
            bits=scheme.get("bits"),
            symmetric=scheme.get("symmetric"),
            group_size=scheme.get("group_size"),
            activations=scheme["method"] in ("smoothquant", "fp8"),
        )


def note_reasons(record: Record, shelf: dict[str, Artifact]) -> None:
    """Record for every cell that isn't expected to match why not."""
    for artifact in shelf.values():
        for engine in ENGINES.values():
            if reason := engine.why_not(artifact):
                record.put(artifact.name, engine.name, Cell(NOT_RUN, reason))


def run(
    options: Options, shelf: dict[str, Artifact], record: Record
) -> Iterator[tuple[str, str, Cell]]:
    """Every cell, one engine after the other."""
    job = questions()
    unmade: dict[str, str | None] = {}
    for engine in (ENGINES[name] for name in options.engines):
        chosen = [
            artifact
            for artifact in shelf.values()
            if artifact.recipe in options.recipes and artifact.model in options.models
        ]
        expected = [artifact for artifact in chosen if engine.why_not(artifact) is None]
        if not expected:
            continue
        try:
            engine.make(options.environments)
        except EnvironmentFailed as failure:
            for artifact in expected:
                yield artifact.name, engine.name, Cell(FAILED, f"can't be installed: {failure}")
            continue
        record.begin(engine.name, setting(engine, options))
        for artifact in expected:
            if artifact.name not in unmade:
                unmade[artifact.name] = make(artifact, options)
            if why := unmade[artifact.name]:
                yield artifact.name, engine.name, Cell(FAILED, f"can't be made: {why}")
            else:
                yield artifact.name, engine.name, try_out(artifact, engine, job, options)


def questions() -> Job:
    """The job of every engine, but for its path and dtype."""
    from quantkit.calibration.text import load_tokenizer, pack_rows
    from quantkit.judging.cases import encode_prompt, load_cases

    tokenizer = load_tokenizer(demo_model())
    cases = load_cases(suites() / "demo-regression.jsonl")
    text = suites() / "demo-heldout.jsonl"
    rows = pack_rows(text, tokenizer, sequence_length=ROW_LENGTH, rows=ROWS, seed=None)
    return Job(
        path="",
        dtype="",
        # Spread over the file, whose cases are sorted by kind.
        prompts=[encode_prompt(case, tokenizer) for case in cases[:: len(cases) // PROMPTS]][
            :PROMPTS
        ],
        new_tokens=NEW_TOKENS,
        end=end_tokens(demo_model(), tokenizer),
        rows=rows.ids.tolist(),
    )


def place(artifact: Artifact, options: Options) -> Path:
    """The artifact's directory."""
    return options.work / "artifacts" / slug(artifact.name)


def make(artifact: Artifact, options: Options) -> str | None:
    """Make an artifact by the command line; the last line of its output if that failed."""
    model = str(checkpoint_of(artifact.model, options.work))
    command = [sys.executable, "-m", "quantkit.cli", "quantize", artifact.recipe]
    command += ["--model", model, "--out", str(place(artifact, options)), "--force"]
    command += [part for setting in artifact.settings for part in ("--set", setting)]
    # A cache of its own: the user's may hold statistics of another version, and shouldn't grow.
    settings = {"PYTHONPATH": str(ROOT), "QUANTKIT_CACHE": str(options.work / "cache")}
    return launch(command, f"quantize-{artifact.name}", settings, options)


def try_out(artifact: Artifact, engine: Engine, job: Job, options: Options) -> Cell:
    """Ask one engine about one artifact, and judge its answer."""
    directory = place(artifact, options)
    path = next(directory.glob("*.gguf"), directory)
    own = engine.environment is None
    question, answer = (
        options.work / f"{slug(engine.name)}-{what}.json" for what in ("question", "answer")
    )
    question.write_text(json.dumps(asdict(replace(job, path=str(path), dtype=engine.dtype))))
    answer.unlink(missing_ok=True)
    # No engine imports this checkout by accident.
    settings = {**OFFLINE, **engine.settings, "PYTHONPATH": str(ROOT) if own else ""}
    script = str(SCRIPTS / engine.script)
    command = [engine.python(options.environments), script, str(question), str(answer)]
    if why := launch(command, f"{engine.name}-{artifact.name}", settings, options):
        return Cell(FAILED, why)
    tolerance = ROUNDED_TOLERANCE if engine.rounds_in(artifact) else TOLERANCE
    baseline = Checkpoint(checkpoint_of(artifact.model, options.work))
    given = Answer(**json.loads(answer.read_text()))
    try:
        with prediction.predicted(directory, baseline) as logits:
            agreement = prediction.compare(job, given, logits, tolerance)
    except prediction.Disagreement as disagreement:
        return Cell(FAILED, str(disagreement))
    figures: dict[str, Any] = {**asdict(agreement), "tolerance": tolerance, "dtype": engine.dtype}
    if agreement.holds(tolerance):
        return Cell(MATCHED, **figures)
    return Cell(FAILED, "computes something else: see the figures", **figures)


def launch(command: list[str], name: str, settings: dict[str, str], options: Options) -> str | None:
    """Run a command to its end; the last line of its output if it failed."""
    logs = options.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{slug(name)}.log"
    return processes.run(command, log, timeout=options.timeout, settings=settings).error


def setting(engine: Engine, options: Options) -> Setting:
    """What an engine's results depend on besides the artifacts."""
    python = engine.python(options.environments)
    return Setting(
        machine.installed(python, engine.shown),
        platform.python_version(),
        machine.processor(),
        machine.commit(),
        datetime.now().date().isoformat(),
    )


def write(out: Path, record: Record, shelf: list[str]) -> None:
    """Write the record, and the page that shows it."""
    head = HEAD.format(
        prompts=PROMPTS,
        new=NEW_TOKENS,
        positions=ROWS * (ROW_LENGTH - 1),
        exact=TOLERANCE,
        rounded=ROUNDED_TOLERANCE,
    )
    record.write(out.with_suffix(".json"))
    out.write_text(head + record.markdown(shelf, list(ENGINES)), encoding="utf-8")


def outcome(cell: Cell) -> str:
    parts = [cell.status, cell.why]
    if cell.error is not None:
        parts.append(f"error {cell.error:.3%}, tokens {cell.equal} of {cell.tokens}")
    return ", ".join(part for part in parts if part)


def slug(text: str) -> str:
    """A name that is fit for a file."""
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
