"""Quality per bit: quantkit's recipes and its peers on one model, one calibration, one judge.

    python -m benchmarks.quality --model DIR --calibration FILE --heldout FILE [--table FILE]

Every contestant quantizes MODEL and calibrates on the same ``--samples`` rows of the calibration
text. One ``quantkit eval`` judges all artifacts on the first ``--rows`` rows of the held-out text,
in float32, against the model in its own dtype. The result is one table for each class of
artifacts of about the same size, printed and written to ``--table``.

``--only`` chooses classes, ``--ours`` leaves the peers out (``environments.py`` makes their
environments), ``--llama-perplexity`` adds llama.cpp's own measurement of GGUF files. Artifacts stay
in ``--out``, and the next call uses them again; empty it to make them anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import environments, processes
from benchmarks.llama_perplexity import Judge
from benchmarks.printing import say, slug

PEER_JOBS = Path(__file__).resolve().parent / "peer_jobs"
QUANTKIT = [sys.executable, "-m", "quantkit.cli"]


@dataclass(frozen=True)
class Contestant:
    """One way to an artifact: a recipe of ours with settings, or a peer's job.

    environment: the name of a peer's environment; None for a recipe and for a peer in our own one.
    job: the peer's script in benchmarks/peer_jobs, then its arguments.
    """

    name: str
    recipe: str = ""
    settings: tuple[str, ...] = ()
    environment: str | None = None
    job: tuple[str, ...] = ()

    def command(self, options: argparse.Namespace, feed: Path, out: Path) -> list[str]:
        """The command line that makes the artifact ``out``, without a recipe's calibration."""
        if self.recipe:
            place = ["--model", str(options.model), "--out", str(out), "--force", "--no-cache"]
            flags = [part for setting in self.settings for part in ("--set", setting)]
            return [*QUANTKIT, "quantize", self.recipe, *place, *flags]
        interpreter = sys.executable
        if self.environment:
            interpreter = str(environments.python_of(self.environment, options.environments))
        script, *arguments = self.job
        path = str(PEER_JOBS / script)
        return [interpreter, path, *arguments, "--feed", str(feed), "--out", str(out)]


@dataclass(frozen=True)
class Entry:
    """A contestant, the directory of its artifact, and the process that made it."""

    contestant: Contestant
    out: Path
    measured: processes.Measured


def ours(name: str, recipe: str, *settings: str) -> Contestant:
    """A shipped recipe, changed by ``settings`` ("quantize.bits=3")."""
    return Contestant(name, recipe, settings)


def peer(name: str, environment: str | None, script: str, *arguments: str) -> Contestant:
    """A peer by its script in benchmarks/peer_jobs, and the arguments of that script."""
    return Contestant(name, environment=environment, job=(script, *arguments))


def integers(bits: int, *, symmetric: bool) -> list[Contestant]:
    """Everyone who quantizes to integers in groups of 128."""
    grid = (f"quantize.bits={bits}", f"quantize.symmetric={str(symmetric).lower()}")
    flags = ("--bits", str(bits), "--symmetric" if symmetric else "--no-symmetric")
    contestants = [
        ours("quantkit gptq", "gptq-w4-g128", *grid),
        ours("quantkit gptq, quantized", "gptq-w4-g128", *grid, "quantize.propagate=quantized"),
        ours("quantkit gptq, corrected", "gptq-w4-g128-corrected", *grid),
        peer("llm-compressor GPTQ", "llm-compressor", "llm_compressor.py", "gptq", *flags),
        peer("GPTQModel", "gptqmodel", "gptq_model.py", "gptq", *flags),
        peer("AutoRound, 200 iterations", "auto-round", "autoround.py", "gptq", *flags),
    ]
    if bits == 4 and not symmetric:
        contestants += [
            ours("quantkit awq", "awq-w4-g128"),
            ours("quantkit rtn", "rtn-w4-g128"),
            peer("AutoAWQ", "autoawq", "auto_awq.py", "awq"),
        ]
    elif not symmetric:
        packed = (*grid, "quantize.format=gptq")
        contestants[3:3] = [
            ours("quantkit awq", "awq-w4-g128", *packed),
            ours("quantkit rtn", "rtn-w4-g128", *packed),
        ]
    return contestants


def mix(name: str) -> list[Contestant]:
    """One of llama.cpp's mixes: by its own tools, by our ggml method, and by our GPTQ."""
    chosen = f"quantize.mix={name}"
    return [
        ours("quantkit gptq", "gguf-q4-k-m-gptq", chosen),
        ours("quantkit gptq, corrected", "gguf-q4-k-m-corrected", chosen),
        ours("quantkit ggml, importance weights", "gguf-q4-k-m", chosen),
        peer(
            "llama.cpp, importance weights",
            "llama.cpp",
            "llama_cpp.py",
            "q4_k_m-imatrix",
            "--mix",
            name.upper(),
        ),
    ]


