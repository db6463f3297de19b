"""Opening checkpoints with LoRA adapters folded in, all of them by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from quantkit.base.errors import InputError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import check_sidecars
from quantkit.checkpoint.source import locate_adapter, locate_model, model_name
from quantkit.lora.adapter import Adapter
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.model.skeleton import Skeleton
from quantkit.model.text_only import TextOnly, holds_text_only

Weighted = tuple[str, float]  # an adapter's directory or hub id, and its weight


def open_checkpoint(model: str, adapters: Sequence[Weighted] = ()) -> Checkpoint:
    """The checkpoint named ``model`` (a directory, a hub id or 'demo') with its adapters folded in.

    Raises InputError for a name that leads to no checkpoint, and for adapters that don't fit it.
    """
    base = Checkpoint(locate_model(model))
    return adapt(base, adapters, model) if adapters else base


def open_baseline(
    model: str, adapters: Sequence[Weighted], artifacts: Sequence[Path]
) -> Checkpoint:
    """The checkpoint that artifacts are judged against: its text model, where they hold no more.

    Raises InputError as ``open_checkpoint`` does, and where some artifacts hold the text model
    alone and others the whole.
    """
    checkpoint = open_checkpoint(model, adapters)
    alone = [path for path in artifacts if holds_text_only(path, checkpoint)]
    if not alone:
        return checkpoint
    # A GGUF file holds the text model alone and fits either.
    others = [path for path in artifacts if path not in alone and not _is_gguf(path)]
    if others:
        whole = others[0]
        raise InputError(
            f"was made with --text-only, and {whole} wasn't: they have no baseline in common",
            subject=str(alone[0]),
            fix="Judge them one after the other.",
        )
    check_alone(adapters)
    return TextOnly(checkpoint)


def _is_gguf(artifact: Path) -> bool:
    return artifact.suffix == ".gguf" or any(artifact.glob("*.gguf"))


def check_alone(adapters: Sequence[Weighted]) -> None:
    """Raise InputError for adapters on the text model of a checkpoint that has more."""
    if adapters:
        raise InputError(
            "can't be folded in where images and sound are left out (--text-only)",
            subject=", ".join(name for name, _ in adapters),
            fix="Merge it first (quantkit merge), then quantize the result.",
        )


def adapt(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    model: str,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> AdaptedCheckpoint:
    """``base``, which ``model`` names, with the adapters folded in.

    dtype, strict and the errors raised are those of ``AdaptedCheckpoint``.
    """
    opened = [Adapter.open(locate_adapter(name), weight) for name, weight in adapters]
    for adapter in opened:
        check_sidecars(adapter.directory)
    skeleton = Skeleton(base)
    return AdaptedCheckpoint(
        base,
        opened,
        skeleton.names,
        skeleton.model,
        views=skeleton.views,
        dtype=dtype,
        base_name=model_name(model),
        strict=strict,
    )
