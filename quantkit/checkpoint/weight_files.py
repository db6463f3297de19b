"""Which files of a model directory hold its weights: those that transformers would load."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.base.errors import CheckpointWarning, InputError
from quantkit.base.files import is_file_name, read_json
from quantkit.checkpoint.header import INDEX_FILE, SINGLE_FILE

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LOADED_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"


def check_is_model(directory: Path) -> None:
    """Raise InputError where a directory without config.json holds something else than a model."""
    if (directory / "config.json").is_file():
        return
    where = str(directory)
    if (directory / _ADAPTER_CONFIG).is_file():
        raise _is_adapter(directory)
    if ggufs := sorted(directory.glob("*.gguf")):
        raise InputError(
            f"holds a model in GGUF ({ggufs[0].name}), not a checkpoint in safetensors",
            subject=where,
            fix="Pass the BF16 checkpoint that it was made from; eval, bench, compare, inspect and "
            "verify take GGUF as an artifact.",
        )
    inside = sorted(path.parent.relative_to(directory) for path in _nested(directory))
    if inside:
        raise InputError(
            f"holds no config.json; {inside[-1]} in it does",
            subject=where,
            fix=f"Pass {directory / inside[-1]}.",
        )


def _is_adapter(directory: Path) -> InputError:
    base = read_json(directory / _ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
    return InputError(
        "is a LoRA adapter, not a model",
        subject=str(directory),
        fix=f"Name the model that it was trained on, and the adapter beside it: {base} as the "
        f"model, with --adapter {directory}; or merge them first: quantkit merge {base} "
        f"{directory} --out DIR.",
    )


def _nested(directory: Path) -> Iterator[Path]:
    """The config.json of models inside: of a trainer's checkpoints, or in the Hub's cache."""
    yield from directory.glob("*/config.json")
    yield from directory.glob("snapshots/*/config.json")


def weight_files(directory: Path, config: dict[str, Any]) -> list[Path]:
    """The safetensors files whose tensors are the model's, in the order in which they are read.

    The precedence is that of ``_get_resolved_checkpoint_files`` in transformers: the file that
    ``transformers_weights`` in ``config`` names, else model.safetensors, else the shards of its
    index. Other safetensors files count only where there are none of these and no pickle that
    transformers would load.

    Warns where an index or an adapter in the directory is left out. Raises InputError for an index
    that is malformed or names a missing file, and for weights stored as pickle.
    """
    if (directory / _ADAPTER_CONFIG).is_file():
        warnings.warn(
            f"{directory} also holds an adapter. Transformers loads the model with it; here it "
            f"counts only with --adapter {directory}.",
            CheckpointWarning,
            stacklevel=2,
        )
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if named := config.get("transformers_weights"):
        return _named(directory, str(named))
    if single.is_file():
        if index.is_file():
            warnings.warn(
                f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}: the weights are those of "
                f"{SINGLE_FILE}, as in transformers, and the index and its shards are ignored.",
                CheckpointWarning,
                stacklevel=2,
            )
        return [single]
    if index.is_file():
        return _shards(directory, index)
    loaded = next((name for name in _LOADED_PICKLES if (directory / name).is_file()), None)
    # Older tools gave files names of their own, such as gptq_model-4bit-128g.safetensors.
    others = [path for path in sorted(directory.glob("*.safetensors")) if _is_weights(path)]
    if others and loaded is None:
        return others
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"has its weights only as pickle ({loaded or pickles[0]}), which can run code when "
            "loaded and is never opened",
            subject=str(directory),
            fix="Save it as safetensors: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(DIR), on a machine where you trust the file."
            + (f" {others[0].name} isn't what transformers loads." if others else ""),
        )
    if (directory / _ADAPTER_WEIGHTS).is_file() and (directory / _ADAPTER_CONFIG).is_file():
        raise _is_adapter(directory)
    raise InputError(
        "holds no *.safetensors file", subject=str(directory), fix="Is this a checkpoint directory?"
    )


def check_overlaps(directory: Path, tensors: Mapping[Path, Collection[str]]) -> None:
    """Raise InputError where two files without an index hold the same tensor.

    tensors: the keys in each of the ``weight_files``. Variants such as model.fp16.safetensors
    beside model.fp32.safetensors can't both be the model.
    """
    if (directory / INDEX_FILE).is_file():
        return
    owner: dict[str, Path] = {}
    for file, keys in tensors.items():
        for key in keys:
            if key in owner:
                raise InputError(
                    f"holds {key} both in {owner[key].name} and in {file.name}, and no index "
                    "tells which of them counts",
                    subject=str(directory),
                    fix=f"Leave only one of them there, named {SINGLE_FILE}.",
                )
            owner[key] = file


def _named(directory: Path, name: str) -> list[Path]:
    where = str(directory / "config.json")
    path = directory / name
    if (
        not is_file_name(name)
        or not path.resolve().is_relative_to(directory.resolve())
        or not name.endswith((".safetensors", _INDEX_SUFFIX))
    ):
        raise InputError(
            f"transformers_weights is {name!r}, which is neither a safetensors file of this "
            "directory nor an index",
            where=where,
        )
    if not path.is_file():
        raise InputError(f"transformers_weights names {name}, which is missing", where=where)
    return _shards(directory, path) if name.endswith(_INDEX_SUFFIX) else [path]


def _shards(directory: Path, index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if (
        not isinstance(mapping, dict)
        or not mapping
        or not all(isinstance(name, str) and is_file_name(name) for name in mapping.values())
    ):
        raise InputError(
            "holds no weight_map that tells the file of every tensor",
            subject=str(index),
            fix="Download or copy it again.",
        )
    files = [directory / name for name in sorted(set(mapping.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"names {file.name}, which is missing",
                subject=str(index),
                fix="Copy the missing shard beside the others.",
            )
    return files


def _is_weights(path: Path) -> bool:
    return path.is_file() and path.name != _ADAPTER_WEIGHTS
