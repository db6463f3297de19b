"""GGUF files, written a few rows at a time.

The header comes first, since every size is known from the plan. Then a tensor's rows are read,
quantized and compared with the original in threads, and written at the place that the header has
for them. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3; the
header's bytes are laid out by gguf-py, llama.cpp's own writer.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.base.files import write_at
from quantkit.base.parallel import pool
from quantkit.base.progress import Task
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.views import ViewedSource
from quantkit.checkpoint.weights import TensorSource
from quantkit.checkpoint.written import Written
from quantkit.formats.gguf.architectures.architecture import Metadata
from quantkit.formats.gguf.file import GgufPlan, GgufTensorPlan, plan_file
from quantkit.formats.gguf.transforms import keeps_columns
from quantkit.methods.ggml.encoder import Encoder, rows_at_once
from quantkit.methods.ggml.library import load_gguf
from quantkit.methods.ggml.types import GgmlTensor, row_bytes
from quantkit.methods.linears import QuantizedLinear
from quantkit.results.manifest import LayerReport

_ALIGNMENT = 32
_AHEAD = 4  # pieces of work a thread may be ahead of the writing


def write_blocks(
    path: Path,
    plan: GgufPlan,
    quantized: Mapping[str, QuantizedLinear],
    known: Written | None,
) -> list[Written]:
    """Write tensors that were quantized elsewhere, by their names in the file.

    ``known``: any tensor that the file holds already; without one the file is begun.
    """
    first = _data_start(path, plan, known)
    written = []
    with path.open("r+b", buffering=0) as file:
        for tensor, offset in _places(plan):
            if tensor.name in quantized:
                value = quantized[tensor.name].tensor
                assert isinstance(value, GgmlTensor)
                data = value.blocks.contiguous().numpy().data
                write_at(file, first + offset, data)
                digest = hashlib.sha256(data).hexdigest()
                written.append(_written(path, tensor, first + offset, digest))
    return written


def write_file(
    path: Path,
    plan: GgufPlan,
    source: TensorSource,
    importance: Callable[[str], Tensor | None] = lambda key: None,
    *,
    finished: Iterable[Written] = (),
    record: Callable[[Written, LayerReport], None] = lambda written, report: None,
    progress: Task | None = None,
    threads: int | None = None,
) -> list[LayerReport]:
    """Write the planned file, holding a few rows at a time; reports on what was quantized here.

    ``source`` gives the weights (a checkpoint, or one with an adapter folded in); ``importance``
    gives a checkpoint key's importance, (in_features,), or None. ``finished`` are the tensors
    that ``path`` holds already; ``record`` is called for each further one when its bytes are
    there. ``progress`` advances by one for every one of ``plan.parts``.

    Errors in reports are ‖W-Ŵ‖²/‖W‖²; weighted ones have every input feature's squares multiplied
    by its importance. Raises InputError naming the tensor for NaN, infinite values or a shape
    unlike the plan's.
    """
    source = plan.viewed(source)
    done = {tensor.name: tensor for tensor in finished}
    first = _data_start(path, plan, next(iter(done.values()), None))
    todo = [tensor for tensor in plan.parts if tensor.name not in done]
    threads = threads or os.cpu_count() or 1
    reports = []
    with path.open("r+b", buffering=0) as file, pool(threads) as workers:
        pieces = _in_order(workers, _work(todo, source, importance), threads * _AHEAD)
        for tensor, offset in _places(plan):
            if tensor.name not in done:
                weights = _importance_of(tensor, importance)
                digest, report = _write(file, tensor, first + offset, pieces, weights)
                record(_written(path, tensor, first + offset, digest), report)
                reports.append(report)
            if progress is not None:
                progress.advance(doing=tensor.name)
        file.truncate(first + sum(_padded(tensor.nbytes) for tensor in plan.tensors))
    return reports


def _places(plan: GgufPlan) -> Iterator[tuple[GgufTensorPlan, int]]:
    """What is quantized by itself, and where it begins, in bytes from the first tensor on."""
    start = 0
    for tensor in plan.tensors:
        for number, part in enumerate(tensor.parts):
            yield part, start + number * part.nbytes
        start += _padded(tensor.nbytes)


def _written(path: Path, tensor: GgufTensorPlan, start: int, digest: str) -> Written:
    return Written(
        file=path.name,
        name=tensor.name,
        dtype=tensor.type,
        shape=list(tensor.shape),
        start=start,
        nbytes=tensor.nbytes,
        sha256=digest,
    )


def write_bf16(path: Path, source: Checkpoint) -> None:
    """Write the checkpoint unquantized: llama.cpp's own baseline, and exact for BF16 weights."""
    write_file(path, plan_file(source, "bf16"), source)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor.

    blocks: uint8 (rows, bytes); lost: each column's sum of squared errors, whole: of squared
    weights, both float32 (columns,).
    """

    blocks: Tensor
    lost: Tensor
    whole: Tensor


def _data_start(path: Path, plan: GgufPlan, known: Written | None) -> int:
    """Where the tensors begin, in bytes; the header is written unless a tensor is ``known``."""
    if known is None:
        return _write_header(path, plan)
    # The header is there already. Its length follows from the place of any tensor.
    return known.start - next(at for tensor, at in _places(plan) if tensor.name == known.name)


def _write_header(path: Path, plan: GgufPlan) -> int:
    gguf = load_gguf()
    writer = gguf.GGUFWriter(path, plan.architecture)
    _add_metadata(writer, plan.metadata, gguf.GGUFValueType)
    for tensor in plan.tensors:
        byte_shape = (*tensor.shape[:-1], row_bytes(tensor.type, tensor.shape[-1]))
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return _padded(path.stat().st_size)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _importance_of(
    tensor: GgufTensorPlan, importance: Callable[[str], Tensor | None]
) -> Tensor | None:
    fits = len(tensor.shape) > 1 and keeps_columns(tensor.transform)
    return importance(tensor.key) if tensor.key and fits else None


def _work(
    tensors: Iterable[GgufTensorPlan],
    source: TensorSource,
    importance: Callable[[str], Tensor | None],
) -> Iterator[Callable[[], _Piece]]:
    """The pieces of all tensors, in order, each to be computed in any thread."""
    for tensor in tensors:
        columns = tensor.shape[-1]
        try:
            encode = Encoder(tensor.type, columns, _importance_of(tensor, importance))
        except InputError as error:
            raise _named(error, tensor) from error
        read = _reader(tensor, source)
        count, step = math.prod(tensor.shape[:-1]), rows_at_once(columns)
        for first in range(0, count, step):
            yield partial(_encode, tensor, encode, read, first, min(first + step, count))


def _reader(tensor: GgufTensorPlan, source: TensorSource) -> Callable[[int, int], Tensor]:
    """A function from a range of rows to their values (rows, columns)."""
    key = tensor.key
    # A part of another tensor can only be read whole.
    apart = isinstance(source, ViewedSource) and key in source.views
    if key is None or apart or len(tensor.shape) != 2 or tensor.transform.rows != 1:
        whole = tensor.value(source).reshape(-1, tensor.shape[-1])
        return lambda start, stop: whole[start:stop]
    return lambda start, stop: tensor.transform.apply(source.read_rows(key, start, stop))


def _encode(
    tensor: GgufTensorPlan,
    encode: Encoder,
    read: Callable[[int, int], Tensor],
    start: int,
    stop: int,
) -> _Piece:
    rows = read(start, stop)
    if tuple(rows.shape) != (stop - start, tensor.shape[-1]):
        shape = (len(rows), *rows.shape[1:])
        raise InputError(
            f"has rows of {shape} where {tensor.shape} was planned", subject=tensor.key
        )
    try:
        blocks = encode(rows)
    except InputError as error:
        raise _named(error, tensor) from error
    values = rows.float()
    difference = GgmlTensor(tensor.type, blocks, tuple(rows.shape)).dequantize() - values
    return _Piece(blocks, difference.square_().sum(0), values.square().sum(0))


def _in_order(
    workers: ThreadPoolExecutor, work: Iterator[Callable[[], _Piece]], ahead: int
) -> Iterator[_Piece]:
    """Results in order, computed at most ``ahead`` pieces before they are asked for."""
    under_way: deque[Future[_Piece]] = deque()
    try:
        for function in work:
            under_way.append(workers.submit(function))
            if len(under_way) > ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _write(
    file: FileIO,
    tensor: GgufTensorPlan,
    start: int,
    pieces: Iterator[_Piece],
    importance: Tensor | None,
) -> tuple[str, LayerReport]:
    """Write one tensor's pieces from ``start`` on; the digest of its bytes, and its report."""
    columns = tensor.shape[-1]
    lost, whole = torch.zeros(2, columns, dtype=torch.float64)
    digest, done = hashlib.sha256(), 0
    while done < tensor.nbytes:
        piece = next(pieces)
        data = piece.blocks.contiguous().numpy().data
        write_at(file, start + done, data)
        digest.update(data)
        done += piece.blocks.nbytes
        lost += piece.lost
        whole += piece.whole
    weighted = None
    if importance is not None:
        weights = importance.double()
        weighted = _ratio(lost * weights, whole * weights)
    report = LayerReport(
        name=tensor.name,
        scheme=tensor.type,
        error=_ratio(lost, whole),
        measured_on="weights",
        weighted_error=weighted,
    )
    return digest.hexdigest(), report


def _ratio(part: Tensor, whole: Tensor) -> float:
    """The quotient of two sums; 0 where there is nothing to divide by."""
    # fsum is exact, so the number of threads, and with it the order, changes nothing.
    total = math.fsum(whole.tolist())
    return math.fsum(part.tolist()) / total if total else 0.0


def _named(error: InputError, tensor: GgufTensorPlan) -> InputError:
    return InputError(error.what, where=tensor.key or tensor.name, fix=error.fix)


def _add_metadata(writer: Any, metadata: Metadata, types: Any) -> None:
    """Add every key with the GGUF type for its Python type."""
    scalars = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, scalars[type(value)])
