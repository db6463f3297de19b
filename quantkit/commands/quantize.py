"""quantize: recipe + checkpoint → artifact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from quantkit.artifact.manifest import read_manifest, run_record, write_manifest
from quantkit.artifact.records import (
    checkpoint_digests,
    quantized_manifest,
    record_adapter,
    weight_files,
)
from quantkit.assembly.completeness import fates, gguf_fates
from quantkit.assembly.gguf import write_gguf
from quantkit.assembly.journal import unfinished
from quantkit.assembly.run import Run, describe_inputs
from quantkit.assembly.safetensors import write_safetensors
from quantkit.base.errors import InputError, QuantkitError
from quantkit.base.files import hash_ahead
from quantkit.base.output import check_output
from quantkit.base.parallel import return_large_blocks
from quantkit.base.progress import Progress
from quantkit.base.version import __version__
from quantkit.calibration.text import Rows, load_tokenizer, pack_rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import check_sidecars
from quantkit.checkpoint.source import locate_model, model_name
from quantkit.checkpoint.weights import TensorSource
from quantkit.commands.verify import check_written
from quantkit.documents.dataset import check_exists, digest_of
from quantkit.engines.compatibility import loading_of
from quantkit.formats.format import Contents
from quantkit.formats.packed import open_artifact
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.lora.open import Weighted, adapt, check_alone
from quantkit.model.device import begin_using, resolve_devices
from quantkit.model.limits import Limits, check_length
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream, slices
from quantkit.model.text_only import TextOnly
from quantkit.model.tying import settle_tying
from quantkit.plan.base import Plan
from quantkit.plan.gguf import GgufFilePlan
from quantkit.plan.held import check_scales
from quantkit.plan.linears import LinearPlan
from quantkit.plan.recipe import plan_recipe
from quantkit.recipes.recipe import LoadedRecipe
from quantkit.results.manifest import MANIFEST, LayerReport, QuantizedManifest

_CHECKED_TOKENS = 64
_SLACK = 1.01  # headers, tokenizer, manifest


@dataclass(frozen=True)
class Job:
    """Everything that is decided before work starts.

    model: as the user named it; name: its last part, without path and revision.
    """

    loaded: LoadedRecipe
    model: str
    name: str
    checkpoint: Checkpoint
    plan: Plan

    @property
    def limits(self) -> Limits:
        """What the model can read."""
        linears = self.plan.linears if isinstance(self.plan, GgufFilePlan) else self.plan
        if isinstance(linears, LinearPlan):
            return Limits.of(linears.skeleton, self.checkpoint)
        return Limits.of(Skeleton(self.checkpoint), self.checkpoint)

    @property
    def demands(self) -> int:
        """Rank in a sweep: the Gram matrix goes first, since it gives all other statistics too."""
        if self.loaded.recipe.calibration is None:
            return 2
        needs = self.loaded.recipe.quantize.needs()
        return 0 if needs is not None and needs.kind == "gram" else 1


def prepare(
    loaded: LoadedRecipe,
    model: str,
    adapters: Sequence[Weighted] = (),
    *,
    strict: bool = False,
    text_only: bool = False,
    device: str | None = None,
) -> Job:
    """Open the checkpoint, plan every tensor, and refuse what can't be done. Writes nothing.

    model: a directory, a hub id or 'demo'; adapters: folded in as tensors are read, without a
    merged copy on disk; strict: warnings about adapters are errors; text_only: leave out what is
    for images and sound; device: what the work will be done on, for which the slow beginnings are
    made meanwhile (None: no work will be done).

    Raises InputError, and MachineError for a device that isn't there.
    """
    if device is not None:
        begin_using(resolve_devices(device))
    checkpoint = Checkpoint(locate_model(model))
    if device is not None:
        hash_ahead(checkpoint.files)
    if quantization := checkpoint.config.get("quantization_config"):
        raise InputError(
            f"is quantized already ({quantization.get('quant_method', 'unknown method')})",
            subject=str(checkpoint.directory),
            fix="Quantize the original BF16 checkpoint instead.",
        )
    check_sidecars(checkpoint.directory)
    settle_tying(checkpoint)
    notes: tuple[str, ...] = ()
    if text_only:
        check_alone(adapters)
        checkpoint = TextOnly(checkpoint)
        notes = (checkpoint.remark,)
    if adapters:
        checkpoint = _adapted(checkpoint, adapters, model, strict=strict)
    dataset = loaded.calibration_dataset()
    if dataset is not None:
        check_exists(dataset)
    name = model_name(model)
    plan = plan_recipe(loaded.recipe, checkpoint, name)
    plan = replace(plan, notes=(*notes, *plan.notes))
    check_scales(plan, checkpoint)
    job = Job(loaded, model, name, checkpoint, plan)
    if settings := loaded.recipe.calibration:
        check_length(settings.sequence_length, job.limits, "calibration")
    if loaded.recipe.target is not None:
        _check_target(loaded.recipe.target, plan)
    return job


def _check_target(target: str, plan: Plan) -> None:
    """Raise InputError where the engine that the recipe is for wouldn't load the artifact.

    What only its CPU build is known to refuse may pass: it may run on a GPU.
    """
    contents = Contents()
    if isinstance(plan, LinearPlan):
        contents = Contents(
            list(plan.schemes.values()),
            [tensor.shape for tensor in plan.tensors if tensor.quantized],
            plan.quantization_config.get("format"),
        )
    engines = loading_of(plan.format, contents)
    [loading] = [engine for engine in engines if engine.engine.lower() == target]
    if loading.loads == "no" and not loading.why.startswith("on CPU"):
        able = [engine.engine for engine in engines if engine.loads == "yes"]
        raise InputError(
            f"{loading.engine} doesn't load {plan.method} in the format {plan.format}: "
            f"{loading.why}",
            where="target",
            fix=f"Change the scheme or the format, or name another target: {', '.join(able)}. "
            "docs/artifacts.md lists which engine loads what.",
        )


def _adapted(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    model: str,
    *,
    strict: bool,
) -> AdaptedCheckpoint:
    """The checkpoint with adapters folded in. Raises InputError where it must be merged first."""
    checkpoint = adapt(base, adapters, model, strict=strict)
    if checkpoint.resized:
        raise InputError(
            "resizes the vocabulary, which needs a merged checkpoint first",
            where=", ".join(name for name, _ in adapters),
            fix="Run quantkit merge, then quantize the result.",
        )
    return checkpoint


def quantize(
    job: Job,
    out: Path,
    *,
    device: str,
    force: bool,
    progress: Progress,
    memory_budget: int | None = None,
    cache: bool = True,
    resume: bool = True,
    background: bool | None = None,
) -> QuantizedManifest:
    """Make the artifact at ``out``; returns its manifest.

    Blocks that an earlier run of the same inputs left finished in ``OUT.partial`` are kept.

    device: auto, cpu, cuda, cuda:N or several, as in cuda:0,1; force: replace an artifact that is
    there; memory_budget: bytes of calibration hidden states to keep in memory, the rest goes to
    disk (default: half of the free memory); cache: use the statistics of earlier calibrations, and
    keep this one's; resume: keep hidden states on disk, so that a stopped run needn't calibrate
    again; background: write beside the work (default: on any device but the CPU).

    Raises QuantkitError. Finished blocks are kept then, unless the inputs were at fault.
    """
    started = time.monotonic()
    return_large_blocks()
    devices = resolve_devices(device)
    check_artifact_output(job, out, force=force)
    for note in job.plan.notes:
        progress.note(note)
    rows = _calibration_rows(job, progress)
    inputs, files = describe_inputs(job.checkpoint, rows, job.loaded.recipe.digest, devices)
    with unfinished(out, inputs, force=force, progress=progress) as (directory, journal):
        if not journal.done:
            adapted = job.checkpoint if isinstance(job.checkpoint, AdaptedCheckpoint) else None
            for warning in adapted.warnings if adapted else ():
                progress.note(warning)
            job.checkpoint.sidecars.copy(directory)
            budget = memory_budget or psutil.virtual_memory().available // 2
            run = Run(
                checkpoint=job.checkpoint,
                rows=rows,
                devices=devices,
                directory=directory,
                journal=journal,
                progress=progress,
                budget=budget,
                inputs=inputs,
                cache=cache,
                resume=resume,
                background=devices[0].type != "cpu" if background is None else background,
            )
            layers = _write(run, job)
            _write_manifest(run, job, files, layers, started)
            check_written(directory, job.checkpoint, progress)
        manifest = read_manifest(directory)
        assert isinstance(manifest, QuantizedManifest)
        return manifest


def check_artifact_output(job: Job, out: Path, *, force: bool) -> None:
    """Refuse an output directory as ``check_output`` does. Raises InputError or MachineError."""
    needed = int(job.plan.nbytes * _SLACK)
    check_output(out, "an artifact", MANIFEST, force=force, needed=needed)


def _write_manifest(
    run: Run,
    job: Job,
    source_files: dict[str, str],
    layers: Sequence[LayerReport],
    started: float,
) -> None:
    tensors = None
    if isinstance(job.plan, LinearPlan):
        rescaled = {key for step in run.journal.steps for key in step.rescaled}
        tensors = fates(job.plan, job.checkpoint, rescaled)
    elif isinstance(job.plan, GgufFilePlan):
        tensors = gguf_fates(job.plan, job.checkpoint)
    manifest = quantized_manifest(
        run.directory,
        recipe=job.loaded.recipe,
        source=job.checkpoint,
        source_files=source_files,
        rows=run.rows,
        plan=job.plan,
        layers=layers,
        tensors=tensors,
    )
    recipe = str(job.loaded.path.resolve())
    record = run_record(
        started, model=job.model, device=",".join(map(str, run.devices)), recipe=recipe
    )
    write_manifest(run.directory, manifest, record)


def made_already(job: Job, out: Path) -> QuantizedManifest | None:
    """The manifest at ``out``, where that is the artifact of this job; otherwise None."""
    manifest = read_manifest(out) if out.is_dir() else None
    if not isinstance(manifest, QuantizedManifest):
        return None
    adapted = job.checkpoint if isinstance(job.checkpoint, AdaptedCheckpoint) else None
    adapters = tuple(record_adapter(adapter) for adapter in (adapted.adapters if adapted else ()))
    same = (
        manifest.quantkit == __version__
        and manifest.recipe.digest == job.loaded.recipe.digest
        and manifest.source.files == checkpoint_digests(job.checkpoint)
        and manifest.adapters == adapters
        and _same_text(job, manifest)
    )
    return manifest if same else None


def _same_text(job: Job, manifest: QuantizedManifest) -> bool:
    dataset = job.loaded.calibration_dataset()
    known = manifest.calibration.dataset_sha256 if manifest.calibration else None
    return known == (None if dataset is None else digest_of(dataset))


def _write(run: Run, job: Job) -> list[LayerReport]:
    plan = job.plan
    if isinstance(plan, GgufFilePlan):
        layers = write_gguf(run, plan, job.name)
    else:
        assert isinstance(plan, LinearPlan)
        layers = write_safetensors(run, plan)
    # Beside the check, which reads them too.
    hash_ahead(weight_files(run.directory))
    # ggml's own tensors were decoded again and compared when they were written.
    linears = plan.linears if isinstance(plan, GgufFilePlan) else plan
    if linears is not None:
        _check_runs(linears.skeleton, run, job.loaded.recipe.name)
    return layers


def _calibration_rows(job: Job, progress: Progress) -> Rows | None:
    settings, dataset = job.loaded.recipe.calibration, job.loaded.calibration_dataset()
    if settings is None or dataset is None:
        return None
    rows = pack_rows(
        dataset,
        load_tokenizer(job.checkpoint.tokenizer),
        sequence_length=settings.sequence_length,
        rows=settings.samples,
        seed=settings.seed,
        bos=settings.bos,
        limits=job.limits,
    )
    progress.note(f"calibration text: {rows.found}")
    if rows.remark is not None:
        progress.note(f"calibration {rows.remark}: set calibration.bos to true")
    if rows.count < settings.samples:
        name = dataset.name if isinstance(dataset, Path) else str(dataset)
        progress.note(
            f"{name} fills only {rows.count} of the recipe's {settings.samples} calibration rows"
        )
    return rows


def _check_runs(skeleton: Skeleton, run: Run, recipe: str) -> None:
    """One streamed forward on what was written must give finite logits."""
    limits = Limits.of(skeleton, run.checkpoint)
    length = min(_CHECKED_TOKENS, limits.positions or _CHECKED_TOKENS)
    ids = torch.arange(length)[None] % limits.vocabulary
    if run.rows is not None:
        ids = run.rows.ids[:1, :_CHECKED_TOKENS]

    def finite(source: TensorSource) -> bool:
        stream = Stream(skeleton, source, run.device)
        batches = stream.begin(ids, 1)
        for index in range(len(skeleton.layers)):
            with stream.block(index) as block:
                stream.advance(index, block, batches)
        with stream.head() as logits:
            return all(
                bool(logits(batch, part).isfinite().all())
                for batch in batches
                for part in slices(stream.vocabulary)
            )

    if finite(open_artifact(run.directory, run.device)):
        return
    if not finite(run.checkpoint):
        raise InputError(
            "the model itself gives logits that aren't finite, before anything is quantized",
            subject=str(run.checkpoint.directory),
            fix="Is its config.json right (rope_theta, rms_norm_eps, dtype)? transformers would "
            "compute the same.",
        )
    raise QuantkitError(
        "the quantized model's logits aren't finite, and nothing was written",
        where=recipe,
        fix="Try another method or more bits.",
    )
