"""Files that hold something else than their name promises, as public bug reports show them."""

from __future__ import annotations

from pathlib import Path

from quantkit.base.errors import InputError

_POINTER = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def mistaken_content(path: Path) -> InputError | None:
    """The error for a Git LFS pointer and for JSON that isn't plain UTF-8; None for neither.

    Neither transformers nor PEFT reads JSON that begins with a byte order mark.
    """
    with path.open("rb") as file:
        begins = file.read(len(_POINTER))
    if pointer := lfs_pointer(begins, path, "model"):
        return pointer
    if begins.startswith(_BOM) and path.suffix == ".json":
        return InputError(
            "begins with a byte order mark, which transformers and PEFT can't read",
            subject=str(path),
            fix="Save it as UTF-8 without a byte order mark (BOM): sed -i '1s/^\\xEF\\xBB\\xBF//' "
            f"{path}",
        )
    if begins.startswith(_UTF16) and path.suffix == ".json":
        return InputError(
            "is in UTF-16, which transformers and PEFT can't read",
            subject=str(path),
            fix=f"Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path}",
        )
    return None


def lfs_pointer(begins: bytes, path: Path, kind: str) -> InputError | None:
    """The error for a file that ``begins`` as a Git LFS pointer; None for any other.

    kind: what the file should be of, for the message.
    """
    if not begins.startswith(_POINTER):
        return None
    return InputError(
        "is a Git LFS pointer, not the file itself",
        subject=str(path),
        fix="Run `git lfs install` and `git lfs pull` in the repository, or download the "
        f"{kind} with huggingface_hub.",
    )
