"""LoRA adapters on disk: which of their tensors does what to which parameter.

A LoRA adapter (https://arxiv.org/abs/2106.09685) holds for a weight W (out, in) the factors
A (r, in) and B (out, r); the adapted weight is W + scale · B · A. DoRA
(https://arxiv.org/abs/2402.09353) then scales each output to a learned length. PEFT saves more
beside them: whole modules, biases, rows of embeddings. File layout and arithmetic follow PEFT
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from quantkit.base.errors import InputError
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.reader import Checkpoint
from quantkit.lora.config import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(\.weight)?|token_adapter\.trainable_tokens_delta)"
)
# Saved but not part of the result: what VeLoRA compresses activations by for the backward pass,
# and what a module was before it was trained.
_UNUSED = re.compile(r".+\.(lora_velora_embed(\.[^.]+)?|original_module\..+)")
_WRAPPERS = re.compile(r"\.(token_adapter|base_layer|modules_to_save)(?=\.)")
_FIELDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
}


@dataclass
class Part:
    """What an adapter does to one parameter, as keys of its own file.

    replaced: the whole tensor; a, b: factors; magnitude: DoRA's lengths; tokens: rows of an
    embedding; added: a bias beside B.
    """

    replaced: str | None = None
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    tokens: str | None = None
    added: str | None = None


class Adapter(Checkpoint):
    """A LoRA directory as PEFT saves it: adapter_config.json and adapter_model.safetensors.

    lora: its config; weight: how much of it is wanted; parts: parameter name → what it does.
    """

    format = "lora"

    def __init__(self, directory: Path, weight: float = 1.0) -> None:
        """Read config and header. Raises InputError for what isn't a LoRA adapter, for pickle,
        truncated files, unknown tensors and ranks that config and tensors disagree on."""
        if not directory.is_dir():
            raise InputError("no such directory", where=str(directory))
        if not math.isfinite(weight):
            raise InputError(f"its weight is {weight}", where=str(directory))
        self.directory = directory
        self.weight = weight
        self.lora = LoraConfig.read(directory)
        self.files = [_weights_file(directory)]
        self.entries = read_header(self.files[0])
        self.parts: dict[str, Part] = {}
        for key in self.entries:
            self._sort(key)
        if not self.parts:
            raise InputError("holds no tensors", subject=str(self.files[0]))
        for name, part in self.parts.items():
            self._check(name, part)

    @classmethod
    def open(cls, path: str | Path, weight: float = 1.0) -> Adapter:
        """Open the adapter at ``path``; ``weight`` multiplies what it adds."""
        return cls(Path(path), weight)

    def _sort(self, key: str) -> None:
        """Note what a tensor is for, by its key."""
        name = key.removeprefix(_PREFIX)
        if _UNUSED.fullmatch(name):
            return
        if found := _FACTOR.fullmatch(name):
            if found["part"] == "lora_B.bias":
                self._part(found["module"] + ".bias").added = key
            else:
                setattr(self._part(found["module"] + ".weight"), _FIELDS[found["part"]], key)
        elif ".lora_" in name:
            raise InputError(
                f"tensor {key} belongs to a variant of LoRA that can't be merged",
                where=str(self.files[0]),
            )
        else:
            self._part(_WRAPPERS.sub("", name)).replaced = key

    def _part(self, name: str) -> Part:
        return self.parts.setdefault(name, Part())

    def _check(self, name: str, part: Part) -> None:
        """Factors come in pairs, of the rank that the config gives them."""
        where = str(self.files[0])
        module = name.rpartition(".")[0]
        if (part.a is None) != (part.b is None) or (part.magnitude and part.a is None):
            raise InputError(
                f"holds only some of the factors of {module}",
                subject=where,
                fix="The adapter is incomplete: save or download it again.",
            )
        if part.tokens is not None:
            rows = self.lora.rows_of(module)
            if part.a is not None:
                raise InputError(f"has both factors and trained tokens for {module}", subject=where)
            if self.shape(part.tokens)[:1] != (len(rows),):
                raise InputError(
                    f"tensor {part.tokens} has shape {self.shape(part.tokens)}; "
                    f"trainable_token_indices names {len(rows)} tokens",
                    where=where,
                )
        if part.added and self.lora.dora:
            raise InputError(
                f"has both DoRA magnitudes and a bias beside B for {module}", subject=where
            )
        if part.a is None or part.b is None:
            return
        a, b, rank = self.shape(part.a), self.shape(part.b), self.lora.rank_of(module)
        if len(a) != 2 or len(b) != 2:
            raise InputError(
                f"the factors of {module} have shapes {a} and {b}; only matrices can be merged",
                where=where,
            )
        if a[0] != rank or b[1] != rank:
            raise InputError(
                f"the factors of {module} have ranks {a[0]} and {b[1]}; "
                f"adapter_config.json gives it rank {rank}",
                where=where,
                fix="Do adapter_config.json and the tensors belong together?",
            )
        if self.lora.dora and part.magnitude is None:
            raise InputError(f"use_dora is set, but {module} has no magnitudes", where=where)


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS_FILE
    if path.is_file():
        return path
    if (directory / _PICKLE).is_file():
        raise InputError(
            f"has its weights only as pickle ({_PICKLE}), which can run code when loaded "
            "and is never opened",
            subject=str(directory),
            fix="Load it with PEFT on a machine where you trust the file, and save it again with "
            "save_pretrained(DIR, safe_serialization=True).",
        )
    raise InputError(f"holds no {WEIGHTS_FILE}", subject=str(directory))
