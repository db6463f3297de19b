"""LoRA adapters on disk: what each of their tensors does to which parameter.

For a weight W (out, in) a LoRA adapter (https://arxiv.org/abs/2106.09685) has the factors
A (r, in) and B (out, r); the adapted weight is W + scale · B · A. DoRA
(https://arxiv.org/abs/2402.09353) then scales each output to a learned length. PEFT saves more
beside them: whole modules, biases, rows of embeddings. The files and the arithmetic are PEFT's
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.source import folder_name
from quantkit.checkpoint.wrappers import unwrap
from quantkit.lora.config import CONFIG_FILE, LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
# Old versions of PEFT, and state dicts saved without it, have an adapter's name in its keys.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
# Saved, but without effect on the result: VeLoRA's compression of activations for the backward
# pass, and modules as they were before training.
_UNUSED = re.compile(r".+\.(lora_velora_embed(\.[^.]+)?|original_module\..+)")
_SAVED = ".modules_to_save."
_WRAPPERS = re.compile(r"\.(token_adapter|base_layer|modules_to_save)(?=\.)")
_DEFAULT = "default"  # the name that PEFT gives an adapter, and the only one that it looks for
_FIELDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "added",
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
    rows in place of some of an embedding's; added: a bias beside B; of: the parameter that rank and
    scale are set for, where it isn't the module's.
    """

    replaced: str | None = None
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    tokens: str | None = None
    added: str | None = None
    of: str | None = None


@dataclass(frozen=True)
class _Slice:
    """One expert's part of a factor that is for ``count`` experts.

    interleaved: whether it has every so-manieth column, else it has adjacent rows; transposed,
    rows: what of that part is meant.
    """

    key: str
    number: int
    count: int
    interleaved: bool
    transposed: bool
    rows: slice | None


