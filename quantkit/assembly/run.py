"""One run of making an artifact: its inputs, its place on disk, and its calibration pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.artifact.machine import library_versions
from quantkit.artifact.records import checkpoint_digests
from quantkit.assembly.journal import Journal
from quantkit.base.files import digests
from quantkit.base.progress import Progress
from quantkit.base.version import __version__
from quantkit.calibration.activations import Copies, HiddenStates
from quantkit.calibration.cache import CacheWriter, find_statistics
from quantkit.calibration.corrected import CorrectedPass
from quantkit.calibration.needs import Needs
from quantkit.calibration.passing import CalibrationPass
from quantkit.calibration.text import Rows
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import Sidecars, more_templates
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.model.device import free_memory
from quantkit.model.stream import Stream

_DEVICE_SHARE = 4  # of a device's free memory, the part that hidden states may take
_NOT_KEPT = (
    "no copy of the hidden states is kept: where this run is stopped, the calibration starts again"
)

# A function from the numbers of a first and a last row (exclusive) to these rows of the embedding.
EmbeddingRows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Run:
    """What is needed wherever a part of an artifact is made.

    rows: calibration rows, where the recipe has some; devices: that compute, of which all but the
    first share in calibration and in solving; directory: where the artifact is made;
    budget: bytes that hidden states may take in memory; inputs: digests of all that decides the
    artifact's bytes; cache: whether statistics of earlier runs are used, and this run's are kept;
    resume: whether hidden states are kept for a run that continues this one; background: whether
    what must be written is written beside the work, as for a device that would have to wait.
    """

    checkpoint: Checkpoint
    rows: Rows | None
    devices: tuple[torch.device, ...]
    directory: Path
    journal: Journal
    progress: Progress
    budget: int
    inputs: dict[str, str]
    cache: bool
    resume: bool
    background: bool

    @property
    def device(self) -> torch.device:
        """The first of ``devices``."""
        return self.devices[0]

    def hidden_states(
        self, name: str = "hidden", *, share: int = 1, kept: bool = True
    ) -> HiddenStates:
        """A place for the hidden states between two blocks.

        share: what part, one of so many, of the memory they may take; kept: whether a later run
        may need them.
        """
        copies: Copies = "background" if self.background else "always"
        on_device = free_memory(self.device)
        return HiddenStates(
            self.journal.scratch,
            self.budget // share,
            name,
            on_device=None if on_device is None else on_device // (_DEVICE_SHARE * share),
            copies=copies if kept and self.resume else "never",
        )

    @property
    def _statistics(self) -> int:
        """Bytes that the matrices of a layer's experts may take."""
        on_device = free_memory(self.device)
        return self.budget if on_device is None else on_device // _DEVICE_SHARE

    @contextmanager
    def calibration(
        self, stream: Stream, needs: Needs | None, embedding: EmbeddingRows | None = None
    ) -> Iterator[CalibrationPass | None]:
        """The pass of the calibration rows through ``stream``; None where nothing is measured.

        embedding: as it is quantized, where that is known (see ``CorrectedPass``).
        """
        with self._calibration(stream, needs, embedding) as calibration:
            try:
                yield calibration
            finally:
                if calibration is not None:
                    calibration.close()

    @contextmanager
    def _calibration(
        self, stream: Stream, needs: Needs | None, embedding: EmbeddingRows | None
    ) -> Iterator[CalibrationPass | None]:
        if self.rows is None or needs is None:
            yield None
            return
        if not self.resume:
            self.progress.note(_NOT_KEPT)
        if needs.propagate == "corrected":
            yield self._corrected(stream, needs, self.rows, embedding)
            return
        # The recipe doesn't decide statistics of the checkpoint: others find them by the rest.
        about = {name: value for name, value in self.inputs.items() if name != "recipe"}
        about["dtype"] = str(stream.skeleton.model.dtype)
        hidden = self.hidden_states()
        passed = partial(
            CalibrationPass,
            stream,
            self.rows,
            needs,
            hidden=hidden,
            devices=self.devices,
            budget=self._statistics,
        )
        cached = self.cache and needs.independent
        statistics = find_statistics(about, needs.kind) if cached else None
        if statistics is not None:
            self.progress.note("using the statistics of an earlier calibration")
        if not cached or statistics is not None:
            yield passed(cached=statistics)
            return
        layers = len(stream.skeleton.layers) + 1
        with CacheWriter(about, needs.kind, layers, patient=not self.background) as writer:
            yield passed(writer=writer)

    def _corrected(
        self, stream: Stream, needs: Needs, rows: Rows, embedding: EmbeddingRows | None
    ) -> CorrectedPass:
        hidden, drifted = (self.hidden_states(name, share=4) for name in ("hidden", "drifted"))
        # A block has few inputs, most of them as wide as the hidden states.
        store = partial(self.hidden_states, share=16, kept=False)
        return CorrectedPass(
            stream, rows, needs, hidden=hidden, drifted=drifted, embedding=embedding, store=store
        )


def describe_inputs(
    checkpoint: Checkpoint, rows: Rows | None, recipe: str, devices: Sequence[torch.device]
) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of all that decides an artifact's bytes, and of the checkpoint's files by name.

    recipe: its digest.
    """
    adapters = checkpoint.adapters if isinstance(checkpoint, AdaptedCheckpoint) else []
    files = checkpoint_digests(checkpoint)
    root = checkpoint.directory
    own = dict(Sidecars.of(root).files)  # without an adapter's
    inputs = {
        "recipe": recipe,
        "checkpoint": _digest(files),
        "tokenizer and other files": _digest(digests(own.values(), root)),
        # Several devices make the same sums in another order.
        "device": devices[0].type + (f" × {len(devices)}" if len(devices) > 1 else ""),
        "quantkit": __version__,
        **library_versions(),
    }
    if rows is not None:
        inputs["calibration rows"] = hashlib.sha256(rows.ids.numpy().tobytes()).hexdigest()
    for number, adapter in enumerate(adapters, 1):
        root = adapter.directory
        own = {p.name: p for p in root.iterdir() if p.is_file()} | more_templates(root)
        found = digests(own.values(), root)
        inputs[f"adapter {number}"] = _digest({**found, "weight": str(adapter.weight)})
    return inputs, files


def _digest(files: dict[str, str]) -> str:
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(files.items()))
    # Names of files may be any bytes.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
