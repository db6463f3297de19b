"""The files beside the weights: tokenizer, chat templates, generation config, and config.json.

``Sidecars.of`` is the one rule for which of them go with a base and an adapter: what is written
with an artifact, and what tokenizes the text that it is calibrated and judged on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.base.contents import mistaken_content
from quantkit.base.errors import InputError
from quantkit.base.files import read_json, read_optional_json, write_json
from quantkit.checkpoint.template_syntax import check_syntax
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
_SETTINGS = "tokenizer_config.json"
_TOKENIZER = _VOCABULARIES | {
    _SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
}
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = {_TEMPLATE, "chat_template.json"}
MORE_TEMPLATES = "additional_chat_templates"  # a folder of *.jinja, each a template by its name


@dataclass(frozen=True)
class Sidecars:
    """The files that go with a model, by their path in its directory.

    files: where each is; settings: of tokenizer_config.json, where they are those of two files.
    """

    files: Mapping[str, Path]
    settings: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, base: Path, adapter: Path | None = None) -> Sidecars:
        """All files of ``base`` but weights and configs, with the tokenizer of ``adapter``.

        An adapter's tokenizer replaces the base's as a whole, if it brings a vocabulary, and single
        files of it otherwise. Its chat templates replace all of the base's; without any, the
        base's stay, also those that are in a tokenizer_config.json that is replaced.
        """
        files = _unchanged(base)
        if adapter is None:
            return cls(files)
        brought = _brought(adapter)
        templates = _template_files(brought)
        replaced = _TOKENIZER if brought.keys() & _VOCABULARIES else set()
        if templates or _inline_template(adapter):
            replaced = replaced | _template_files(files)
        kept = {name: path for name, path in files.items() if name not in replaced}
        chosen = cls(kept | brought)
        inline = _inline_template(base)
        if inline and not _template_files(chosen.files) and not _inline_template(adapter):
            path = chosen.files.get(_SETTINGS)
            if path is None or path.parent != base:
                settings = {} if path is None else read_json(path)
                return cls(chosen.files, {**settings, "chat_template": inline})
        return chosen

    def copy(self, target: Path, *, link: bool = False) -> None:
        """Copy all of them into a directory, or link to them."""
        for name, path in sorted(self.files.items()):
            (target / name).parent.mkdir(exist_ok=True)
            if link:
                (target / name).symlink_to(path.absolute())
            else:
                shutil.copyfile(path, target / name)
        if self.settings is not None:
            (target / _SETTINGS).unlink(missing_ok=True)
            write_json(target / _SETTINGS, self.settings)


def _unchanged(source: Path) -> dict[str, Path]:
    """The files of a checkpoint that an artifact needs unchanged: all but weights and configs."""
    files = {
        path.name: path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHTS
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
    }
    return files | more_templates(source)


def _brought(adapter: Path) -> dict[str, Path]:
    """The files of a tokenizer and its chat templates in an adapter's directory."""
    names = sorted(_TOKENIZER | _TEMPLATES)
    files = {name: adapter / name for name in names if (adapter / name).is_file()}
    return files | more_templates(adapter)


def more_templates(directory: Path) -> dict[str, Path]:
    """The chat templates with names of their own in a directory, by their path in it."""
    paths = sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
    return {f"{MORE_TEMPLATES}/{path.name}": path for path in paths if path.is_file()}


def _template_files(names: Iterable[str]) -> set[str]:
    return {n for n in names if n in _TEMPLATES or n.startswith(f"{MORE_TEMPLATES}/")}


def _inline_template(directory: Path) -> Any:
    """The chat template, or several by name, in tokenizer_config.json; None without one."""
    return read_optional_json(directory / _SETTINGS).get("chat_template") or None


def check_sidecars(directory: Path) -> None:
    """Raise InputError where transformers couldn't read a file of the tokenizer, nor its settings.

    That is a Git LFS pointer, JSON that begins with a byte order mark, a longest length that isn't
    a number, which transformers takes and then compares with the lengths of texts, or a chat
    template that isn't Jinja, which it takes until a chat is to be rendered.
    """
    names = sorted(_TOKENIZER | _TEMPLATES | {"generation_config.json"})
    for path in (*(directory / name for name in names), *more_templates(directory).values()):
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
    check_syntax(_all_templates(directory))


def _all_templates(directory: Path) -> dict[str, str]:
    """The text of every chat template in a directory, by where it is."""
    files = [directory / _TEMPLATE, *more_templates(directory).values()]
    found = {
        str(path): path.read_text(encoding="utf-8", errors="replace")
        for path in files
        if path.is_file()
    }
    inline, where = _inline_template(directory), f"{directory / _SETTINGS} (chat_template)"
    if isinstance(inline, list):  # several by name
        for entry in inline:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                found[f"{where}, {entry.get('name')}"] = entry["template"]
    elif isinstance(inline, str):
        found[where] = inline
    return found


def brings_tokenizer(adapter: Path) -> bool:
    """Whether an adapter directory holds a tokenizer or chat templates of its own."""
    return bool(_brought(adapter))


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory has a file that a tokenizer can be loaded from.

    Without one transformers makes an empty tokenizer of the model's class, and says nothing.
    """
    suffixes = {".model", ".tiktoken", ".vocab"}
    return any(p.name in _VOCABULARIES or p.suffix in suffixes for p in directory.iterdir())


def tokens_of(path: Path) -> int:
    """How many rows an embedding must have for a tokenizer.json.

    Raises InputError for what isn't one.
    """
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens") or []]
        return 1 + max([*ids, *added], default=-1)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"isn't a tokenizer of the tokenizers library ({type(error).__name__}: {error})",
            subject=str(path),
            fix="Save it again with the tokenizer's save_pretrained.",
        ) from error


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