class Adapter(Checkpoint):
    """A LoRA directory as PEFT saves it: adapter_config.json and adapter_model.safetensors.

    lora: its config; weight: a factor of what it adds; parts: what it does, by parameter name;
    strange: keys that PEFT wouldn't know, and so would leave out.
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
        self.strange: list[str] = []
        self._older: dict[str, str] = {}
        self._slices: dict[str, _Slice] = {}
        self._whole: dict[str, Tensor] = {}
        named = self._named()
        for key in self.entries:
            self._sort(key, named)
        if not self.parts:
            raise InputError("holds no tensors that change a parameter", subject=str(self.files[0]))
        for name, part in self.parts.items():
            self._check(name, part)
        if not self.lora.parameters:  # they are ranks of several experts else
            self.check_ranks()

    @property
    def name(self) -> str:
        """What messages and manifests call it: the name of its directory, or of a Hub's model."""
        return folder_name(self.directory)

    @classmethod
    def open(cls, path: str | Path, weight: float = 1.0) -> Adapter:
        """The adapter at ``path``; ``weight`` multiplies what it adds."""
        return cls(Path(path), weight)

    def _named(self) -> str | None:
        """The name that the keys of the factors have in them, if any.

        Raises InputError for several.
        """
        matches = [_FACTOR.fullmatch(unwrap(key)[0]) for key in self.entries]
        names = sorted({match["adapter"] for match in matches if match and match["adapter"]})
        if len(names) > 1:
            raise InputError(
                f"holds several adapters: {', '.join(names)}",
                subject=str(self.files[0]),
                fix="Save each one alone: save_pretrained(DIR, selected_adapters=[NAME]).",
            )
        return names[0] if names else None

    def _sort(self, key: str, named: str | None) -> None:
        """Enter a tensor in ``parts``: its key tells what it does.

        named: the adapter's name, where keys have it.
        """
        whole, wrappers = unwrap(key)
        name = whole
        while name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        if _UNUSED.fullmatch(name):
            return
        if wrappers or _PREFIX + name != whole or named not in (None, _DEFAULT):
            self.strange.append(key)
        if match := _FACTOR.fullmatch(name):
            field = _FIELDS.get(match["part"] + (match["leaf"] or ""))
            if field is not None:
                leaf = ".bias" if field == "added" else ".weight"
                return self._enter(match["module"] + leaf, field, key)
        if ".lora_" in name:
            raise InputError(
                f"tensor {key} belongs to a variant of LoRA that can't be merged",
                where=str(self.files[0]),
            )
        saved = rf"\.modules_to_save\.({re.escape(named or _DEFAULT)}|{_DEFAULT})(?=\.)"
        self._enter(_WRAPPERS.sub("", re.sub(saved, "", name)), "replaced", key)

    def _enter(self, name: str, field: str, key: str) -> None:
        part = self.parts.setdefault(name, Part())
        if (other := getattr(part, field)) is not None:
            # Beside resized embeddings PEFT saves a module twice; it loads the plain key.
            if _SAVED in other and _SAVED not in key:
                part.replaced = key
            if (_SAVED in other) != (_SAVED in key):
                return
            raise InputError(
                f"holds both {other} and {key}, which would do the same to {name}",
                subject=str(self.files[0]),
                fix="Leave only the one that counts.",
            )
        setattr(part, field, key)

    def resolve(self, find: Callable[[str], str]) -> None:
        """Call the parameters in ``parts`` as the base does: ``find`` gives a name of the base's.

        Raises InputError where two become one, and where the config gives a module another rank or
        scale under its older name.
        """
        parts: dict[str, Part] = {}
        for name, part in self.parts.items():
            found = find(name)
            old, new = name.rpartition(".")[0], found.rpartition(".")[0]
            if found in parts:
                raise InputError(f"changes {found} under two names", subject=str(self.files[0]))
            if part.a and old != new and self.lora.settings_of(old) != self.lora.settings_of(new):
                raise InputError(
                    f"gives {old} another rank or alpha than {new}, which it is called today",
                    subject=str(self.directory / CONFIG_FILE),
                    fix="Write today's names into rank_pattern and alpha_pattern.",
                )
            if found != name and (found.endswith(f".{name}") or name.endswith(f".{found}")):
                # PEFT adds and takes away no base model's prefix.
                keys = dataclasses.astuple(dataclasses.replace(part, of=None))
                self.strange += [key for key in keys if key and key not in self.strange]
            parts[found] = part
            self._older[found] = name
        self.parts = parts

    def slice(
        self,
        key: str,
        number: int,
        count: int,
        *,
        interleaved: bool,
        transposed: bool = False,
        rows: slice | None = None,
    ) -> str:
        """A key for one expert's part of the tensor ``key``, which is a factor for ``count``."""
        some = "" if rows is None else f", {rows.start}:{rows.stop}:{rows.step}"
        name = f"{key}[{number}{some}]"
        self._slices[name] = _Slice(key, number, count, interleaved, transposed, rows)
        return name

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, or of a part of one that has a key of its own."""
        part = self._slices.get(key)
        if part is None:
            return super().shape(key)
        rows, columns = super().shape(part.key)
        if part.interleaved:
            columns //= part.count
        else:
            rows //= part.count
        shape = (columns, rows) if part.transposed else (rows, columns)
        return shape if part.rows is None else (len(range(*part.rows.indices(shape[0]))), shape[1])

    def read(self, key: str) -> Tensor:
        """A tensor, or a part of one that has a key of its own."""
        part = self._slices.get(key)
        if part is None:
            return super().read(key)
        # A and B in turn: what is read for one expert is kept for the next.
        held = self._whole  # another thread may read other ones
        if part.key not in held:
            tensor = super().read(part.key)
            if part.interleaved:
                experts = tensor.view(len(tensor), -1, part.count).permute(2, 0, 1).contiguous()
            else:
                experts = tensor.view(part.count, -1, tensor.shape[1])
            held = self._whole = {**dict(list(held.items())[-1:]), part.key: experts}
        own = held[part.key][part.number]
        own = own.t() if part.transposed else own
        return (own if part.rows is None else own[part.rows]).contiguous()

    def targets(self, name: str) -> bool:
        """Whether the config's target_modules names a parameter of ``parts``, by either name."""
        names = {name, self._older.get(name, name)}
        return any(self.lora.targets_module(n.removesuffix(".weight")) for n in names)

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
        a, b = self.shape(part.a), self.shape(part.b)
        if len(a) != 2 or len(b) != 2:
            raise InputError(
                f"the factors of {module} have shapes {a} and {b}; only matrices can be merged",
                where=where,
            )
        if self.lora.dora and part.magnitude is None:
            raise InputError(
                f"has no magnitudes of {module}, though use_dora is set", subject=where
            )

    def check_ranks(self) -> None:
        """Raise InputError for factors of another rank than the config's."""
        for name, part in self.parts.items():
            if part.a is None or part.b is None:
                continue
            module = name.rpartition(".")[0]
            rank = self.lora.rank_of(part.of or module)
            ranks = self.shape(part.a)[0], self.shape(part.b)[1]
            if ranks != (rank, rank):
                raise InputError(
                    f"the factors of {module} have ranks {ranks[0]} and {ranks[1]}; "
                    f"adapter_config.json gives it rank {rank}",
                    where=str(self.files[0]),
                    fix="Check that adapter_config.json and the tensors belong together.",
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
