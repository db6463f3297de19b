"""What ``--model`` and ``--adapter`` may name: a directory, a hub id, or the bundled demo."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantkit.base.errors import InputError, MachineError
from quantkit.base.files import with_home
from quantkit.base.resources import demo_adapter, demo_model

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Weights in safetensors and the files beside them; pickles are never fetched.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def locate_model(model: str) -> Path:
    """The local directory of a model.

    ``demo`` is the bundled model; ``./demo`` is a directory of that name. ``owner/name``, if it is
    no directory, is downloaded by huggingface_hub into its own cache; ``owner/name@revision`` pins
    a revision.

    Raises InputError for what is none of these, and for what can't be downloaded; MachineError
    where there is no place to download to.
    """
    if model == "demo":
        return demo_model()
    return _directory(model, "a checkpoint is a directory with config.json and *.safetensors")


def locate_adapter(adapter: str) -> Path:
    """The local directory of a LoRA adapter, named like a model; ``demo`` is the bundled one."""
    if adapter == "demo":
        return demo_adapter()
    return _directory(adapter, "an adapter is a directory with adapter_config.json")


def _directory(model: str, expected: str) -> Path:
    path = with_home(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        raise InputError(
            f"is a model in GGUF; {expected}",
            subject=model,
            fix="Pass the BF16 checkpoint that it was made from; eval, bench, compare, inspect and "
            "verify take GGUF as an artifact.",
        )
    if path.is_file():
        raise InputError(
            f"is a file; {expected}",
            subject=model,
            fix=f"Pass its directory: {path.parent}",
        )
    name, _, revision = model.partition("@")
    looks_like_path = model.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise InputError(
            "no such directory",
            where=model,
            fix="Pass a directory, a hub id (owner/name), or 'demo'.",
        )
    # huggingface_hub would make a directory named ~ here.
    places = {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"}
    if os.path.expanduser("~") == "~" and not places & os.environ.keys():
        raise MachineError(
            "this user has no home directory to download into",
            where=model,
            fix="Set HOME or HF_HOME, or pass the directory of a model.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"is no directory, and can't be downloaded ({type(error).__name__}: {reason})",
            subject=model,
            fix="Check the name, the network, and HF_TOKEN for a gated model.",
        ) from error


def model_name(model: str) -> str:
    """The name of a model: the last part of its path or id, without a revision.

    For a snapshot in the Hub's cache it is the name of the model, not that of the commit.
    """
    if model != "demo" and with_home(model).is_dir():
        return folder_name(with_home(model).resolve())
    if _COMMIT.fullmatch(Path(model).name):
        return folder_name(Path(model))
    return model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]


def folder_name(path: Path) -> str:
    """The name of a directory or file: the last part of its path.

    The Hub's cache keeps models as ``models--OWNER--NAME/snapshots/COMMIT``; the name of such a
    directory is NAME. Bytes that aren't UTF-8 become _, since GGUF and reports hold the name.
    """
    path = path.resolve() if path.name in ("", "..") else path.absolute()
    snapshot = hub_snapshot(path)
    name = path.name if snapshot is None else snapshot.partition("@")[0].rpartition("/")[2]
    return re.sub("[\ud800-\udfff]", "_", name)


def hub_snapshot(path: Path) -> str | None:
    """``OWNER/NAME@COMMIT`` for the directory of a snapshot, as in the Hub's cache; else None.

    COMMIT is its first eight digits.
    """
    model = path.parent.parent.name.removeprefix("models--")
    if not _COMMIT.fullmatch(path.name) or path.parent.name != "snapshots" or not model:
        return None
    return f"{model.replace('--', '/')}@{path.name[:8]}"
