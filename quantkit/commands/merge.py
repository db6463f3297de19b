"""merge: checkpoint + LoRA adapters → checkpoint, proven equal to the adapters at run time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from quantkit.artifact.machine import library_versions
from quantkit.artifact.manifest import run_record, write_manifest
from quantkit.artifact.records import (
    checkpoint_digests,
    record_adapter,
    record_files,
    weights_bytes,
)
from quantkit.assembly.completeness import check_stored, merge_fates
from quantkit.base.errors import InputError
from quantkit.base.output import check_output, new_directory
from quantkit.base.progress import Progress
from quantkit.base.version import __version__
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import check_sidecars, write_config
from quantkit.checkpoint.source import locate_model
from quantkit.checkpoint.writer import TensorWriter
from quantkit.commands.verify import check_written
from quantkit.formats.packed import PackedCheckpoint
from quantkit.judging.merge_proof import PASSES, prove
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.lora.open import Weighted, adapt
from quantkit.model.tying import settle_tying
from quantkit.results.manifest import (
    MANIFEST,
    MERGE,
    AdapterRecord,
    MergedManifest,
    MergeProof,
    SourceRecord,
    VocabularyRecord,
)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_SLACK = 1.01  # headers, tokenizer, manifest


def merge(
    base: str,
    adapters: Sequence[Weighted],
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    strict: bool = False,
    proof: bool = True,
    dequantize_base: bool = False,
    force: bool = False,
    progress: Progress,
) -> MergedManifest:
    """Write ``base`` with the adapters merged into it to ``out``; returns the manifest.

    base: a directory, a hub id or 'demo'; adapters: the same, each with its weight; dtype: of the
    result, "float32", "float16" or "bfloat16" (None: each tensor keeps its own); max_shard_size:
    bytes (None: shards as large as the base's); strict: warnings are errors; proof: compare the
    result's logits with those of base and adapter at run time; dequantize_base: unpack a
    bitsandbytes base first.

    Raises InputError for a base or an adapter that can't be merged and for an output that exists
    (without ``force``), MachineError for want of disk space, QuantkitError where the proof fails.
    Nothing is left behind then.
    """
    started = time.monotonic()
    if not adapters:
        raise InputError(
            "is required", subject="ADAPTER", fix="Name at least one adapter directory."
        )
    checkpoint = _open_base(base, dequantize=dequantize_base)
    check_sidecars(checkpoint.directory)
    settle_tying(checkpoint)
    target = None if dtype is None else _dtype(dtype)
    adapted = adapt(checkpoint, adapters, base, dtype=target, strict=strict)
    for warning in adapted.warnings:
        progress.note(warning)
    needed = int(adapted.nbytes() * _SLACK)
    check_output(out, "an artifact", MANIFEST, force=force, needed=needed)
    with new_directory(out) as directory, ThreadPoolExecutor(1) as pool:
        source = pool.submit(checkpoint_digests, checkpoint)
        records = [pool.submit(record_adapter, adapter) for adapter in adapted.adapters]
        _write(adapted, directory, max_shard_size or _largest_shard(adapted), progress)
        check_stored(directory, adapted.entries)
        adapted.sidecars.copy(directory)
        write_config(directory, adapted.config, None)
        result = _prove(adapted, directory, progress) if proof else None
        manifest = _manifest(directory, adapted, source, records, result)
        names = [str(adapter.directory) for adapter in adapted.adapters]
        run = run_record(started, model=base, device="cpu", adapters=names)
        write_manifest(directory, manifest, run)
        check_written(directory, adapted, progress)
        return manifest


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        known = ", ".join(DTYPES)
        raise InputError(f"unknown dtype {name}", where="--dtype", fix=f"Choose one of {known}.")
    return DTYPES[name]


def _open_base(model: str, *, dequantize: bool) -> Checkpoint:
    checkpoint = Checkpoint(locate_model(model))
    quantization = checkpoint.config.get("quantization_config")
    if not quantization:
        return checkpoint
    method = str(quantization.get("quant_method", "unknown method"))
    if dequantize and method == "bitsandbytes":
        return _Unpacked(PackedCheckpoint(checkpoint))
    raise InputError(
        f"is quantized already ({method}): an adapter added to rounded weights is rounded again",
        subject=str(checkpoint.directory),
        fix="Merge into the BF16 checkpoint that it was made from, then quantize the result."
        + (
            " Or pass --dequantize-base to merge into its unpacked weights."
            if method == "bitsandbytes"
            else ""
        ),
    )


class _Unpacked(Checkpoint):
    """A packed checkpoint as a plain one: its weights in the shapes that the model has.

    Weights that were packed are read in float32; their entries give the config's dtype, which is
    what they become unless the merge gives another.
    """

    def __init__(self, packed: PackedCheckpoint) -> None:
        inner = packed.checkpoint
        self._packed = packed
        self.directory, self.files = inner.directory, inner.files
        self.config = {k: v for k, v in inner.config.items() if k != "quantization_config"}
        name = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        dtype = DTYPES.get(name, torch.bfloat16)
        quantized = set(packed.quantized())
        self.entries = {}
        for key in packed.keys():  # noqa: SIM118 (it's no dictionary)
            if key in quantized:
                shape = packed.shape(key)
                size = math.prod(shape) * dtype.itemsize
                self.entries[key] = dataclasses.replace(
                    inner.entries[key], dtype=dtype, shape=shape, nbytes=size
                )
            else:
                self.entries[key] = inner.entries[key]

    def read(self, key: str) -> Tensor:
        return self._packed.read(key)


def _largest_shard(adapted: AdaptedCheckpoint) -> int:
    """Bytes of the largest shard, were every tensor in the shard where the base has it."""
    sizes: dict[Path, int] = {}
    for entry in adapted.entries.values():
        sizes[entry.file] = sizes.get(entry.file, 0) + entry.nbytes
    return max(sizes.values())


def _write(
    adapted: AdaptedCheckpoint, directory: Path, shard_bytes: int, progress: Progress
) -> None:
    """Write every tensor, in the order of the base's files."""
    keys = sorted(
        adapted.entries, key=lambda k: (adapted.entries[k].file, adapted.entries[k].start, k)
    )
    with (
        TensorWriter(directory, keys, shard_bytes) as writer,
        progress.task("merge", len(keys)) as task,
    ):
        for key, tensor in _read_ahead(adapted, keys):
            writer.add({key: tensor})
            task.advance(doing=key)


def _read_ahead(adapted: AdaptedCheckpoint, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its key. While one is written, the next is read and merged."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(adapted.read, keys[0])
        for key, following in zip(keys, [*keys[1:], None], strict=True):
            tensor = upcoming.result()
            if following is not None:
                upcoming = pool.submit(adapted.read, following)
            yield key, tensor


def _prove(adapted: AdaptedCheckpoint, directory: Path, progress: Progress) -> MergeProof:
    with progress.task("prove", PASSES) as task:
        return prove(adapted, Checkpoint(directory), task.advance)


def _manifest(
    directory: Path,
    adapted: AdaptedCheckpoint,
    source: Future[dict[str, str]],
    records: Sequence[Future[AdapterRecord]],
    proof: MergeProof | None,
) -> MergedManifest:
    """The manifest of the merged checkpoint that was written to ``directory``."""
    return MergedManifest(
        quantkit=__version__,
        source=SourceRecord(source.result()),
        adapters=tuple(record.result() for record in records),
        method=MERGE,
        format="safetensors",
        dtype=adapted.config.get("dtype") or adapted.config.get("torch_dtype"),
        dequantized_base=isinstance(adapted.base, _Unpacked),
        parameters=adapted.parameters(),
        weights_bytes=weights_bytes(directory),
        changed_tensors=len(adapted.changed),
        untied=adapted.untied,
        vocabulary=VocabularyRecord(adapted.vocabulary, adapted.resized),
        warnings=tuple(adapted.warnings),
        proof=proof,
        libraries=library_versions(),
        files=record_files(directory),
        tensors=merge_fates(set(adapted.changed), adapted.entries),
    )
