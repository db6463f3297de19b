"""The packages that a tokenizer's files need: transformers names another one where they lack."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from quantkit.base.errors import MachineError

_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # each line: a token in base64, and its rank
_SENTENCEPIECE = (
    b"\n"  # the tag of the first piece, https://protobuf.dev/programming-guides/encoding
)


def check_packages(directory: Path) -> None:
    """Raise MachineError where a tokenizer without tokenizer.json needs packages that aren't there.

    For a tokenizer that transformers couldn't load. A ``.model`` file is SentencePiece's or
    tiktoken's; its content decides which.
    """
    if (directory / "tokenizer.json").is_file():
        return
    for name in _MODELS:
        if (directory / name).is_file() and (lacking := _lacking(directory / name)):
            raise MachineError(
                f"reading it needs {' and '.join(lacking)}, not installed here",
                where=str(directory / name),
                fix=f"pip install {' '.join(lacking)}, or save tokenizer.json beside it: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) where they are installed.",
            )


def _lacking(path: Path) -> list[str]:
    with path.open("rb") as file:
        head = file.read(4096)
    needed = {}
    if _TIKTOKEN.match(head):
        needed = {"tiktoken": "tiktoken"}
    elif head.startswith(_SENTENCEPIECE):
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    return [package for package, module in needed.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent isn't there
        return False
