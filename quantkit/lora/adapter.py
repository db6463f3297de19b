"""LoRA adapters on disk: what each of their tensors does to which parameter.

For a weight W (out, in) a LoRA adapter (https://arxiv.org/abs/2106.09685) has the factors
A (r, in) and B (out, r); the adapted weight is W + scale · B · A. DoRA
(https://arxiv.org/abs/2402.09353) then scales each output to a learned length. PEFT saves more
beside them: whole modules, biases, rows of embeddings. The files and the arithmetic are PEFT's
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
from quantkit.checkpoint.source import folder_name
from quantkit.lora.config import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(\.weight)?|token_adapter\.trainable_tokens_delta)"
)
# Saved, but without effect on the result: VeLoRA's compression of activations for the backward
# pass, and modules as they were before training.
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
    """What an adapter does to one parameter, as keys of the adapter's file.

    replaced: a tensor in place of the base's; a, b: factors; magnitude: DoRA's lengths; tokens:
    rows in place of some of an embedding's; added: a bias beside B.
    """

    replaced: str | None = None
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    tokens: str | None = None
    added: str | None = None


class Adapter(Checkpoint):
    """A LoRA directory as PEFT saves it: adapter_config.json and adapter_model.safetensors.

    lora: its config; weight: a factor of what it adds; parts: what it does, by parameter name.
    """

    format = "lora"

    def __init__(self, directory: Path, weight: float = 1.0) -> None:
        """Read the config and the header.

        Raises InputError for what isn't a LoRA adapter, for pickle, truncated files, unknown
        tensors, and ranks that config and tensors disagree on.
        """
        if not directory.is_dir():
            raise InputError("no such directory", where=str(directory))
        if not math.isfinite(weight):
            raise InputError(f"can't have the weight {weight}", subject=str(directory))
        self.directory = directory
        self.weight = weight
        self.lora = LoraConfig.read(directory)
        self.files = [_weights_file(directory)]
        self.entries = read_header(self.files[0])
        self.parts: dict[str, Part] = {}
        for key in self.entries:
            self._sort(key)
        if not self.parts:
            raise InputError("holds no tensors that change a parameter", subject=str(self.files[0]))
        for name, part in self.parts.items():
            self._check(name, part)

    @property
    def name(self) -> str:
        """What messages and manifests call it: the name of its directory, or of a Hub's model."""
        return folder_name(self.directory)

    @classmethod
    def open(cls, path: str | Path, weight: float = 1.0) -> Adapter:
        """The adapter at ``path``; ``weight`` multiplies what it adds."""
        return cls(Path(path), weight)

    def _sort(self, key: str) -> None:
        """Enter a tensor in ``parts``: its key tells what it does."""
        name = key.removeprefix(_PREFIX)
        if _UNUSED.fullmatch(name):
            return
        if match := _FACTOR.fullmatch(name):
            if match["part"] == "lora_B.bias":
                self._part(match["module"] + ".bias").added = key
            else:
                setattr(self._part(match["module"] + ".weight"), _FIELDS[match["part"]], key)
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
        """Refuse factors without their counterpart, and of another rank than the config's."""
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
                fix="Check that adapter_config.json and the tensors belong together.",
            )
        if self.lora.dora and part.magnitude is None:
            raise InputError(
                f"has no magnitudes of {module}, though use_dora is set", subject=where
            )


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
