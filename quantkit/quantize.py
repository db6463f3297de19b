"""quantize: recipe + checkpoint → artifact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.text import Rows, check_length, load_tokenizer, no_such_dataset, pack
from quantkit.checkpoint.adapted import AdaptedCheckpoint
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import copy_sidecars, write_config
from quantkit.checkpoint.source import locate, model_name
from quantkit.checkpoint.writer import TensorWriter, check_output, new_directory, write_json
from quantkit.errors import InputError, QuantkitError, not_finite
from quantkit.formats import packed
from quantkit.manifest import Provenance, write_manifest
from quantkit.model.adapt import Weighted, adapt, tokenizer_directory
from quantkit.model.device import resolve_device
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream, slices
from quantkit.plan import GgufFilePlan, LinearPlan, Plan, plan_gguf, plan_linears
from quantkit.progress import Progress
from quantkit.quantizers.block import BlockResult, LayerReport, quantize_block
from quantkit.recipe import Awq, Ggml, Gptq, Loaded

_CHECKED_TOKENS = 64
_SLACK = 1.01  # headers, tokenizer, manifest


@dataclass(frozen=True)
class Job:
    """Everything decided before work starts. ``name``: the model's, without its path."""

    loaded: Loaded
    model: str
    name: str
    checkpoint: Checkpoint
    plan: Plan


def prepare(
    loaded: Loaded, model: str, adapters: Sequence[Weighted] = (), *, strict: bool = False
) -> Job:
    """Find the checkpoint, plan every tensor, refuse what can't be done. Writes nothing.

    ``adapters`` are folded in as tensors are read, so that no merged copy ever lies on disk.
    """
    checkpoint = Checkpoint(locate(model))
    if quantization := checkpoint.config.get("quantization_config"):
        raise InputError(
            f"is quantized already ({quantization.get('quant_method', 'unknown method')})",
            where=str(checkpoint.directory),
            mend="Quantize the original BF16 checkpoint instead.",
        )
    if adapters:
        checkpoint = _adapted(checkpoint, adapters, model, loaded, strict=strict)
    if settings := loaded.recipe.calibration:
        check_length(settings.sequence_length, checkpoint.config, "calibration")
    dataset = loaded.calibration_dataset()
    if dataset is not None and not dataset.is_file():
        raise no_such_dataset(dataset)
    method = loaded.recipe.quantize
    name = model_name(model)
    plan: Plan
    if isinstance(method, Ggml):
        plan = plan_gguf(method, checkpoint, name)
    else:
        plan = plan_linears(method, Skeleton(checkpoint), checkpoint)
    return Job(loaded, model, name, checkpoint, plan)


def _adapted(
    base: Checkpoint, adapters: Sequence[Weighted], model: str, loaded: Loaded, *, strict: bool
) -> AdaptedCheckpoint:
    """The checkpoint with the adapters in it, where quantizing can do without a merged copy."""
    checkpoint = adapt(base, adapters, model, strict=strict)
    alone = isinstance(loaded.recipe.quantize, Ggml) and checkpoint.brings is not None
    if checkpoint.resized or alone:
        what = "resizes the vocabulary" if checkpoint.resized else "brings a tokenizer of its own"
        raise InputError(
            f"{what}, which needs a merged checkpoint first",
            where=", ".join(name for name, _ in adapters),
            mend="Run quantkit merge, then quantize the result.",
        )
    return checkpoint


def quantize(
    job: Job, out: Path, *, device: str, force: bool, progress: Progress
) -> dict[str, Any]:
    """Make the artifact at ``out``; returns its manifest.

    Raises QuantkitError; nothing is left behind then.
    """
    started = time.monotonic()
    where = resolve_device(device)
    check_output(out, force=force, needed=int(job.plan.nbytes * _SLACK))
    rows = _calibration_rows(job, progress)
    with new_directory(out) as directory:
        adapted = job.checkpoint if isinstance(job.checkpoint, AdaptedCheckpoint) else None
        for warning in adapted.warnings if adapted else ():
            progress.note(warning)
        copy_sidecars(job.checkpoint.directory, directory, adapted.brings if adapted else None)
        if isinstance(job.plan, GgufFilePlan):
            layers = _write_gguf(job, job.plan, rows, where, directory, progress)
        elif isinstance(job.plan, LinearPlan):
            layers = _write_linears(job, job.plan, rows, where, directory, progress)
        else:
            raise TypeError(f"no way to write a {type(job.plan).__name__}")
        _check_runs(job, directory, rows)
        provenance = Provenance(job.loaded, job.model, job.checkpoint, rows, str(where))
        return write_manifest(directory, provenance, job.plan, layers, started)


def _calibration_rows(job: Job, progress: Progress) -> Rows | None:
    settings, dataset = job.loaded.recipe.calibration, job.loaded.calibration_dataset()
    if settings is None or dataset is None:
        return None
    rows = pack(
        dataset,
        load_tokenizer(tokenizer_directory(job.checkpoint)),
        sequence_length=settings.sequence_length,
        rows=settings.samples,
        seed=settings.seed,
    )
    if rows.count < settings.samples:
        progress.note(
            f"{dataset.name} fills {rows.count} of the {settings.samples} calibration rows wanted"
        )
    return rows


