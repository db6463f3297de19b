"""One run of making an artifact: where it works, what it knows, and what it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.artifact.manifest import file_digests, library_versions
from quantkit.base.files import digests
from quantkit.base.progress import Progress
from quantkit.base.version import __version__
from quantkit.calibration.activations import HiddenStates
from quantkit.calibration.cache import Keeper, find
from quantkit.calibration.passing import CalibrationPass, Wanted
from quantkit.calibration.text import Rows
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.sidecars import sidecars
from quantkit.lora.checkpoint import AdaptedCheckpoint
from quantkit.model.stream import Stream


@dataclass(frozen=True)
class Run:
    """What making an artifact has at hand.

    rows: calibration rows, where the recipe has some; directory: of the artifact to be; budget:
    bytes that hidden states may take in memory; inputs: digests of all that decides the bytes;
    cache: whether statistics are taken from, and kept on, disk.
    """

    checkpoint: Checkpoint
    rows: Rows | None
    device: torch.device
    directory: Path
    journal: Journal
    progress: Progress
    budget: int
    inputs: dict[str, str]
    cache: bool

    @contextmanager
    def calibration(
        self,
        stream: Stream,
        wanted: Wanted,
        embedding: Callable[[int, int], Tensor] | None = None,
    ) -> Iterator[CalibrationPass | None]:
        """The rows on their way through ``stream``, where there are any.

        embedding: what quantizing makes of its rows, where that is known (``CalibrationPass``).
        """
        if self.rows is None:
            yield None
            return
        about = {name: value for name, value in self.inputs.items() if name != "recipe"}
        about["dtype"] = str(stream.skeleton.model.dtype)
        if wanted.propagate == "corrected":
            yield self._corrected(stream, wanted, self.rows, embedding)
            return
        hidden = HiddenStates(self.journal.scratch, self.budget)
        cached = self.cache and wanted.onward
        kept = find(about, wanted.kind) if cached else None
        if kept is not None:
            self.progress.note("statistics are at hand from an earlier calibration")
        if not cached or kept is not None:
            yield CalibrationPass(stream, self.rows, wanted, hidden=hidden, kept=kept)
            return
        with Keeper(about, wanted.kind, len(stream.skeleton.layers) + 1) as keeper:
            yield CalibrationPass(stream, self.rows, wanted, hidden=hidden, keeper=keeper)

    def _corrected(
        self,
        stream: Stream,
        wanted: Wanted,
        rows: Rows,
        embedding: Callable[[int, int], Tensor] | None,
    ) -> CalibrationPass:
        def states(name: str, share: int) -> HiddenStates:
            return HiddenStates(self.journal.scratch, self.budget // share, name)

        hidden, drifted = states("hidden", 4), states("drifted", 4)
        # A block has few inputs, most of them as wide as the hidden states.
        spare = partial(states, share=16)
        return CalibrationPass(
            stream, rows, wanted, hidden=hidden, drifted=drifted, embedding=embedding, spare=spare
        )


def describe_inputs(
    checkpoint: Checkpoint, rows: Rows | None, recipe: str, device: torch.device
) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of all that decides an artifact's bytes, and of the checkpoint's files by name.

    recipe: its digest.
    """
    adapters = checkpoint.adapters if isinstance(checkpoint, AdaptedCheckpoint) else []
    files = file_digests(checkpoint.directory)
    inputs = {
        "recipe": recipe,
        "checkpoint": _digest(files),
        "tokenizer and other files": _digest(digests(sidecars(checkpoint.directory))),
        "device": device.type,
        "quantkit": __version__,
        **library_versions(),
    }
    if rows is not None:
        inputs["calibration rows"] = hashlib.sha256(rows.ids.numpy().tobytes()).hexdigest()
    for number, adapter in enumerate(adapters, 1):
        found = digests([p for p in adapter.directory.iterdir() if p.is_file()])
        inputs[f"adapter {number}"] = _digest({**found, "weight": str(adapter.weight)})
    return inputs, files


def _digest(files: dict[str, str]) -> str:
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()
