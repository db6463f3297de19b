"""Tokens as text: byte-level BPE writes bytes as letters, SentencePiece spaces as ``▁``."""


def _letters() -> dict[int, int]:
    """GPT-2's letters for bytes: of printable ones itself, of the rest one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}


LETTERS = _letters()  # byte → code point
_BYTES = {code: byte for byte, code in LETTERS.items()}


def text_of(token: str, model: str) -> str | None:
    """The text of a token, or None for a part of a character."""
    if model == "llama":
        return token.replace("▁", " ")
    try:
        return token.translate(_BYTES).encode("latin-1").decode("utf-8")
    except UnicodeError:
        return None
