"""inspect: what an artifact's files tell about it, ours or another tool's, without running it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from quantkit.artifact.findings import Facts
from quantkit.artifact.manifest import read_manifest
from quantkit.base.errors import InputError
from quantkit.base.files import read_optional_json
from quantkit.base.names import dtype_name
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import Weights
from quantkit.engines.compatibility import loading_of, loading_of_packed, loading_of_plain
from quantkit.formats.format import Contents
from quantkit.formats.gguf.reader import GgufHeader, gguf_files
from quantkit.formats.gguf.templates import chat_template
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.plan.base import FLOATS, Plan, PlannedTensor
from quantkit.results.manifest import Manifest

_LONG = 16  # entries of a list in GGUF metadata; of a longer one only the length is shown
_PROVENANCE = (
    "quantkit",
    "recipe",
    "source",
    "adapters",
    "calibration",
    "summary",
    "tensors",
    "kept",
    "libraries",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def inspect(path: Path) -> Facts:
    """Read headers, configs and the small tensors that tell how the others are packed.

    path: a directory, or a .gguf file. Raises InputError for a path that holds no artifact, and
    for a file of it that can't be read.
    """
    if not path.exists():
        raise InputError("no such file or directory", where=str(path))
    manifest = read_manifest(path) if path.is_dir() else None
    if files := gguf_files(path):
        return _gguf(path, GgufHeader(files), manifest)
    return _safetensors(path, open_artifact(path), manifest)


def _gguf(path: Path, header: GgufHeader, manifest: Manifest | None) -> Facts:
    tensors = tuple(
        PlannedTensor(e.name, e.shape, e.type, e.nbytes, e.type not in FLOATS)
        for e in header.entries
    )
    metadata = header.metadata
    method = manifest.method if manifest else None
    if method is None and any(name.startswith("quantize.imatrix.") for name in metadata):
        method = "ggml, weighted by an importance matrix"
    dtypes: dict[str, int] = {}
    for entry in header.entries:
        dtypes[entry.type] = dtypes.get(entry.type, 0) + entry.nbytes
    return Facts(
        path=str(path),
        format=f"gguf ({header.architecture})",
        method=method,
        producer=_producer(manifest, metadata.get("general.quantized_by")),
        plan=Plan(method or "", "gguf", tensors),
        files=tuple(file.name for file in header.files),
        files_bytes=sum(file.stat().st_size for file in header.files),
        dtypes=dtypes,
        engines=loading_of("gguf", Contents()),
        tokenizer=_gguf_tokenizer(metadata),
        metadata={key: _short(value) for key, value in metadata.items()},
        provenance=_provenance(manifest),
    )


def _safetensors(path: Path, source: Weights, manifest: Manifest | None) -> Facts:
    quantized = set(source.quantized())
    tensors = tuple(
        PlannedTensor(
            key, source.shape(key), source.scheme(key), source.stored_bytes(key), key in quantized
        )
        for key in source.keys()  # noqa: SIM118 (it's no dictionary)
    )
    checkpoint = source.checkpoint if isinstance(source, PackedCheckpoint) else source
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"{type(checkpoint).__name__} has no config.json")
    label, writer, engines = source.format, None, loading_of_plain()
    method = manifest.method if manifest else None
    if isinstance(source, PackedCheckpoint):
        label, writer = str(source.dialect), source.dialect.writer
        engines = loading_of_packed(source)
        method = method or _method(source, path)
    dtypes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        name = dtype_name(entry.dtype)
        dtypes[name] = dtypes.get(name, 0) + entry.nbytes
    if writer is None and "transformers_version" in checkpoint.config:
        writer = f"transformers {checkpoint.config['transformers_version']}"
    return Facts(
        path=str(path),
        format=label,
        method=method,
        producer=_producer(manifest, writer),
        plan=Plan(method or "", source.format, tensors),
        files=tuple(file.name for file in source.files),
        files_bytes=sum(file.stat().st_size for file in source.files),
        dtypes=dtypes,
        engines=engines,
        tokenizer=_tokenizer(path),
        provenance=_provenance(manifest),
    )


def _method(source: PackedCheckpoint, path: Path) -> str | None:
    """How the codes were chosen, where the format or its writer leaves no doubt."""
    writer = source.dialect.writer or ""
    if source.dialect.method is not None:
        return source.dialect.method
    if "auto-round" in writer:
        return "auto-round"
    # llm-compressor leaves its own recipe beside the weights, and names no method elsewhere.
    if (path / "recipe.yaml").is_file():
        text = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        for name in ("GPTQ", "AWQ", "SmoothQuant"):
            if f"{name}Modifier" in text:
                return name.lower()
    # GPTQModel also writes AWQ; each format of its is made by the method of that name.
    if "gptqmodel" in writer or source.dialect.settings.get("damp_percent") is not None:
        return source.format
    return None


def _producer(manifest: Manifest | None, writer: str | None) -> str | None:
    return f"quantkit {manifest.quantkit}" if manifest else writer


def _provenance(manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    content = manifest.to_json()
    return {key: content[key] for key in _PROVENANCE if key in content}


def _tokenizer(directory: Path) -> dict[str, Any]:
    """The tokenizer's class, kind, size, special tokens and chat template, as far as known."""
    settings = read_optional_json(directory / "tokenizer_config.json")
    content = read_optional_json(directory / "tokenizer.json")
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    special = {name: _text(settings.get(name)) for name in _SPECIAL}
    facts = {
        "class": _text(settings.get("tokenizer_class")),
        "kind": model.get("type"),
        "tokens": len(vocabulary) or None,
        "added_tokens": len(content.get("added_tokens") or []) or None,
        **special,
    }
    known = {key: value for key, value in facts.items() if value is not None}
    return known | _template(chat_template(directory))


def _gguf_tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """The same of a GGUF file, whose tokenizer is in its metadata."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    facts = {
        "kind": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "tokens": len(tokens) or None,
    }
    for name in _SPECIAL:
        key = {"pad_token": "padding_token", "unk_token": "unknown_token"}.get(name, name)
        index = metadata.get(f"tokenizer.ggml.{key}_id")
        if index is not None and index < len(tokens):
            facts[name] = tokens[index]
    known = {key: value for key, value in facts.items() if value is not None}
    return known | _template(metadata.get("tokenizer.chat_template"))


def _template(template: str | None) -> dict[str, Any]:
    if template is None:
        return {"chat_template": None}
    digest = hashlib.sha256(template.encode()).hexdigest()
    return {"chat_template": {"characters": len(template), "sha256": digest}}


def _text(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _LONG:
        return f"{len(value)} values"
    return value