CLASSES: dict[str, Callable[[], list[Contestant]]] = {
    "4 bits symmetric, groups of 128": lambda: integers(4, symmetric=True),
    "4 bits asymmetric, groups of 128": lambda: integers(4, symmetric=False),
    "3 bits symmetric, groups of 128": lambda: integers(3, symmetric=True),
    "3 bits asymmetric, groups of 128": lambda: integers(3, symmetric=False),
    **{
        name.upper(): partial(mix, name)
        for name in ("q2_k", "q3_k_m", "iq4_xs", "q4_0", "q4_k_m", "q5_k_m", "q6_k")
    },
    "NF4": lambda: [
        ours("quantkit nf4", "nf4"),
        peer("transformers + bitsandbytes", None, "hf_nf4.py", "nf4"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--ours", action="store_true", help="without the peers")
    parser.add_argument("--llama-perplexity", action="store_true", help="for GGUF, one more column")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--environments", type=Path, default=environments.DIRECTORY)
    parser.add_argument("--out", type=Path, default=Path("reports/quality"))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    for name in ("model", "calibration", "heldout", "out"):
        setattr(options, name, getattr(options, name).resolve())
    feed = make_feed(options)
    entries: dict[str, list[Entry]] = {}
    for title in options.only:
        for contestant in CLASSES[title]():
            if options.ours and not contestant.recipe:
                continue
            out = options.out / "artifacts" / slug(title) / slug(contestant.name)
            measured = make(contestant, options, feed, out)
            say(f"{title}: {contestant.name}: {measured.error or f'{measured.wall:.1f} s'}")
            entries.setdefault(title, []).append(Entry(contestant, out, measured))
    made = [entry.out for row in entries.values() for entry in row if not entry.measured.error]
    text = render(options, entries, judge(options, made), confirm(options, feed, made))
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")


def make_feed(options: argparse.Namespace) -> Path:
    """What the peers' jobs read: the model, and the calibration rows as ids and as text."""
    from quantkit.calibration.text import load_tokenizer, pack_rows
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.formats.gguf.writer import write_bf16

    feed: Path = options.out / "feed"
    feed.mkdir(parents=True, exist_ok=True)
    model = feed / "model"
    model.unlink(missing_ok=True)
    model.symlink_to(options.model)
    rows = pack_rows(
        options.calibration,
        load_tokenizer(options.model),
        sequence_length=options.sequence_length,
        rows=options.samples,
        seed=0,
    )
    (feed / "rows.json").write_text(json.dumps(rows.ids.tolist()))
    shutil.copy(options.calibration, feed / "text.txt")
    if not options.ours and not (feed / "bf16.gguf").is_file():
        # llama.cpp's converter knows the tokenizers of published models only, so that the peer gets
        # the file that quantkit writes.
        write_bf16(feed / "bf16.gguf", Checkpoint(options.model))
    return feed


def make(
    contestant: Contestant, options: argparse.Namespace, feed: Path, out: Path
) -> processes.Measured:
    """Make an artifact unless it is there; returns the process that made it."""
    record = out.with_name(f"{out.name}.json")
    if record.is_file():
        return processes.Measured(**json.loads(record.read_text()))
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    if contestant.environment:
        try:
            environments.make(contestant.environment, options.environments)
        except environments.EnvironmentFailed as failure:
            return processes.Measured(0.0, 0.0, 0, f"can't be installed: {failure}")
    command = contestant.command(options, feed, out)
    if contestant.recipe and "calibration" in recipe_keys(contestant.recipe):
        for key, value in (
            ("dataset", options.calibration),
            ("samples", options.samples),
            ("sequence_length", options.sequence_length),
        ):
            command += ["--set", f"calibration.{key}={value}"]
    measured = processes.run(command, out.with_name(f"{out.name}.log"), settings={})
    if not measured.error:
        record.write_text(json.dumps(asdict(measured)))
    return measured


def recipe_keys(recipe: str) -> set[str]:
    """The names of the sections of a shipped recipe."""
    from quantkit.recipes.recipe import load_recipe

    return set(load_recipe(recipe).recipe.model_dump(exclude_none=True))


def judge(options: argparse.Namespace, artifacts: Sequence[Path]) -> dict[str, Any]:
    """The comparison's variants, by the artifact's path; what can't be judged is left out."""
    suite = options.out / "suite.yaml"
    likelihood = {
        "dataset": str(options.heldout),
        "sequence_length": options.sequence_length,
        "rows": options.rows,
    }
    document = {"schema": 1, "name": "benchmark", "version": "1.0.0", "likelihood": likelihood}
    suite.write_text(json.dumps(document))  # JSON is YAML
    paths = {str(artifact): str(readable(artifact)) for artifact in artifacts}
    left = list(paths.values())
    # One artifact that is refused stops the whole command: leave it out and try again.
    judged: dict[str, Any] = {}
    while left and not judged:
        judged, refused = evaluate(options, suite, left)
        left = [path for path in left if path not in refused]
    return {artifact: judged[path] for artifact, path in paths.items() if path in judged}


def readable(artifact: Path) -> Path:
    """The path within a contestant's output that ``quantkit eval`` can read."""
    files = list(artifact.glob("*.gguf"))
    if files and not (artifact / "quantkit.json").is_file():
        return files[0]
    # AutoRound writes into a folder that it names itself.
    inner = [path.parent for path in artifact.glob("*/config.json")]
    return artifact if (artifact / "config.json").is_file() or not inner else inner[0]


def evaluate(
    options: argparse.Namespace, suite: Path, paths: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The variants by path; or, where some are refused, their paths, with the reason on stderr.

    Ends the program where ``quantkit eval`` fails without refusing any of them.
    """
    command = [*QUANTKIT, "eval", *paths, "--baseline", str(options.model)]
    done = subprocess.run(
        [*command, "--suite", str(suite), "--json", "--allow-overlap"],
        capture_output=True,
        text=True,
    )
    try:
        variants = json.loads(done.stdout)["variants"]
    except (ValueError, KeyError):
        print(done.stderr.strip(), file=sys.stderr)
        refused = [path for path in paths if f"{path}: " in done.stderr]
        if not refused:
            raise SystemExit("quantkit eval failed and refused no artifact") from None
        return {}, refused
    return dict(zip(paths, variants, strict=True)), []


def confirm(
    options: argparse.Namespace, feed: Path, artifacts: Sequence[Path]
) -> dict[str, tuple[float, float]]:
    """llama.cpp's own mean KL divergence and its standard error, by path, of the GGUF artifacts."""
    files = {str(artifact): next(artifact.glob("*.gguf"), None) for artifact in artifacts}
    if not options.llama_perplexity or not any(files.values()):
        return {}
    judge = Judge(
        feed / "bf16.gguf",
        options.heldout,
        chunks=options.rows,
        length=options.sequence_length,
        directory=options.environments,
    )
    return {path: judge.mean_kl(file) for path, file in files.items() if file}


def render(
    options: argparse.Namespace,
    entries: dict[str, list[Entry]],
    judged: dict[str, Any],
    confirmed: dict[str, tuple[float, float]],
) -> str:
    """The tables as Markdown.

    judged: as ``judge`` returns it. confirmed: as ``confirm`` returns it.
    """
    lines = [
        f"Model {options.model.name}; calibrated on {options.samples} × {options.sequence_length} "
        f"tokens of {options.calibration.name}, judged on {options.rows} × "
        f"{options.sequence_length} of {options.heldout.name}. Mean KL divergence from the model "
        "in nats, ± 95% over rows; both sides in float32. Bits per weight of the whole file. "
        "Seconds of the whole process.",
    ]
    for title, row in entries.items():
        columns = ["", "bits", "mean KL", "p99", "top-1", "perplexity", "seconds"]
        routed = any("experts_changed" in variant["quality"] for variant in judged.values())
        columns += ["tokens with other experts"] * routed
        if any(str(entry.out) in confirmed for entry in row):
            columns.append("KL by llama-perplexity, ± its error")
        lines += ["", f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for entry in row:
            path = str(entry.out)
            lines.append(line(entry, judged.get(path)))
            if routed and path not in judged:
                lines[-1] += " |"
            if path in judged and path in confirmed:
                mean, error = confirmed[path]
                lines[-1] += f" {mean:.6f} ± {error:.6f} |"
    return "\n".join(lines)


def line(entry: Entry, variant: dict[str, Any] | None) -> str:
    """One contestant's line of a table. ``variant``: None where its artifact wasn't judged."""
    name, measured = entry.contestant.name, entry.measured
    if variant is None:
        reason = measured.error or "can't be judged"
        return f"| {name} | – | {reason} | | | | |"
    quality = variant["quality"]
    kl = quality["kl_divergence"]
    return (
        f"| {name} | {variant['bits_per_weight']:.2f} "
        f"| {kl['mean']:.6f} ± {(kl['high'] - kl['low']) / 2:.6f} | {kl['p99']:.4f} "
        f"| {quality['top1_agreement']:.2%} | {quality['perplexity']['value']:.3f} "
        f"| {measured.wall:.0f} |{_routed(quality)}"
    )


def _routed(quality: dict[str, Any]) -> str:
    """The share of tokens with other experts ± 95%, as a cell; empty for models without experts."""
    if "experts_changed" not in quality:
        return ""
    interval = quality["intervals"]["experts_changed.mean"]
    half = (interval["high"] - interval["low"]) / 2
    return f" {quality['experts_changed']['mean']:.2%} ± {half:.2%} |"


if __name__ == "__main__":
    main()
