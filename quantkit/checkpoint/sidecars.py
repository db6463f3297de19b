"""The files beside the weights: tokenizer, chat template, generation config, and config.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantkit.base.contents import mistaken_content
from quantkit.base.errors import InputError
from quantkit.base.files import read_json, read_optional_json, write_json
from quantkit.results.manifest import MANIFEST, RUN

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
# Written anew, or about the original alone.
_NOT_COPIED = {
    "config.json",
    "adapter_config.json",  # with it, transformers would look for the adapter's weights
    "quantize_config.json",
    RUN,
    "README.md",
    MANIFEST,
}
# The files that tokenizers are saved as; any of the first set is enough for a tokenizer.
_VOCABULARIES = {
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
}
_TOKENIZER = _VOCABULARIES | {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
}
_TEMPLATES = {"chat_template.jinja", "chat_template.json"}


def sidecars(source: Path) -> list[Path]:
    """The files of a checkpoint that an artifact needs unchanged: all but weights and configs."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHTS
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
    ]


def check_sidecars(directory: Path) -> None:
    """Raise InputError where transformers couldn't read a file of the tokenizer, nor its settings.

    That is a Git LFS pointer, JSON that begins with a byte order mark, or a longest length that
    isn't a number, which transformers takes and then compares with the lengths of texts.
    """
    for name in sorted(_TOKENIZER | _TEMPLATES | {"generation_config.json"}):
        path = directory / name
        if path.is_file() and (mistaken := mistaken_content(path)):
            raise mistaken
    path = directory / "tokenizer_config.json"
    longest = read_optional_json(path).get("model_max_length") or 0
    if not isinstance(longest, int | float):
        raise InputError(
            f"model_max_length is {longest!r}, which isn't a number",
            where=str(path),
            fix="Set it to the number of tokens that the model was trained for, or remove it.",
        )


def copy_sidecars(source: Path, target: Path, adapter: Path | None = None) -> list[str]:
    """Copy the ``sidecars`` of a checkpoint; returns their names.

    adapter: a directory whose tokenizer and chat template are copied instead of the
    checkpoint's, where it has them.
    """
    chosen = {path.name: path for path in sidecars(source)}
    if adapter is not None:
        brought = {name for name in _TOKENIZER | _TEMPLATES if (adapter / name).is_file()}
        # Files of two tokenizers don't fit together, so all of the checkpoint's go. Its chat
        # template stays where the adapter has none.
        replaced = _TOKENIZER if brought & _VOCABULARIES else set()
        if brought & _TEMPLATES or _has_template(adapter):
            replaced = replaced | _TEMPLATES
        chosen = {name: path for name, path in chosen.items() if name not in replaced}
        chosen |= {name: adapter / name for name in brought}
    for name, path in sorted(chosen.items()):
        shutil.copyfile(path, target / name)
    return sorted(chosen)


def brings_tokenizer(adapter: Path) -> bool:
    """Whether an adapter directory holds a tokenizer or a chat template of its own."""
    return any((adapter / name).is_file() for name in _TOKENIZER | _TEMPLATES)


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory has a file that a tokenizer can be loaded from.

    Without one transformers makes an empty tokenizer of the model's class, and says nothing.
    """
    suffixes = {".model", ".tiktoken", ".vocab"}
    return any(p.name in _VOCABULARIES or p.suffix in suffixes for p in directory.iterdir())


def tokens_of(directory: Path) -> int | None:
    """How many rows an embedding must have for the tokenizer.json there; None without one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_json(path)
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens", []))], default=-1)


def _has_template(directory: Path) -> bool:
    path = directory / "tokenizer_config.json"
    return bool(read_optional_json(path).get("chat_template"))


def write_config(target: Path, config: dict[str, Any], quantization: dict[str, Any] | None) -> None:
    """Write config.json: the original's keys, and ``quantization`` as quantization_config."""
    result = dict(config)
    # It names a file of the original.
    result.pop("transformers_weights", None)
    # Under both names: engines read the one or the other, depending on their age.
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    result["dtype"] = result["torch_dtype"] = dtype
    if not result.get("quantization_config"):  # transformers refuses an empty one
        result.pop("quantization_config", None)
    if quantization is not None:
        result["quantization_config"] = quantization
    write_json(target / "config.json", result)
