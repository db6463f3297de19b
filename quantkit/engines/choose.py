"""Which engine runs an artifact, and whether it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quantkit.base.errors import InputError, MachineError
from quantkit.engines import int4
from quantkit.formats import auto_round
from quantkit.formats.gguf.reader import gguf_files
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.formats.registry import safetensors_formats

TRANSFORMERS, LLAMACPP, VLLM = "transformers", "llama.cpp", "vllm"
ENGINES = (TRANSFORMERS, int4.NAME, LLAMACPP, VLLM)


def engine_for(path: Path) -> tuple[str, Path]:
    """The engine that runs the artifact at ``path``, and the path that it loads."""
    if files := gguf_files(path):
        return LLAMACPP, files[0]
    source = open_artifact(path)
    if isinstance(source, PackedCheckpoint) and int4.runs(source):
        return int4.NAME, path
    return TRANSFORMERS, path


def check_engine(engine: str, path: Path) -> None:
    """Raise InputError for an engine that can't run the artifact at ``path``, and MachineError for
    one that isn't installed or lacks a package for the artifact's format."""
    if engine not in ENGINES:
        raise InputError(
            "no such engine", where=f"--engine {engine}", fix=f"One of {', '.join(ENGINES)}."
        )
    is_gguf = bool(gguf_files(path))
    if is_gguf != (engine == LLAMACPP) and not (is_gguf and engine == TRANSFORMERS):
        usual, _ = engine_for(path)
        raise InputError(
            f"{engine} doesn't run {'GGUF' if is_gguf else 'safetensors'}",
            where=str(path),
            fix=f"Use --engine {usual}.",
        )
    needed: tuple[str, ...] = {VLLM: ("vllm",), LLAMACPP: ("xllamacpp",)}.get(engine, ())
    if engine == TRANSFORMERS:
        needed = ("gguf",) if is_gguf else _needed_by_transformers(path)
    missing = [package for package in needed if find_spec(package.replace("-", "_")) is None]
    if missing:
        purpose = "" if engine in (VLLM, LLAMACPP) else " for this format"
        raise MachineError(
            f"needs {' and '.join(missing)}{purpose}, which {_are(missing)} installed",
            subject=engine,
            fix=f"pip install {' '.join(missing)}, or choose another engine.",
        )


def _needed_by_transformers(path: Path) -> tuple[str, ...]:
    source = open_artifact(path)
    if not isinstance(source, PackedCheckpoint):
        return ()
    if source.dialect.auto_round:
        return auto_round.NEEDED_BY_TRANSFORMERS
    return safetensors_formats()[source.format].needed_by_transformers


def _are(missing: list[str]) -> str:
    return "isn't" if len(missing) == 1 else "aren't"