def _write_linears(
    job: Job,
    plan: LinearPlan,
    rows: Rows | None,
    device: torch.device,
    directory: Path,
    progress: Progress,
) -> list[LayerReport]:
    """Quantize block by block into safetensors."""
    method, skeleton = plan.settings, plan.skeleton
    stream = Stream(skeleton, job.checkpoint, device)
    calibration = None
    if rows is not None and isinstance(method, Gptq | Awq):
        folds = isinstance(method, Awq)
        calibration = CalibrationPass(stream, rows, "gram", folds=folds)
    layers: list[LayerReport] = []
    count = len(skeleton.layers)
    steps = count * (1 + (len(calibration.batches) if calibration else 0))
    keys = [key for t in plan.tensors for key in (t.name, *packed.packed_keys(plan.format, t.name))]
    with (
        TensorWriter(directory, keys) as writer,
        progress.task(f"quantize ({plan.method})", steps) as task,
    ):
        for key in plan.outside:
            writer.add({key: _read_finite(job.checkpoint, key)})
        for index in range(count):
            doing = f"layer {index + 1} of {count}"
            with stream.block(index) as block:
                step = partial(task.advance, doing=f"{doing}, calibrating")
                measured = calibration.through(index, block, step) if calibration else ([], [])
                prefix = skeleton.layer_name(index) + "."
                schemes = plan.schemes_under(prefix)
                result = quantize_block(method, block, schemes, *measured, prefix)
            _write_block(job.checkpoint, plan, prefix, result, writer)
            layers += result.layers
            task.advance(doing=doing)
    write_config(directory, job.checkpoint.config, plan.quantization_config)
    if plan.format == "gptq":
        write_json(directory / "quantize_config.json", plan.quantization_config)
    return layers


def _write_block(
    checkpoint: Checkpoint, plan: LinearPlan, prefix: str, result: BlockResult, writer: TensorWriter
) -> None:
    """Write one block: what was quantized, what was rescaled, and the rest as it was."""
    for name, key in plan.skeleton.names.items():
        if not name.startswith(prefix):
            continue
        within = name.removeprefix(prefix)
        quantized = result.tensors.get(within.removesuffix(".weight"))
        if quantized is not None and within.endswith(".weight"):
            writer.add(packed.pack(plan.format, key, quantized))
        elif within in result.changed:
            writer.add({key: result.changed[within]})
        else:
            writer.add({key: _read_finite(checkpoint, key)})


def _read_finite(checkpoint: Checkpoint, key: str) -> Tensor:
    """Read a tensor that is kept as it is. Raises InputError if it holds NaN or infinity."""
    tensor = checkpoint.read(key)
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise not_finite(key)
    return tensor


def _write_gguf(
    job: Job,
    plan: GgufFilePlan,
    rows: Rows | None,
    device: torch.device,
    directory: Path,
    progress: Progress,
) -> list[LayerReport]:
    """Write the one file, with importance weights where there are calibration rows."""
    from quantkit.formats.gguf_file import write_file

    importance = {}
    if rows is not None:
        importance = _importance(job, rows, device, progress)
    path = directory / f"{job.name}-{plan.file.mix.upper()}.gguf"
    with progress.task(f"quantize ({plan.file.mix})", len(plan.file.tensors)) as task:
        written = write_file(path, plan.file, job.checkpoint, importance.get, progress=task)
    return [
        LayerReport(tensor.name, tensor.type, tensor.error, "weights", tensor.weighted_error)
        for tensor in written
    ]


def _importance(
    job: Job, rows: Rows, device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """Mean square of each input feature, by the checkpoint key of the weight that reads it."""
    skeleton = Skeleton(job.checkpoint)
    stream = Stream(skeleton, job.checkpoint, device)
    calibration = CalibrationPass(stream, rows, "diagonal", folds=False)
    count = len(skeleton.layers)
    found = {}
    with progress.task("importance weights", count * len(calibration.batches)) as task:
        for index in range(count):
            step = partial(task.advance, doing=f"layer {index + 1} of {count}")
            with stream.block(index) as block:
                inputs, _ = calibration.through(index, block, step)
            for group in inputs:
                for consumer in group.consumers:
                    key = skeleton.key(f"{skeleton.layer_name(index)}.{consumer}.weight")
                    found[key] = (group.moment / group.tokens).cpu()
    return found


def _check_runs(job: Job, directory: Path, rows: Rows | None) -> None:
    """One streamed forward on what was written must give finite logits."""
    skeleton = Skeleton(job.checkpoint)
    stream = Stream(skeleton, packed.open_artifact(directory), torch.device("cpu"))
    ids = torch.arange(_CHECKED_TOKENS)[None] % stream.vocabulary
    if rows is not None:
        ids = rows.ids[:1, :_CHECKED_TOKENS]
    batches = stream.begin(ids, 1)
    for index in range(len(skeleton.layers)):
        with stream.block(index) as block:
            stream.advance(index, block, batches)
    with stream.head() as logits:
        finite = all(
            bool(logits(batch, part).isfinite().all())
            for batch in batches
            for part in slices(stream.vocabulary)
        )
    if not finite:
        raise QuantkitError(
            "the quantized model's logits aren't finite; nothing was written",
            where=job.loaded.recipe.name,
            mend="Try another method or more bits.",
        )
