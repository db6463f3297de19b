"""verify: is an artifact whole, does it fit its baseline, and does an engine run it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit.artifact import tokenizer_checks
from quantkit.artifact.findings import Check, Verification
from quantkit.artifact.manifest import read_manifest
from quantkit.base.errors import InputError, QuantkitError
from quantkit.base.files import digests, read_json
from quantkit.base.progress import Progress, Task
from quantkit.calibration.text import load_tokenizer
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.checkpoint.header import INDEX_FILE, SINGLE_FILE
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import has_vocabulary
from quantkit.checkpoint.weights import Weights
from quantkit.engines.choose import LLAMACPP, check_engine, engine_for
from quantkit.engines.trial import Trial, run_trial
from quantkit.formats.gguf.reader import GgufWeights, gguf_files
from quantkit.formats.gguf.templates import template_key, templates_of
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.model.skeleton import Skeleton
from quantkit.results.manifest import MANIFEST, RUN

_NEW_TOKENS = 24
_LOOP = 8  # an answer of so many tokens, all the same, is a loop
_ROWS_AT_ONCE = 1 << 14  # of a vocabulary: a quarter of a GB in float32 at a width of 4096
_SHOWN = 3
_NOT_LISTED = (MANIFEST, RUN)  # files that the manifest can't hold the digests of


def verify(
    path: Path, baseline: Checkpoint | None, engine: str | None, progress: Progress
) -> Verification:
    """Run every check; those that failed are in the result.

    path: a directory or a .gguf file; baseline: what it was made from, None: unknown; engine: the
    usual one of the format if None.

    Raises InputError for a path that holds no artifact and for an engine that can't run it,
    MachineError for an engine that isn't installed.
    """
    if not path.exists():
        raise InputError("no such file or directory", where=str(path))
    usual, target = engine_for(path)
    engine = engine or usual
    check_engine(engine, path)
    checks = ArtifactChecks(path, target, open_artifact(path), baseline)
    steps: list[tuple[str, Callable[[Task], Iterator[Check]]]] = [
        ("files", checks.files),
        ("tensors", checks.tensors),
        ("tokenizer", checks.tokenizer),
        (engine, lambda task: checks.answers(engine)),
    ]
    results: list[Check] = []
    with progress.task("verify", len(steps)) as task:
        for doing, step in steps:
            task.advance(0, doing=doing)
            results += step(task)
            task.advance()
    name = None if baseline is None else str(baseline.directory)
    return Verification(str(path), name, engine, tuple(results))


def check_written(directory: Path, baseline: Checkpoint, progress: Progress) -> None:
    """Check the tokenizer of what was just made of ``baseline``, as ``verify`` does.

    Notes where the tokenizer can't be loaded here. Raises QuantkitError for what ``verify`` would
    find wrong.
    """
    checks = ArtifactChecks(directory, directory, open_artifact(directory), baseline)
    found: list[Check] = []
    if has_vocabulary(baseline.tokenizer):
        try:
            found += checks.tokenizer()
        except QuantkitError as error:
            progress.note(f"the tokenizer wasn't compared with the model's: {error}")
    for check in found:
        if check.passed is False:
            raise QuantkitError(
                f"what was made of it isn't right ({check.name}: {check.detail}), and nothing was "
                "written",
                where=str(baseline.directory),
                fix="Is its tokenizer complete, in files that transformers knows? Then please "
                "report this.",
            )


@dataclass
class ArtifactChecks:
    """The checks of one artifact. target: the path that engines load; source: its weights."""

    path: Path
    target: Path
    source: Weights
    baseline: Checkpoint | None

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def files(self, task: Task | None = None) -> Iterator[Check]:
        """Every file has the digest that the manifest lists, and no file is missing or extra."""
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        if manifest is None:
            yield Check("digests", None, "no quantkit.json to compare the files with")
            yield from self._shards()
            return
        recorded = manifest.files
        present = self._present({name.partition("/")[0] for name in recorded if "/" in name})
        known = [file for name, file in present.items() if name in recorded]
        current = digests(known, self.path)
        changed = [name for name, value in current.items() if value != recorded[name].sha256]
        yield _check(
            "digests", changed, f"{len(current)} files have the digests of {MANIFEST}", "changed"
        )
        yield _check(
            "files missing", sorted(recorded.keys() - present.keys()), "none", "the manifest names"
        )
        yield _check(
            "files extra", sorted(present.keys() - recorded.keys()), "none", "not in the manifest"
        )

    def _present(self, folders: set[str]) -> dict[str, Path]:
        """The files of the artifact and of these folders of it, by their path in it."""
        present: dict[str, Path] = {}
        for path in self.path.iterdir():
            inside = path.rglob("*") if path.name in folders and path.is_dir() else None
            for file in [path] if inside is None else (p for p in inside if p.is_file()):
                present[file.relative_to(self.path).as_posix()] = file
        return {name: file for name, file in present.items() if name not in _NOT_LISTED}

    def _shards(self) -> Iterator[Check]:
        """Each tensor is in the shard that the index names."""
        index = self.directory / INDEX_FILE
        if gguf_files(self.path) or not index.is_file():
            return
        if self.source.files == [self.directory / SINGLE_FILE]:  # the index is a leftover
            return
        stored = _checkpoint(self.source).entries
        listed: dict[str, str] = read_json(index).get("weight_map", {})
        misplaced = [
            key
            for key in stored.keys() | listed.keys()
            if key not in stored or listed.get(key) != stored[key].file.name
        ]
        yield _check(
            "shards", sorted(misplaced), "hold what the index lists", "the index is wrong for"
        )

    def tensors(self, task: Task) -> Iterator[Check]:
        """Shapes are those of the model, and every value is finite."""
        yield self.shapes()
        broken, count = [], 0
        for key in self.source.keys():  # noqa: SIM118 (it's no dictionary)
            task.advance(0, doing=key)
            count += 1
            if not all(bool(piece.isfinite().all()) for piece in self._pieces(key)):
                broken.append(key)
        yield _check("finite", broken, f"{count} tensors", "NaN or infinity in")

    def shapes(self) -> Check:
        """Every tensor of the model is there, in its shape, and no other."""
        if self.baseline is None and isinstance(self.source, GgufWeights):
            return Check("shapes", None, "no baseline to compare them with")
        model = self.baseline or self.source
        try:
            skeleton = Skeleton(model, weights=self.source)
        except InputError as error:
            return Check("shapes", False, error.what)
        origin = "the baseline" if self.baseline else "config.json"
        return Check("shapes", True, f"{len(set(skeleton.names.values()))} as {origin} has them")

    def _pieces(self, key: str) -> Iterator[torch.Tensor]:
        """A tensor's weights in float32; those of a vocabulary in pieces of so many rows."""
        shape = self.source.shape(key)
        packed = isinstance(self.source, PackedCheckpoint) and key in self.source.quantized()
        if packed or len(shape) < 2 or shape[0] <= _ROWS_AT_ONCE:
            yield self.source.read(key).float()
            return
        for start in range(0, shape[0], _ROWS_AT_ONCE):
            yield self.source.read_rows(key, start, start + _ROWS_AT_ONCE).float()

    def tokenizer(self, task: Task | None = None) -> Iterator[Check]:
        """The same texts and chats become the same ids as the baseline's.

        The ids of a GGUF file are compared in ``answers``: only llama.cpp reads its tokenizer.
        """
        if self.baseline is None:
            yield Check("tokens", None, "no baseline to compare with")
            return
        original = load_tokenizer(self.baseline.tokenizer)
        if isinstance(self.source, GgufWeights):
            metadata = self.source.header.metadata
            written = templates_of(metadata)
            template: Any = written.get("default")
            if isinstance(original.chat_template, dict):
                names = original.chat_template
                # Of names that GGUF can't tell apart one is written, as the plan says.
                last = {template_key(name): name for name in sorted(names)}
                template = {
                    name: written.get(key) if last[key := template_key(name)] == name else text
                    for name, text in names.items()
                }
            yield from tokenizer_checks.compare_template(original, original, template)
            yield tokenizer_checks.compare_special_ids(original, metadata)
            return
        try:
            own = load_tokenizer(self.directory)
        except InputError as error:
            yield Check("tokens", False, error.what)
            return
        yield from tokenizer_checks.compare_template(original, own, own.chat_template)
        texts = tokenizer_checks.sample_texts(original)
        yield tokenizer_checks.compare_ids(
            texts, *([t.encode(x) for x in texts] for t in (original, own))
        )

    def answers(self, engine: str) -> Iterator[Check]:
        """The engine loads the artifact and answers prompts with more than one token repeated."""
        is_gguf = isinstance(self.source, GgufWeights)
        tokenizer = None
        if self.baseline is not None:
            tokenizer = load_tokenizer(self.baseline.tokenizer)
        elif not is_gguf:
            tokenizer = load_tokenizer(self.directory)
        texts = []
        if tokenizer is not None and self.baseline is not None and engine == LLAMACPP:
            texts = tokenizer_checks.sample_texts(tokenizer, self._marks_beginnings())
        asked = (
            tokenizer_checks.sample_prompts(tokenizer)
            if tokenizer
            else list(tokenizer_checks.PLAIN)
        )
        model = self.baseline.tokenizer if self.baseline else self.directory
        end = end_tokens(model, tokenizer) if tokenizer else []
        given = [self._for_llama_cpp(tokenizer, text) for text in texts]
        trial = Trial(str(self.target), engine, tuple(asked), _NEW_TOKENS, tuple(end), tuple(given))
        try:
            answers = run_trial(trial)
        except InputError as error:
            yield Check("loads", False, error.what)
            return
        yield Check("loads", True, f"in {engine}")
        if tokenizer is not None and texts:
            check = tokenizer_checks.compare_ids(
                texts, [tokenizer.encode(t) for t in texts], answers.tokens
            )
            after_space = sum(text != own for text, own in zip(texts, given, strict=True))
            if check.passed and after_space:
                more = f", {after_space} of them only after a space: llama.cpp marks no beginnings"
                check = replace(check, detail=check.detail + more)
            yield check
        elif is_gguf and self.baseline is not None:
            yield Check("tokens", None, f"{engine} doesn't tokenize; use --engine {LLAMACPP}")
        if answers.finite is not None:
            yield Check("logits", answers.finite, "finite" if answers.finite else "NaN or infinity")
        yield check_answers(answers.ids, tokenizer)

    def _marks_beginnings(self) -> bool:
        """Whether llama.cpp marks a text's beginning even before a space, as SentencePiece does."""
        metadata = self.source.header.metadata if isinstance(self.source, GgufWeights) else {}
        return metadata.get("tokenizer.ggml.model") == "llama"

    def _for_llama_cpp(self, tokenizer: Any, text: str) -> str:
        """The text, after a space where only the tokenizer marks the beginning of a text.

        llama.cpp marks that of text after special tokens too, or none; plans have a note on it.
        """
        metadata = self.source.header.metadata if isinstance(self.source, GgufWeights) else {}
        if metadata.get("tokenizer.ggml.add_space_prefix") is not False:
            return text
        bare, spaced, ids = (
            tokenizer.encode(each, add_special_tokens=False) for each in ("a", " a", text)
        )
        begins_special = bool(ids) and ids[0] in tokenizer.added_tokens_decoder
        return text if bare != spaced or begins_special else f" {text}"


def check_answers(answers: list[list[int]], tokenizer: Any) -> Check:
    """Fails where every answer, given as token ids, is empty or one token repeated."""
    lively = [ids for ids in answers if ids and (len(ids) < _LOOP or len(set(ids)) > 1)]
    shown = lively[0] if lively else answers[0]
    text = repr(tokenizer.decode(shown)) if tokenizer else f"tokens {shown}"
    if not lively:
        return Check("speaks", False, f"all answers are empty or one token repeated: {text}")
    return Check("speaks", True, f"{len(lively)} of {len(answers)} prompts: {text}")


def _check(name: str, failures: list[str], passed: str, failed: str) -> Check:
    """A check that fails where there are ``failures``, with the first of them as its detail."""
    if not failures:
        return Check(name, True, passed)
    more = f" and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else ""
    return Check(name, False, f"{failed} {', '.join(failures[:_SHOWN])}{more}")


def _checkpoint(source: Weights) -> Checkpoint:
    if isinstance(source, PackedCheckpoint):
        return source.checkpoint
    if isinstance(source, Checkpoint):
        return source
    raise TypeError(f"{type(source).__name__} isn't in safetensors")
